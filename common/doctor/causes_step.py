"""The causes of a difference after the loss: in gradients, in the optimizer, in how many steps."""

from .causes_network import rounding_causes
from .evidence import Cause, Found, common_factor, differ, near, total
from .files import Line, Run

# What does not change an update, or is only a schedule's own note.
NOT_SETTINGS = {"params", "foreach", "fused", "capturable", "initial_lr", "max_lr", "min_lr",
                "base_momentum", "max_momentum", "swa_lr"}  # fmt: skip

CHANGED_AFTERWARDS = Cause(
    "Weights were loaded after the last step, such as the best checkpoint's",
    "all steps are equal, and the weights at the end are not.", "best-or-last",
)  # fmt: skip


def gradient_causes(a: Run, b: Run, x: Line, y: Line, rounding: bool) -> list[Cause]:
    if rounding:
        return rounding_causes(a, b, x["batches"][0], y["batches"][0])
    one_sided = sorted(x["fresh"].keys() ^ y["fresh"].keys())
    if one_sided:
        said = f"{len(one_sided)} parameters get a gradient in one run only, first {one_sided[0]}."
        return [Cause("Frozen or detached on one side (requires_grad, detach, no_grad)", said,
                      "frozen")]  # fmt: skip
    names = [n for n in x["fresh"] if differ(x["fresh"][n], y["fresh"][n])]
    factors = [common_factor(x["fresh"][n], y["fresh"][n]) for n in names]
    if all(factors):
        said = f"B's gradient of {names[0]} is {factors[0]:.6g} times A's."
        return [Cause("A hook, or a part of the loss, scales gradients", said, "accumulation")]
    said = f"output and its gradient are equal; {len(names)} of {len(x['fresh'])} gradients differ."
    penalty = "A term of the loss that does not come from the output, as a penalty on weights"
    return [Cause(penalty, said, "weight-decay")]


def clipping_causes(x: Line, y: Line, rounding: bool) -> list[Cause]:
    """The backward passes gave the same: what was done to it before the step?"""
    norms = total(x["used"]), total(y["used"])
    said = f"the norm of all gradients at the step is {norms[0]:.4g} in A, {norms[1]:.4g} in B"
    causes: list[Cause] = []
    for name, line, other in (("A", x, y), ("B", y, x)):
        between = line["between"]
        if between.get("same"):
            continue
        largest = {t["max"] for t in line["used"].values()}
        beyond = sum(t["max"] > max(largest) for t in line["fresh"].values())
        tied = sum(t["max"] == max(largest) for t in line["used"].values())
        if between.get("left_over", 0) > 0.99 and norms[0] != norms[1]:
            left = f"what {name} has more is the gradient of the step before (cosine "
            left += f"{between['left_over']:.3f}); {said}."
            causes.insert(0, Cause(f"Left-over gradients: zero_grad is missing in {name}", left,
                                   "zero-grad"))  # fmt: skip
        elif between["cosine"] > 0.999999:
            ratio = between["ratio"]
            inverse = 1 / ratio
            if inverse > 1.5 and near(inverse, round(inverse)):
                divided = f"{name} steps with 1/{round(inverse)} of its gradients; {said}."
                causes.append(Cause(f"The gradients are divided by {round(inverse)} in {name}",
                                    divided, "accumulation"))  # fmt: skip
            clipped = f"{name} shortened its gradients by {ratio:.4g}; {said}."
            causes.append(Cause(f"The gradients' norm is clipped in {name}"
                                f"{'' if other['between'].get('same') else ' to another length'}",
                                clipped, "clipping"))  # fmt: skip
        elif beyond and tied > 1:
            cut = f"no value in {name} is beyond {max(largest):.4g}, and some were; {said}."
            causes.append(Cause(f"The gradients' values are clipped in {name}", cut, "clipping"))
        else:
            other_cause = f"{name} changed direction and length of its gradients; {said}."
            causes.append(
                Cause(
                    f"{name} changes its gradients before the step, such as their "
                    "average over devices",
                    other_cause,
                    "batch-size-and-devices",
                )
            )
    return causes or [Cause("Other gradients at the step", said + ".")]


