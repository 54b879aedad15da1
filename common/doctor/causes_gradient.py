"""The causes of a difference in the gradients: of the backward pass, and before the step."""

import numpy as np

from .causes_network import FROZEN, other_setting, recomputed_otherwise, rounding_causes
from .evidence import Cause, common_factor, differing, is_power_of_two, near
from .files import Line
from .run import Run, same_losses, training

PENALTY = "A term of the loss that does not come from the output, as a penalty on weights"
WAY = (
    "Another way of the gradients through the network: detach, create_graph, a backward pass "
    "of one's own, a hook"
)


def gradient_causes(a: Run, b: Run, index: int, x: Line, y: Line, rounding: bool) -> list[Cause]:
    passes = training(x)[:1], training(y)[:1]
    if rounding:
        causes = rounding_causes(a, b, *(side[0] if side else None for side in passes))
        counts = len(x["backwards"]), len(y["backwards"])
        if counts[0] != counts[1]:
            said = f"A made {counts[0]} backward passes, B {counts[1]}; their sum is the same."
            causes = [Cause(causes[0].name, said)]
        return causes
    stages = [step["fresh"] or step["used"] for step in (x, y)]
    ours, theirs = (side["bits"] for side in stages)
    one_sided = sorted(ours.keys() ^ theirs.keys())
    if one_sided:
        who = "A" if one_sided[0] in ours else "B"
        said = f"{len(one_sided)} parameters get a gradient in {who} only, first {one_sided[0]}."
        return [Cause(FROZEN, said, "frozen")]
    again = [recomputed_otherwise(run, index) for run in (a, b)]
    if bool(again[0]) != bool(again[1]):
        who, layer = ("A", again[0]) if again[0] else ("B", again[1])
        said = f"{layer} gave something else in {who}'s backward pass than in its forward pass."
        return [Cause("Other random numbers in the recomputation of a checkpoint", said)]
    names = differing(ours, theirs)
    for module in dict.fromkeys(name.rpartition(".")[0] for name in names):
        if cause := other_setting(a, b, module):
            return [cause]
    full = [side.get("full", {}) for side in stages]
    if all(n in full[0] and n in full[1] for n in names):
        factors = [common_factor(full[0][n], full[1][n]) for n in names]
        if all(factors):
            said = f"B's gradient of {names[0]} is {factors[0]:.6g} times A's"
            same = all(near(f, factors[0] or 1.0) for f in factors if f)
            start = a.head["start"]
            if not index and same and not any(start.get(n, {}).get("norm", 1) for n in names):
                said += "; these weights begin as zeros, so that the output does not show it."
                return [Cause("A factor within a layer whose weights are zero, such as LoRA's "
                              "alpha / r, or a gate", said, "layer")]  # fmt: skip
            said += "." if same else "; other parameters have other factors."
            return [Cause("A hook, or a part of the loss, scales gradients", said,
                          "accumulation")]  # fmt: skip
        if strength := _penalty(a, index, names, *full):
            said = f"the difference is {strength:.4g} times the weights, as that of {names[0]}."
            return [Cause(PENALTY, said, "weight-decay")]
    if not any(side and side[0]["loss"] for side in passes):
        said = "the output of the network, or its gradient, was not seen: it may differ before."
        return [Cause("Not known", said)]
    said = f"output and its gradient are equal; {len(names)} of {len(ours)} gradients differ, "
    equal = [n for n in ours if n not in names]
    said += f"but not that of {equal[-1]}." if equal else "all that there are."
    is_same = same_losses(x, y)
    way = Cause(WAY, said + " The loss itself is equal, too." * is_same, "frozen")
    penalty = Cause(PENALTY, said, "weight-decay")
    return [way, penalty] if is_same else [penalty, way]


def _penalty(a: Run, index: int, names: list[str], ours: Line, theirs: Line) -> float | None:
    """Return f where each gradient differs by f times its parameter, in the first step."""
    if index:
        return None
    found = []
    for name in names:
        weights = np.array(a.head["start"].get(name, {}).get("sketch", []))
        apart = np.subtract(theirs[name]["sketch"], ours[name]["sketch"])
        if weights.shape != apart.shape or not weights.any():
            return None
        factor = float(weights @ apart / (weights @ weights))
        if np.abs(apart - factor * weights).max() > 1e-3 * np.abs(apart).max():
            return None
        found.append(factor)
    return abs(found[0]) if found and all(near(f, found[0], 1e-2) for f in found) else None


