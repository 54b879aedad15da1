"""The causes of a difference in the forward pass, up to the loss's gradient at the output."""

import math

from .evidence import Cause, Found, common_factor, differ, near, tensors
from .files import Line, Run, weights_before


def other_mode(a: Run, x: Line, y: Line) -> Found:
    names = list(a.head["modules"])
    both = list(zip(names, x["mode"], y["mode"], strict=True))
    differ = [(name or "the network", p, q) for name, p, q in both if p != q]
    words = {"1": "train", "0": "eval"}
    said = f"{len(differ)} of {len(names)} modules, first {differ[0][0]}: "
    said += f"{words[differ[0][1]]} in A, {words[differ[0][2]]} in B."
    causes = [Cause("model.train() is missing after an evaluation, or before the training", said,
                    "train-and-eval")]  # fmt: skip
    if len(differ) < len(names):
        causes.insert(0, Cause("A part of the network is frozen on one side", said,
                               "train-and-eval"))  # fmt: skip
    return Found("mode", differ[0][0], causes, len(differ) - 1)


def changed(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Compare what somebody did to the weights between two steps."""
    if not x["changed"] and not y["changed"]:
        return None
    before = [weights_before(run, index) for run in (a, b)]
    ours, theirs = x["changed"] or before[0], y["changed"] or before[1]

    def find(rounding: bool) -> list[Cause]:
        different = [n for n in ours if n in theirs and differ(ours[n], theirs[n])]
        for run, batch in ((a, x), (b, y)):
            seen = batch["evaluation"]
            if seen["batches"] and "1" in seen["mode"]:
                said = f"{run.name} made {seen['batches']} forward passes without gradients in "
                said += "train mode; they moved the running averages."
                return [Cause("model.eval() is missing before an evaluation", said,
                              "train-and-eval")]  # fmt: skip
        buffers = [n for n in different if n.split(".")[-1].startswith(("running_", "num_batch"))]
        if buffers and len(buffers) == len(different):
            said = f"only running averages changed, first {buffers[0]}."
            return [Cause("A forward pass in train mode outside the training", said, "summary")]
        who = "A" if x["changed"] else "B"
        said = f"between two steps, in {who}: no optimizer that was traced did it."
        return [Cause("Weights were loaded, averaged or clamped between two steps", said)]

    return tensors("weights", ours, theirs, find)


def output_causes(
    a: Run, b: Run, what: str, x: Line, y: Line, rounding: bool
) -> tuple[str, list[Cause]]:
    """Return the stage, output or random, and the causes; `what` is the first that differs."""
    modules = a.head["modules"], b.head["modules"]
    one, other = (batch["layers"].get(what) or batch["outputs"][0] for batch in (x, y))
    causes: list[Cause] = []
    if one["dtype"] != other["dtype"]:
        said = f"{what} gives {one['dtype']} in A, {other['dtype']} in B."
        causes.append(Cause("Another precision (autocast on one side)", said, "precision"))
    # Only layers without parts: the class that holds them may have another name.
    leaves = [n for n in modules[0] if n and not any(m.startswith(f"{n}.") for m in modules[0])]
    others = [n for n in leaves if modules[0][n] != modules[1].get(n, modules[0][n])]
    for name in others[:1]:
        said = f"{name} is {modules[0][name]} in A, {modules[1][name]} in B."
        causes.append(Cause("A layer with another setting", said, "layer"))
    drawn = [n for n in x["random"] if x["random"][n] != y["random"].get(n)]
    if drawn and not rounding and not causes:
        said = f"before the forward pass the state of {drawn[0]}'s generator differs; the first "
        said += f"output that differs is that of {what}."
        seen = [batch["evaluation"]["batches"] for batch in (x, y)]
        if seen[0] != seen[1]:
            said += f" A evaluated {seen[0]} batches before it, B {seen[1]}."
        causes.append(Cause("Random numbers, such as a dropout's, from another state", said,
                            "validation-and-order"))  # fmt: skip
        if any("Dropout" in module for module in modules[0].values()):
            return "random", causes
    if rounding:
        causes += rounding_causes(a, b, x, y)
    said = f"batch and weights are equal; {what} is the first whose output differs."
    return "output", [*causes, Cause("Another computation in the network", said, "layer")]


def rounding_causes(a: Run, b: Run, x: Line, y: Line) -> list[Cause]:
    """Say what of the two runs' surroundings can have put sums into another order."""
    ours = a.head["environment"] | {"threads": x["threads"]}
    theirs = b.head["environment"] | {"threads": y["threads"]}
    others = [name for name in ours if name != "versions" and ours[name] != theirs.get(name)]
    said = "; ".join(f"{name}: {ours[name]} in A, {theirs[name]} in B" for name in others)
    said = said or "a kernel chosen by memory layout, another device, or compiled code"
    return [Cause("The same sums in another order: docs/sameness.md", f"{said}.")]


def loss_causes(x: Line, y: Line, index: int, rounding: bool) -> list[Cause]:
    """Look at one batch of a step, the one with that index, and at how many the step has."""
    counts = len(x["batches"]), len(y["batches"])
    x, y = x["batches"][index], y["batches"][index]
    place = next(p for p in x["loss"] if p not in y["loss"] or differ(x["loss"][p], y["loss"][p]))
    one, other = x["loss"][place], y["loss"].get(place)
    if not other:
        return [Cause("Another loss", "it uses other outputs of the network.", "loss")]
    factor = common_factor(one, other)
    if factor:
        return [_factor_cause(factor, one["shape"], counts)]
    rows = list(zip(x.get("loss_rows", []), y.get("loss_rows", []), strict=False))
    equal = sum(m == n for m, n in rows)
    if equal:
        said = f"{equal} of {len(rows)} samples have the same gradient; the others' targets differ."
        return [Cause("Other targets (labels) for some samples", said, "targets")]
    # A cross entropy's gradient is softmax minus one-hot: another label moves two of its values.
    values = zip(x.get("loss_excerpt", []), y.get("loss_excerpt", []), strict=False)
    moved = sum(m != n for m, n in values)
    targets = Cause(
        "Other targets (labels)",
        f"the gradients of all samples differ, of the first one {moved} values.", "targets",
    )  # fmt: skip
    loss = Cause(
        "Another loss: label smoothing, class weights, softmax applied twice",
        "the gradients of all samples differ, and by no common factor.", "loss",
    )  # fmt: skip
    return [targets, loss] if moved == 2 else [loss, targets]


def _factor_cause(factor: float, shape: list[int], counts: tuple[int, int]) -> Cause:
    """Name what multiplies a loss by that factor."""
    said = f"B's gradient is {factor:.6g} times A's, in every value."
    whole = max(factor, 1 / factor)
    if counts[0] != counts[1] and near(factor, counts[0] / counts[1]):
        said += f" A makes a step from {counts[0]} batches, B from {counts[1]}."
        return Cause("Gradients of several batches are accumulated on one side", said,
                     "accumulation")  # fmt: skip
    if any(count > 1 and near(whole, count) for count in (*shape[:1], math.prod(shape))):
        said += f" The network's output is {'x'.join(map(str, shape))}."
        return Cause("reduction='sum' on one side, 'mean' on the other", said, "reduction")
    if whole >= 1024 and near(math.log2(whole), round(math.log2(whole))):
        return Cause("A loss that is scaled for float16", said, "precision")
    if whole < 1024 and near(whole, round(whole)):
        said += " Accumulation, or the average over devices, divides by such a number."
        return Cause(f"The loss is divided by {round(whole)} on one side", said, "accumulation")
    return Cause("A loss with another weight", said, "loss")