def settings(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Compare the optimizers: class, groups of parameters, and their settings."""
    if x["optimizer"] != y["optimizer"]:
        said = f"{x['optimizer']} in A, {y['optimizer']} in B."
        return Found("update", "the optimizer", [Cause("Another optimizer", said, "optimizer")])
    ours, theirs = ([g["params"] for g in line["groups"]] for line in (x, y))
    if sorted(map(sorted, ours)) != sorted(map(sorted, theirs)):
        return _other_groups(ours, theirs)
    for one in x["groups"]:
        other = next(g for g in y["groups"] if sorted(g["params"]) == sorted(one["params"]))
        keys = [k for k in one if k not in NOT_SETTINGS and one[k] != other.get(k)]
        for key in sorted(keys, key=lambda k: k != "lr"):
            where = f"{key} of {one['params'][0]}"
            values = [f"{v:.6g}" if isinstance(v, float) else v for v in (one[key], other.get(key))]
            said = f"{key} is {values[0]} in A, {values[1]} in B, in step {x['step']}."
            if key == "lr":
                causes = _rate_causes(a, b, index, said)
            elif key == "weight_decay":
                causes = [Cause("Another weight decay", said, "weight-decay")]
            else:
                causes = [Cause(f"Another setting of the optimizer: {key}", said, "optimizer")]
            return Found("update", where, causes)
    return None


def _other_groups(ours: list[list[str]], theirs: list[list[str]]) -> Found:
    given = [{name for group in groups for name in group} for groups in (ours, theirs)]
    if only := sorted(given[0] ^ given[1]):
        missing = "B" if only[0] in given[0] else "A"
        said = f"{len(only)} parameters, first {only[0]}, are not in {missing}'s optimizer."
        cause = Cause("Parameters that the optimizer was not given", said, "parameter-groups")
        return Found("update", only[0], [cause], len(only) - 1)
    said = f"A has groups of {[len(g) for g in ours]} parameters, B of {[len(g) for g in theirs]}."
    cause = Cause("Other groups of parameters", said, "parameter-groups")
    return Found("update", "the parameter groups", [cause])


def _rate_causes(a: Run, b: Run, index: int, said: str) -> list[Cause]:
    """Tell a schedule from another learning rate by how both go on."""
    rates = [[line["groups"][0]["lr"] for line in run.every_step()] for run in (a, b)]
    changes = [len(set(r)) - 1 for r in rates]
    if not any(changes):
        return [Cause("Another learning rate", said, "learning-rate")]
    ours, theirs = rates
    for early, late, name in ((ours, theirs, "A"), (theirs, ours, "B")):
        if len(early) > index + 1 and early[index : len(late) - 1] == late[index + 1 :]:
            shifted = f"{said} {name}'s rates are those of the other one step later."
            return [Cause(f"The schedule moves before the optimizer's step in {name}", shifted,
                          "schedule")]  # fmt: skip
    counted = f"{said} It changes {changes[0]} times in A, {changes[1]} times in B."
    if not all(changes):
        return [Cause("A schedule on one side only, or one that never moves", counted, "schedule")]
    if max(changes) > 2 * min(changes):
        return [Cause("The schedule moves by step on one side, by epoch on the other", counted,
                      "schedule")]  # fmt: skip
    rate = Cause("Another learning rate", said, "learning-rate")
    schedule = Cause("Another schedule, or another length of it", counted, "schedule")
    return [schedule, rate] if index else [rate, schedule]


def update_causes(
    a: Run, b: Run, index: int, x: Line, y: Line, rounding: bool
) -> list[Cause]:  # fmt: skip
    """Gradients and settings are equal, and yet the weights differ, or the optimizer's state."""
    anew = [_made_anew(line) if index else "" for line in (x, y)]
    if bool(anew[0]) != bool(anew[1]):
        who = "A" if anew[0] else "B"
        said = f"its state begins again with step {x['step']}: {anew[0] or anew[1]}."
        return [Cause(f"The optimizer was made anew in {who}, and lost its state", said,
                      "optimizer")]  # fmt: skip
    kinds = [{k: g.get(k) for g in line["groups"] for k in ("foreach", "fused")}
             for line in (x, y)]  # fmt: skip
    if rounding and kinds[0] != kinds[1]:
        said = f"{kinds[0]} in A, {kinds[1]} in B."
        return [Cause("Another implementation of the same step", said, "optimizer")]
    if rounding:
        return rounding_causes(a, b, x["batches"][0], y["batches"][0])
    said = "gradients and settings are equal, and the optimizer's state before it was."
    return [Cause("Another formula of the step, or weights changed within it", said, "optimizer")]


def _made_anew(line: Line) -> str:
    """Return a part of the optimizer's state that is that of a first step, if there is one."""
    for key, tensor in line["state"].items():
        name, what = key.split(": ")
        # Adam counts its steps; SGD's momentum begins as the gradient itself.
        if what == "step" and tensor["sum"] == 1:
            return key
        gradient = line["used"].get(name, {})
        if what == "momentum_buffer" and tensor["bits"] == gradient.get("bits"):
            return key
    return ""


def other_count(x: Line, y: Line) -> Found:
    counts = len(x["batches"]), len(y["batches"])
    what = f"{counts[0]} batches in A before the step, {counts[1]} in B"
    if not all(counts):
        who = "A" if not counts[0] else "B"
        said = f"step {x['step']} of {who} came without a forward pass."
        return Found("steps", what, [Cause("optimizer.step() is called twice", said, "steps")])
    said = f"{what}; they are equal as far as they go."
    cause = Cause("Gradients of several batches are accumulated on one side", said, "accumulation")
    return Found("steps", what, [cause])


def other_length(a: Run, b: Run) -> Found:
    counts = a.end["end"], b.end["end"]
    shorter, other = (a, b) if counts[0] < counts[1] else (b, a)
    if error := shorter.end["error"]:
        cause = Cause(f"{shorter.name} was ended by an error", error)
    else:
        sizes = [[len(r["rows"]) for r in run.step(-1)["batches"]] for run in (a, b)]
        said = f"{counts[0]:,} steps in A, {counts[1]:,} in B; their last batches have "
        said += f"{sizes[0]} and {sizes[1]} samples. All steps that both made are equal."
        last = other.step(-1)["batches"]
        if not last:
            cause = Cause("optimizer.step() is called once more", said, "steps")
        else:
            cause = Cause("More epochs or batches on one side: max_epochs, limit, drop_last, "
                          "early stopping", said, "steps")  # fmt: skip
    return Found("steps", f"{counts[0]:,} in A, {counts[1]:,} in B", [cause])