def clipping_causes(a: Run, b: Run, index: int, x: Line, y: Line) -> list[Cause]:
    """The backward passes gave the same: what was done to it before the step?"""
    norms = x["used"]["norm"], y["used"]["norm"]
    said = f"the norm of all gradients at the step is {norms[0]:.4g} in A, {norms[1]:.4g} in B"
    causes: list[Cause] = []
    lines = (("A", a, x, y), ("B", b, y, x))
    both = all(step["between"].get("cosine", 0) > 0.999999 for step in (x, y))
    missing = [set(step["between"].get("missing", ())) for step in (x, y)]
    if missing[0] and missing[0] == missing[1]:  # so it is with FSDP, whose hooks come earlier
        more = "in both runs the gradients at the step are others than those of this process's "
        more += f"backward pass; {said}. The traces of the other ranks tell why."
        return [Cause("Other gradients came from the other processes", more,
                      "batch-size-and-devices")]  # fmt: skip
    for name, run, step, other in lines:
        between = step["between"]
        if not between:
            continue
        if near(between.get("left", 0), 1, 1e-3) and not near(other["between"].get("left", 0), 1):
            left = f"what {name} has more in {between['left in'][0]} was there before the backward "
            left += f"pass; {said}."
            causes.insert(0, Cause(f"Left-over gradients: zero_grad is missing in {name}", left,
                                   "zero-grad"))  # fmt: skip
        elif between["cleared"] and not other["between"].get("cleared"):
            cleared = f"{between['cleared'][0]} had a gradient of an earlier backward pass of this "
            cleared += f"step, and it was taken away before the next; {said}."
            causes.insert(0, Cause(f"Gradients were cleared between the backward passes in {name}",
                                   cleared, "zero-grad"))  # fmt: skip
        elif "cosine" not in between or between["missing"]:
            names = between["missing"]
            which = f"{names[0]} has a gradient at the step, or after the backward passes, but "
            which += f"not both, in {name}; {said}."
            causes.append(Cause("Gradients were set, or removed, by hand or by zero_grad", which,
                                "zero-grad"))  # fmt: skip
        elif not between["largest"]:
            zeroed = f"all that the backward pass gave is 0 at the step in {name}; {said}."
            late = f"zero_grad comes between the backward pass and the step in {name}"
            causes.insert(0, Cause(late, zeroed, "zero-grad"))
        elif between["cosine"] > 0.999999:
            causes.append(_shortened(run, step, name, said, both))
        elif between["cut"] and between["tied"] > 1:
            cut = f"no value in {name} is beyond {between['largest']:.4g}, and "
            cut += f"{between['cut']} were; {said}."
            causes.append(Cause(f"The gradients' values are clipped in {name}", cut, "clipping"))
        elif between["turned"] > 0.999999:
            low, high = between["apart"]
            each = f"each tensor keeps its direction, but has between {low:.4g} and {high:.4g} "
            each += f"times its length; {said}."
            if near(high, 1, 1e-6):
                part = Cause(f"A part of the gradients alone is scaled or clipped in {name}", each,
                             "clipping")  # fmt: skip
                causes.insert(0, part)
                continue
            parts = between["lengths"]
            what = "Each tensor's gradient is"
            if 1 < parts < len(step["used"]["bits"]):
                what = f"The gradients of {parts} parts of the network are each"
                each = f"there are {parts} factors; {each}"
            alone = Cause(f"{what} scaled or clipped by itself in {name}", each, "clipping")
            # It says more than another length.
            causes.insert(0 if all(s["between"] for s in (x, y)) else len(causes), alone)
        else:
            turned = f"{name} changed direction and length of its gradients; {said}."
            what = (
                f"{name} changes its gradients before the step, such as their average over devices"
            )
            causes.append(Cause(what, turned, "batch-size-and-devices"))
    if averages := _of_averages(a, b, x, y, said):
        causes.insert(0, averages)
    if early := _after_each(x, y, said):
        causes.insert(0, early)
    if unscaled := _clipped_while_scaled(x, y, said):
        causes.insert(0, unscaled)
    return causes or [Cause("Other gradients at the step", said + ".")]


