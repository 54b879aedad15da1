"""The causes of a difference in the optimizer, in its settings, and in how many steps there are."""

import itertools

from .causes_gradient import clipping_causes, gradient_causes
from .causes_network import rounding_causes
from .evidence import Cause, Found, differ, differing
from .files import Line
from .run import Run, paired, stepped, training, weights_found

# What does not change an update, or is only a schedule's own note.
NOT_SETTINGS = {"params", "foreach", "fused", "capturable", "initial_lr", "max_lr", "min_lr",
                "base_momentum", "max_momentum", "swa_lr", "param_names",
                "decoupled_weight_decay"}  # fmt: skip

OUTSIDE = "Weights were averaged, copied or loaded"

__all__ = ["changed_afterwards", "clipping_causes", "gradient_causes", "other_count",
           "other_length", "other_order", "settings", "since", "skipped", "stepped",
           "untrained", "update_causes"]  # fmt: skip


def other_order(x: Line, y: Line) -> Found:
    """Two optimizers take turns, and not in the same order."""
    first = [next(iter(step["groups"][0]["params"]), "?") for step in (x, y)]
    said = f"step {x['step']:,} is that of {first[0]} and others in A, of {first[1]} in B."
    cause = Cause("The optimizers step in another order, or another number of times", said, "steps")
    return Found("steps", "which parameters step", [cause])