def _of_averages(a: Run, b: Run, x: Line, y: Line, said: str) -> Cause | None:
    """Hold what both runs made of their gradients against each other, as averages over devices."""
    if any(step["between"].get("cosine", 1) > 0.999999 for step in (x, y)):
        return None
    ours, theirs = (np.array(step["used"]["sketch"]) for step in (x, y))
    factor = float(ours @ theirs / max(ours @ ours, 1e-300))
    off = np.abs(theirs - factor * ours).max() > 1e-4 * np.abs(theirs).max()
    if off or factor <= 0 or near(factor, 1, 1e-4):
        return None
    said += f". B's are {factor:.4g} times A's, in every value."
    for who, run in (("A", a), ("B", b)):
        norms = [step["used"]["norm"] for step in run.every_step()]
        if len(norms) > 1 and all(near(norm, norms[0], 1e-3) for norm in norms):
            said += f" {who}'s norm is the same in {len(norms)} steps."
            return Cause(f"The gradients' norm is clipped in {who}", said, "clipping")
    return Cause("The gradients are multiplied by a number on one side, or clipped", said,
                 "accumulation")  # fmt: skip


def _after_each(x: Line, y: Line, said: str) -> Cause | None:
    """Look whether gradients of one norm were turned in one run alone, between several passes."""
    cosines = [step["between"].get("cosine") for step in (x, y)]
    norms = [step["used"]["norm"] for step in (x, y)]
    if None in cosines or not near(norms[0], norms[1], 1e-3):
        return None
    turned = [cosine < 0.999999 for cosine in cosines]
    who, step, other = ("A", x, "B") if turned[0] else ("B", y, "A")
    if turned[0] == turned[1] or len(step["backwards"]) < 2:
        return None
    said += f". {other} only shortens its gradients, {who} turns them, too: it made "
    said += f"{len(step['backwards'])} backward passes before the step."
    return Cause(f"The gradients are clipped after each backward pass in {who}, once before the "
                 f"step in {other}", said, "clipping")  # fmt: skip


def _clipped_while_scaled(x: Line, y: Line, said: str) -> Cause | None:
    """Look whether both clip to one length, and one divides by a scale only after that."""
    norms = [step["used"]["norm"] for step in (x, y)]
    is_turned = any(step["between"].get("cosine", 0) < 0.999999 for step in (x, y))
    if is_turned or not all(norms):
        return None
    scale = max(norms) / min(norms)
    if scale < 256 or not is_power_of_two(scale):
        return None
    who = "A" if norms[0] < norms[1] else "B"
    said += f". One is {round(scale)} times the other: a scale of float16."
    return Cause(f"The gradients are clipped before they are unscaled in {who}", said, "precision")


def _shortened(run: Run, step: Line, name: str, said: str, both: bool) -> Cause:
    """Tell a clipped norm from a division: how do the other steps of this run go?"""
    ratio = step["between"]["ratio"]
    steps = [line for line in run.every_step() if line["which"] == step["which"]]
    changed = [line["between"] for line in steps if "ratio" in line["between"]]
    ratios, norms = [line["ratio"] for line in changed], [line["norm"] for line in changed]
    constant = all(near(r, ratio, 1e-4) for r in ratios) and len(changed) == len(steps)
    same_norm = all(near(n, norms[0], 1e-3) for n in norms)
    inverse = 1 / ratio if ratio else 0.0
    whole = inverse > 1.5 and near(inverse, round(inverse), 2e-6)
    if (constant and not same_norm) or (len(steps) == 1 and whole and not _is_round(norms[0])):
        number = f"divided by {round(inverse)}" if whole or near(inverse, round(inverse), 1e-4) \
            else f"multiplied by {ratio:.4g}"  # fmt: skip
        divided = f"in each of {len(steps)} steps {name} uses {ratio:.4g} times its gradients; "
        return Cause(f"The gradients are {number} in {name}", f"{divided}{said}.", "accumulation")
    clipped = f"{name} shortened its gradients by {ratio:.4g}; {said}."
    if len(changed) > 1 and same_norm:
        clipped += f" {name}'s norm is the same in {len(changed)} steps."
    length = " to another length" * both
    return Cause(f"The gradients' norm is clipped in {name}{length}", clipped,
                 "clipping")  # fmt: skip


def _is_round(number: float) -> bool:
    """Tell whether somebody may have typed a number: it has at most two digits."""
    return near(number, float(f"{number:.2g}"), 1e-3)