def skipped(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Look whether the difference arose in steps that were not recorded."""
    before = a.step(index - 1)["step"] if index else 0
    if x["step"] - before <= 1:
        return None
    found = [weights_found(run, index) for run in (a, b)]
    names = [n for n in differing(*found) if a.head["buffers"].get(n, True)]
    if not names:
        return None
    said = f"steps {before + 1:,} to {x['step'] - 1:,} were not recorded; trace both again with "
    said += f"first={before + 1} and without `every`."
    cause = Cause("A difference in a step that was not recorded", said)
    return Found("weights", names[0], [cause], len(names) - 1)


def settings(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Compare the optimizers: class, and settings of each parameter; how they are grouped is free.

    Only parameters count that differ after the step.
    """
    names = differing(x["weights"]["bits"], y["weights"]["bits"])
    return _settings(a, b, index, x, y, names)


def _settings(a: Run, b: Run, index: int, x: Line, y: Line, names: list[str]) -> Found | None:
    if x["optimizer"] != y["optimizer"]:
        said = f"{x['optimizer']} in A, {y['optimizer']} in B."
        return Found("update", "the optimizer", [Cause("Another optimizer", said, "optimizer")])
    ours, theirs = ({n: g for g in step["groups"] for n in g["params"]} for step in (x, y))
    for who, held, other in (("B", ours, theirs), ("A", theirs, ours)):
        if only := [n for n in names if n in held and n not in other]:
            said = f"{len(only)} parameters, first {only[0]}, are not in {who}'s optimizer."
            cause = Cause("Parameters that the optimizer was not given", said, "parameter-groups")
            return Found("update", only[0], [cause], len(only) - 1)
    for name in [n for n in names if n in ours]:
        one, other = ours[name], theirs[name]
        keys = [k for k in one if k not in NOT_SETTINGS and k in other and one[k] != other[k]]
        for key in sorted(keys, key=lambda k: k != "lr"):
            said = f"{key} is {_number(one[key])} in A, {_number(other[key])} in B, in step "
            said += f"{x['step']}."
            counts = [sorted(len(g["params"]) for g in step["groups"]) for step in (x, y)]
            if counts[0] != counts[1]:
                said += f" A has groups of {counts[0]} parameters, B of {counts[1]}."
                cause = Cause("Other groups of parameters", said, "parameter-groups")
                return Found("update", "the parameter groups", [cause])
            if key == "lr" and (groups := _exchanged(ours, theirs, names)):
                said = f"{said} {groups}"
                causes = [Cause("Other groups of parameters", said, "parameter-groups")]
            elif key == "lr":
                causes = _rate_causes(a, b, index, x, said)
            elif key == "weight_decay":
                causes = [Cause("Another weight decay", said, "weight-decay")]
            else:
                causes = [Cause(f"Another setting of the optimizer: {key}", said, "optimizer")]
            return Found("update", f"{key} of {name}", causes)
    return None


def _exchanged(ours: dict[str, Line], theirs: dict[str, Line], names: list[str]) -> str:
    """Say that both runs have the same learning rates, for other parameters."""
    both = [n for n in names if n in ours and n in theirs]
    rates = [{n: groups[n]["lr"] for n in both} for groups in (ours, theirs)]
    if set(rates[0].values()) != set(rates[1].values()) or len(set(rates[0].values())) < 2:
        return ""
    unlike = [n for n in both if rates[0][n] != rates[1][n]]
    other = next((n for n in unlike if rates[0][n] != rates[0][unlike[0]]), None)
    if other is None:
        return ""  # one group's rate is now that of another
    return (f"{other} has {_number(rates[0][other])} in A, {_number(rates[1][other])} in B: the "
            "same rates, for other parameters.")  # fmt: skip


def _number(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def since(a: Run, b: Run, index: int, found: Found) -> tuple[Found, int]:
    """Return a difference as the first step shows it: a setting may differ before weights do."""
    step = a.step(index)["step"]
    if found.stage != "update" or found.size is not None or " of " not in found.what:
        return found, step
    names = differing(*(run.step(index)["weights"]["bits"] for run in (a, b)))
    while index:
        index -= 1
        x, y = a.step(index), b.step(index)
        earlier = _settings(a, b, index, x, y, names) if stepped(x) & set(names) else None
        if earlier is None or earlier.what != found.what:
            break
        found, step = earlier, x["step"]
    return found, step


def _rate_causes(a: Run, b: Run, index: int, x: Line, said: str) -> list[Cause]:
    """Tell a schedule from another learning rate by how both go on."""
    wanted = stepped(x)
    rates = [[line["groups"][0]["lr"] for line in run.every_step() if stepped(line) & wanted]
             for run in (a, b)]  # fmt: skip
    index = sum(bool(stepped(a.step(n)) & wanted) for n in range(index))
    changes = [sum(p != q for p, q in itertools.pairwise(r)) for r in rates]
    if not any(changes):
        return [Cause("Another learning rate", said, "learning-rate")]
    ours, theirs = rates
    for early, late, name in ((ours, theirs, "A"), (theirs, ours, "B")):
        if len(early) > index + 1 and early[index : len(late) - 1] == late[index + 1 :]:
            shifted = f"{said} {name}'s rates are those of the other one step later."
            return [Cause(f"The schedule moves before the optimizer's step in {name}", shifted,
                          "schedule")]  # fmt: skip
    for slow, fast, name in ((ours, theirs, "B"), (theirs, ours, "A")):
        for times in (2, 3, 4, 8):
            some = slow[::times]
            is_even = all(len(set(slow[n : n + times])) == 1 for n in range(0, len(slow), times))
            if len(set(some)) > 2 and fast[: len(some)] == some and not is_even:
                faster = (
                    f"{said} {name}'s rates are those that the other run has {times} times as late."
                )
                return [Cause(f"The schedule moves {times} times as fast in {name}, as where its "
                              "step is called more than once", faster, "schedule")]  # fmt: skip
    counted = f"{said} It changes {_times(changes[0])} in A, {_times(changes[1])} in B."
    # PyTorch's schedules note the initial_lr in each group, all but ReduceLROnPlateau.
    is_noted = [all("initial_lr" in g for g in run.step(len(run.steps) - 1)["groups"])
                for run in (a, b)]  # fmt: skip
    if not any(is_noted[n] for n in (0, 1) if changes[n]):
        counted += " What changes it leaves no initial_lr, as ReduceLROnPlateau, or code by hand."
        return [Cause("A schedule that watches a quantity: another monitor, mode or patience, or "
                      "one that never moves", counted, "schedule")]  # fmt: skip
    if not all(changes):
        return [Cause("A schedule on one side only, or one that never moves", counted, "schedule")]
    often = [n > 0.8 * (len(r) - 1) for n, r in zip(changes, rates, strict=True)]
    if any(often) and max(changes) > 2 * min(changes):
        return [Cause("The schedule moves by step on one side, by epoch on the other", counted,
                      "schedule")]  # fmt: skip
    rate = Cause("Another learning rate", said, "learning-rate")
    schedule = Cause("Another schedule, or another length of it", counted, "schedule")
    return [schedule, rate] if index else [rate, schedule]


def untrained(a: Run, b: Run, index: int, x: Line, y: Line, names: list[str]) -> Found | None:
    """Look for weights that no optimizer of the step holds, and that moved in one run alone."""
    names = [n for n in names if n not in stepped(x) and n not in stepped(y)]
    before = [weights_found(run, index) for run in (a, b)]
    after = [step["weights"]["bits"] for step in (x, y)]
    for who, other, mine, yours in (("A", "B", 0, 1), ("B", "A", 1, 0)):
        moved = [n for n in names if differ(before[mine].get(n, "?"), after[mine][n])
                 and not differ(before[yours].get(n, "?"), after[yours][n])]  # fmt: skip
        if moved:
            said = f"{moved[0]} moved in {who}, and not in {other}; no optimizer that stepped here "
            said += "holds it."
            cause = Cause(f"{OUTSIDE} in {who}, before the step ended", said)
            return Found("update", moved[0], [cause], len(moved) - 1)
    return None


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


def update_causes(
    a: Run, b: Run, index: int, x: Line, y: Line, rounding: bool
) -> list[Cause]:  # fmt: skip
    """Gradients and settings are equal, and yet the weights differ."""
    anew = [_made_anew(run, index) for run in (a, b)]
    if all(anew):  # then one of the two may have loaded its state
        anew = [step["begins"] for step in (x, y)]
    if bool(anew[0]) != bool(anew[1]):
        who = "A" if anew[0] else "B"
        said = f"its state begins again with step {x['step']}: {anew[0] or anew[1]}."
        return [Cause(f"The optimizer was made anew in {who}, and lost its state", said,
                      "optimizer")]  # fmt: skip
    if x["tied"] != y["tied"]:
        said = f"{len(x['tied'])} names are tied to another in A, {len(y['tied'])} in B."
        return [Cause("Weights are tied on one side, and not on the other", said, "layer")]
    kinds = [{k: g.get(k) for g in line["groups"] for k in ("foreach", "fused")}
             for line in (x, y)]  # fmt: skip
    if rounding and kinds[0] != kinds[1]:
        said = f"{kinds[0]} in A, {kinds[1]} in B."
        return [Cause("Another implementation of the same step", said, "optimizer")]
    if rounding:
        passes = (training(step)[:1] for step in (x, y))
        return rounding_causes(a, b, *(side[0] if side else None for side in passes))
    said = "gradients and settings are equal, and the optimizer's state before it was."
    return [Cause("Another formula of the step, or weights changed within it", said, "optimizer")]


def within(
    a: Run, b: Run, index: int, x: Line, y: Line, p: Line, q: Line
) -> Found | None:  # fmt: skip
    """Compare the weights that a later pass of a step found, as with a closure, or with SAM."""
    moved = [{n: t for n, t in record["changed"].items() if n not in a.head["buffers"]}
             for record in (p, q)]  # fmt: skip
    names = differing(*moved) or sorted(moved[0].keys() ^ moved[1].keys())
    if not names:
        return None
    if not any(n in stepped(step) for n in names for step in (x, y)):
        who = "A" if names[0] in moved[0] else "B"
        said = f"in step {x['step']:,} {names[0]} was changed between two forward passes; no "
        said += "optimizer that stepped here holds it."
        cause = Cause(f"{OUTSIDE} in {who}, between two forward passes of one step", said)
        return Found("weights", names[0], [cause], len(names) - 1)
    said = f"in step {x['step']:,} a forward pass found other weights than that of the other run: "
    said += "a step has several passes (a closure, or SAM), and those before were equal."
    cleared = [bool(step["between"].get("cleared")) for step in (x, y)]
    if cleared[0] != cleared[1]:
        who, other = ("B", "A") if cleared[0] else ("A", "B")
        said += f" {other} clears the gradients before each backward pass, {who} does not."
        cause = Cause(f"Left-over gradients: zero_grad is missing in {who}, in the closure", said,
                      "zero-grad")  # fmt: skip
        return Found("clipping", names[0], [cause], len(names) - 1)
    if found := _settings(a, b, index, x, y, names):
        return found
    cause = Cause("Another change of the weights between two passes of a step", said, "optimizer")
    return Found("update", names[0], [cause], len(names) - 1)


def _made_anew(run: Run, index: int) -> str:
    """Say by what an optimizer is a new one in a step, after another one held its parameters."""
    if not index:
        return ""
    step = run.step(index)
    held = stepped(step)
    before = [run.step(n) for n in range(index)]
    owners = [line["which"] for line in before if stepped(line) & held]
    if not owners:
        return ""
    if step["which"] not in owners:
        state = f", its state that of a first step ({step['begins']})" if step["begins"] else ""
        again = " A second fit begins here." if before[-1]["step"] in run.again else ""
        return f"it is another object than before{state}.{again}".rstrip(".")
    return step["begins"]


def other_count(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    counts = [len(side) for side in paired(x, y)]
    if counts[0] == counts[1]:
        return None
    what = f"{counts[0]} batches in A before the step, {counts[1]} in B"
    if not all(counts):
        who = "A" if not counts[0] else "B"
        said = f"step {x['step']} of {who} came without a forward pass that was seen."
        if not index and not any(training(run.step(n)) for run in (a, b) if run.name == who
                                 for n in range(len(run.steps))):  # fmt: skip
            return None  # none was seen in the whole run
        return Found("steps", what, [Cause("optimizer.step() is called twice", said, "steps")])
    said = f"{what}; they are equal as far as they go."
    for who, passes in zip("AB", paired(x, y), strict=True):
        batches = {str(p.get("rows")) for p in passes}
        if len(passes) > 1 == min(counts) == len(batches) and "rows" in passes[0]:
            said = f"{what}; in {who} all of them got the same samples."
            cause = Cause(f"Several passes of one batch make a step in {who}, as SAM or a closure "
                          "makes them", said, "steps")  # fmt: skip
            return Found("steps", what, [cause])
    before = [[len(side) for side in paired(a.step(n), b.step(n))] for n in range(index)]
    usual = max((n for n, _ in before), default=1)
    if usual > 1 and all(n == m for n, m in before) and min(counts) < usual:
        who, other = ("A", "B") if counts[0] < counts[1] else ("B", "A")
        said = f"{what}; before, both made a step from {usual}. Where an epoch's batches are no "
        said += f"multiple of {usual}, {who} makes a step from the rest, and {other} takes more."
        cause = Cause(f"The rest of an epoch's batches makes a step in {who}, and is carried on "
                      f"(or dropped) in {other}", said, "accumulation")  # fmt: skip
        return Found("steps", what, [cause])
    cause = Cause("Gradients of several batches are accumulated on one side", said, "accumulation")
    return Found("steps", what, [cause])


def other_length(a: Run, b: Run, counts: list[int]) -> Found:
    shorter, other = (a, b) if counts[0] < counts[1] else (b, a)
    if error := shorter.end["error"]:
        cause = Cause(f"{shorter.name} was ended by an error", error)
    else:
        sizes = [[len(r.get("rows", [])) for r in training(run.step(len(run.steps) - 1))]
                 for run in (a, b)]  # fmt: skip
        said = f"{counts[0]:,} steps in A, {counts[1]:,} in B; their last batches have "
        said += f"{sizes[0]} and {sizes[1]} samples. All steps that both made are equal."
        last = training(other.step(len(other.steps) - 1))
        if not last and sizes[0] != sizes[1]:
            cause = Cause("optimizer.step() is called once more", said, "steps")
        else:
            cause = Cause("More epochs or batches on one side: max_epochs, limit, drop_last, "
                          "early stopping", said, "steps")  # fmt: skip
    return Found("steps", f"{counts[0]:,} in A, {counts[1]:,} in B", [cause])


def changed_afterwards(a: Run, b: Run, names: list[str]) -> list[Cause]:
    """Say what may have changed weights after the last step."""
    said = "all steps are equal, and the weights at the end are not."
    if all(name in a.head["buffers"] for name in names):
        said += " Only buffers differ."
        return [Cause("A forward pass in train mode after the last step", said, "train-and-eval")]
    for run in (a, b):
        last = {n: v["bits"] for n, v in run.end["weights"].items()}
        for line in run.every_step():
            if names and all(not differ(last.get(n, "?"), line["weights"]["bits"].get(n, "?"))
                             and n in last for n in names):  # fmt: skip
                said += f" {run.name}'s are those after its step {line['step']:,} again."
                break
    return [Cause("Weights were loaded after the last step, such as the best checkpoint's", said,
                  "best-or-last")]  # fmt: skip
