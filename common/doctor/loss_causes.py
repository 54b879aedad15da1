"""The causes of a difference in the loss, which a trace has as its gradient at the output."""

import math
from typing import Any

import numpy as np

from .causes_network import FROZEN, rounding_causes
from .evidence import (
    Cause,
    Found,
    common_factor,
    differ,
    is_power_of_two,
    is_rounding,
    named,
    near,
    shown,
    size,
)
from .files import Line
from .losses import (
    Loss,
    Rows,
    clamped,
    focal,
    is_broadcast,
    is_likelihood_of_probabilities,
    is_sigmoid_twice,
    is_sign,
    is_softmax_twice,
    recognize,
    row_factors,
    temperature,
)
from .run import Run, losses, same_losses

COUNT = "A mean over another count (of tokens, samples or batches)"
TERM = "One term of the loss has another weight, or another formula"
BROADCAST = "Shapes broadcast in the loss: (n, 1) against (n)"
TARGETS = "Other targets (labels)"
UNKNOWN = "Other targets, or another loss"


def loss_causes(
    a: Run, b: Run, x: Line, y: Line, p: Line, q: Line, ours: list[Line], theirs: list[Line]
) -> Found:
    """Say how the losses of equal outputs differ; `p`, `q` are passes of `ours`, `theirs`."""
    both = [s for s in p["loss"] if s in q["loss"]]
    unlike = [s for s in both if differ(p["loss"][s], q["loss"][s])]
    if not unlike:
        return _other_outputs(x, y, p, q)
    one, other = p["loss"][unlike[0]], q["loss"][unlike[0]]
    how_far = size(one, other)
    rounding = all(is_rounding(size(p["loss"][s], q["loss"][s]), p["loss"][s], q["loss"][s])
                   for s in unlike)  # fmt: skip
    counts = len(x["backwards"]), len(y["backwards"])
    types = [sorted({t for back in step["backwards"] for t in back["types"]}) for step in (x, y)]
    if types[0] != types[1] and counts[0] == counts[1]:
        said = f"it is {' and '.join(types[0])} in A, {' and '.join(types[1])} in B."
        causes = [Cause("The loss is computed in another type of number", said, "precision")]
    elif rounding:
        causes = rounding_causes(a, b, p, q)
        if counts[0] != counts[1]:
            said = f"A made {counts[0]} backward passes, B {counts[1]}; their sum is the same."
            causes = [Cause(causes[0].name, said)]
    else:
        equal = [s for s in both if s not in unlike]
        causes = _causes(p, q, unlike, equal, ours, theirs)
        said = _values(x, y) + _passes_before(p, q) * (causes[0].name == UNKNOWN)
        if same_losses(x, y):
            where = f"{p['module'] or 'the network'}'s {shown(unlike[0]).removeprefix('the ')}"
            more = f"the gradient at {where} differs; the loss that it comes from does not."
            others = [cause for cause in causes if cause.name != UNKNOWN]
            causes = [Cause(FROZEN, more, "frozen"), *others]
        if said and causes:
            causes[0] = Cause(causes[0].name, causes[0].evidence + said, causes[0].page)
    return Found("loss", shown(unlike[0]), causes, len(unlike) - 1, how_far, rounding)


def _values(x: Line, y: Line) -> str:
    """Say the losses themselves."""
    sums = []
    for step in (x, y):
        values = losses(step)
        if not values or None in values:
            return ""
        sums.append(" + ".join(f"{v:.6g}" for v in values[:3]) + (" ..." if values[3:] else ""))
    return f" The loss is {sums[0]} in A, {sums[1]} in B."


def _passes_before(p: Line, q: Line) -> str:
    """Say that one run alone made forward passes without gradients, as for targets of a loss."""
    one, other = (record["evaluation"]["batches"] for record in (p, q))
    said = f" Before, A made {one} forward passes without gradients, B {other}."
    return said if one != other else ""


def _other_outputs(x: Line, y: Line, p: Line, q: Line) -> Found:
    path = sorted(p["loss"].keys() ^ q["loss"].keys())[0]
    who = "A" if path in p["loss"] else "B"
    said = f"only {who}'s loss depends on {shown(path)}; the gradients at the others are equal."
    cause = Cause("A term of the loss is missing on one side", said, "loss")
    if same_losses(x, y):
        said = f"only in {who} a gradient comes to {shown(path)} of {p['module'] or 'the network'};"
        cause = Cause(FROZEN, f"{said} the loss is the same.{_values(x, y)}", "frozen")
    return Found("loss", f"{shown(path)}, which only {who}'s loss uses", [cause])


def _causes(
    p: Line, q: Line, unlike: list[str], equal: list[str], ours: list[Line], theirs: list[Line]
) -> list[Cause]:
    factors = [common_factor(p["loss"][s], q["loss"][s]) for s in unlike]
    first = factors[0]
    if not equal and first and all(f and near(f, first) for f in factors):
        return _factor(first, unlike[0], p, ours, theirs)
    causes: list[Cause] = []
    for path, factor in zip(unlike, factors, strict=True):
        if not factor:
            causes = _recognized(p, q, path)
            break
    if len(unlike) + len(equal) == 1:
        return causes or [_unknown(p, q, unlike[0])]
    said = f"the gradients at {_list(equal)} are equal, at {_list(unlike)} not." if equal else ""
    for path, factor in zip(unlike, factors, strict=True):
        if factor:
            said += f" At {shown(path)} B's is {factor:.6g} times A's."
    term = Cause(TERM, said.strip() or f"the gradients at {_list(unlike)} differ, each otherwise.",
                 "loss")  # fmt: skip
    if causes and causes[0].name not in (UNKNOWN, TERM):
        where = f"{causes[0].evidence} That is at {_list(unlike)}."
        return [Cause(causes[0].name, where, causes[0].page), term]
    if all(factors):
        return [term]
    other = Cause(UNKNOWN, "nothing tells these two apart.", "loss")
    return [term, other] if equal or any(factors) else [other, term]


def _list(paths: list[str]) -> str:
    return " and ".join(shown(s) for s in paths[:3]) + (" ..." if paths[3:] else "")


def _factor(factor: float, path: str, p: Line, ours: list[Line], theirs: list[Line]) -> list[Cause]:
    """Name what multiplies the whole loss by that factor."""
    shape = p["loss"][path].get("shape") or []
    said = f"B's gradient is {factor:.6g} times A's, in every value."
    whole = max(factor, 1 / factor)
    counts = len(ours), len(theirs)
    others = [_factor_of(one, other) for one, other in zip(ours, theirs, strict=False)]
    known = [f for f in others if f]
    if counts[0] != counts[1] and near(factor, counts[0] / counts[1], 1e-4):
        said += f" A makes a step from {counts[0]} batches, B from {counts[1]}."
        return [Cause("Gradients of several batches are accumulated on one side", said,
                      "accumulation")]  # fmt: skip
    numbers = _counts(p, path, ours)
    if any(not near(f, factor, 1e-4) for f in known):
        said = "within one step, B's gradient is " + ", then ".join(f"{f:.6g}" for f in known[:4])
        said += f" times A's.{_explained(factor, numbers)}"
        return [Cause(f"{COUNT}: the factor changes with each batch", said, "mean-of-means")]
    product = math.prod(shape)
    if any(n > 1 and near(whole, n, 1e-4) for n in (*shape[:1], product, numbers.get("here", 0))):
        said += f" The network's output is {'x'.join(map(str, shape))}."
        count = numbers.get("here", 0)
        if count not in (0, product, *shape[:1]):
            said += f" {count:,} rows of it have a gradient."
        sums = Cause("reduction='sum' on one side, 'mean' on the other", said, "reduction")
        return [sums]
    if whole >= 1024 and is_power_of_two(whole):
        return [Cause("A loss that is scaled for float16", said, "precision")]
    if whole < 1024 and near(whole, round(whole), 4e-6 * max(1, whole / 8)):
        said += " Accumulation, or the average over devices, divides by such a number."
        return [Cause(f"The loss is divided by {round(whole)} on one side", said, "accumulation")]
    if more := _explained(factor, numbers):
        return [Cause(COUNT, said + more, "mean-of-means")]
    weight = Cause("A loss with another weight", said, "loss")
    also = f"{said} Trace several batches a step to see whether it changes with each."
    return [weight, Cause(COUNT, also, "mean-of-means")]


def _factor_of(p: Line, q: Line) -> float | None:
    for path in p["loss"]:
        if path in q["loss"]:
            if not differ(p["loss"][path], q["loss"][path]):
                return 1.0
            return common_factor(p["loss"][path], q["loss"][path])
    return None


def _counts(p: Line, path: str, ours: list[Line]) -> dict[str, float]:
    """Return by what a mean may divide: rows with a gradient, all rows, the same of the step."""

    def rows(record: Line) -> tuple[int, int]:
        values = record["loss values"].get(path, {"rows": [], "of": 0})
        if len(values["rows"]) < values["of"]:
            return 0, 0
        return sum(any(row) for row in values["rows"]), values["of"]

    every = [rows(record) for record in ours]
    here = rows(p)
    batch = (p["loss"][path].get("shape") or [0])[0]
    found = {"here": here[0], "rows": here[1], "batch": batch,
             "of the step": sum(n for n, _ in every) / max(1, len(every)),
             "rows of the step": sum(n for _, n in every) / max(1, len(every))}  # fmt: skip
    return {name: n for name, n in found.items() if n > 0}


def _explained(factor: float, numbers: dict[str, float]) -> str:
    words = {"here": "the rows with a gradient in this batch", "rows": "all rows of this batch",
             "batch": "its samples", "of the step": "the average of such rows over the step",
             "rows of the step": "the average of all rows over the step"}  # fmt: skip
    for one, n in numbers.items():
        for other, m in numbers.items():
            if n != m and near(factor, n / m, 1e-4):
                return (f" That is {n:g} / {m:g}: A divides by {words[one]}, B by "
                        f"{words[other]}.")  # fmt: skip
    return ""


def _tables(p: Line, q: Line, path: str) -> list[tuple[Rows, Rows, Rows]]:
    """Return outputs and both gradients as rows of classes: classes may also be the second axis."""
    sides = p["values"].get(path), p["loss values"].get(path), q["loss values"].get(path)
    if not all(side and side["rows"] for side in sides):
        return []
    z, g, h = (np.array(side["rows"], float) for side in sides if side)
    if not z.shape == g.shape == h.shape:
        return []
    shape = p["outputs"][path]["shape"]
    if len(shape) < 3 or z.size != math.prod(shape):
        return [(z, g, h)]
    moved = [np.moveaxis(x.reshape(shape), 1, -1).reshape(-1, shape[1]) for x in (z, g, h)]
    return [(z, g, h), (moved[0], moved[1], moved[2])]


def _recognized(p: Line, q: Line, path: str) -> list[Cause]:
    """Look at the values of outputs and gradients; return no cause where they tell nothing."""
    tables = _tables(p, q, path)
    if not tables:
        return []
    known = [t for t in tables if recognize(t[0], t[1]) or recognize(t[0], t[2])]
    z, g, h = (known or tables)[0]
    ours, theirs = recognize(z, g), recognize(z, h)
    if z.shape[1] == 1 and not (ours and theirs):
        for mine, yours, who in ((h, g, "B"), (g, h, "A")):
            if is_broadcast(z, mine, yours):
                said = f"in {who} a sample's gradient grows with its output, whatever its own "
                said += f"target is; the output is {named(p['outputs'][path])}."
                return [Cause(BROADCAST, said, "loss")]
    for this, gradient, who in ((ours, h, "B"), (theirs, g, "A")):
        if this and (cause := _twice(z, gradient, this, who)):
            return [cause]
    factors = row_factors(g, h)
    if cause := _other_formula(z, g, h, ours, theirs):
        return [cause]
    is_class = any(known and "cross" in known.name for known in (ours, theirs))
    is_token = is_class or len(p["outputs"][path]["shape"]) > 2
    if cause := _rows_that_count(g, h, factors, is_token):
        return [cause]
    if ours and theirs and ours.name == theirs.name:
        if cause := _same_function(ours, theirs, len(z)):
            return [cause]
    elif ours and theirs:
        said = f"{ours.name} in A, {theirs.name} in B, by their gradients."
        return [Cause(f"Another loss: {ours.name} in A, {theirs.name} in B", said, "loss")]
    if factors is not None and len(factors) > 1:
        distinct = sorted({round(float(f), 4) for f in factors})
        said = "B's gradient is that of A, times another factor for each row: "
        said += ", ".join(f"{f:g}" for f in distinct[:4]) + (" ..." if distinct[4:] else ".")
        return [Cause("Other weights of samples, tokens or classes in the loss", said, "loss")]
    equal = int((g == h).all(1).sum())
    if len(g) // 2 < equal < len(g):
        said = f"{equal} of {len(g)} rows (samples or tokens) have the same gradient."
        return [Cause(f"{TARGETS} for some samples", said, "targets")]
    if ours or theirs:
        one, who, other = (ours, "A", "B") if ours else (theirs, "B", "A")
        said = f"{who}'s gradient is that of {one.name if one else '?'}, {other}'s is not."
        return [Cause("Another loss", said, "loss"), Cause(UNKNOWN, said, "targets")]
    return []


def _twice(z: Rows, gradient: Rows, known: Loss, who: str) -> Cause | None:
    """Hold a gradient against usual mistakes, with the labels that the other side's tells."""
    if is_softmax_twice(z, gradient, known.labels):
        said = f"{who}'s gradient is that of a cross entropy whose input is softmax(output)."
        return Cause(f"Another loss: softmax is applied twice in {who}", said, "loss")
    if is_likelihood_of_probabilities(z, gradient, known.labels):
        said = f"{who}'s gradient is that of nll_loss(softmax(output)), without a logarithm."
        return Cause(f"Another loss: probabilities without their logarithm in {who}", said, "loss")
    if is_sigmoid_twice(z, gradient, known.labels):
        said = f"{who}'s gradient is that of logits that went through sigmoid before."
        return Cause(f"Another loss: sigmoid is applied twice in {who}", said, "loss")
    return None


def _other_formula(
    z: Rows, g: Rows, h: Rows, ours: Loss | None, theirs: Loss | None
) -> Cause | None:
    """Hold both gradients against usual formulas of the same errors, or of the same labels."""
    for one, other, who, its in ((g, h, "A", "B"), (h, g, "B", "A")):
        if limit := clamped(one, other):
            said = f"{who}'s gradient is {its}'s times a factor, but no larger than {limit:.4g}."
            return Cause(f"Another loss: Huber or smooth L1 in {who}, squared error in {its}", said,
                         "loss")  # fmt: skip
        if is_sign(one, other):
            said = f"{who}'s gradients have one magnitude, and the signs of {its}'s."
            return Cause(f"Another loss: absolute error in {who}, squared error in {its}", said,
                         "loss")  # fmt: skip
    gammas = [focal(z, known) if known else 0.0 for known in (ours, theirs)]
    if gammas[0] != gammas[1]:
        said = "by how the gradient of a sample falls with the probability of its label, gamma is "
        said += f"{gammas[0]:g} in A, {gammas[1]:g} in B; 0 is plain cross entropy."
        return Cause("Another loss: a focal loss, or another gamma", said, "loss")
    for known, gradient, who in ((ours, h, "B"), (theirs, g, "A")):
        if ours and theirs:
            break  # both are without one
        divisor = temperature(z, gradient, known.labels) if known else None
        if divisor:
            said = f"{who}'s gradient is that of a cross entropy of output / {divisor:.4g}."
            return Cause(f"Another loss: a temperature, or a scale, of the logits in {who}", said,
                         "loss")  # fmt: skip
    return None


def _rows_that_count(g: Rows, h: Rows, factors: Rows | None, is_token: bool) -> Cause | None:
    """Look for rows that have a gradient on one side alone, as padding does without a mask."""
    counts = g.any(1), h.any(1)
    only = [int((counts[0] & ~counts[1]).sum()), int((counts[1] & ~counts[0]).sum())]
    if not any(only) or all(only):
        return None
    who, other = ("A", "B") if only[0] else ("B", "A")
    if factors is None and not _is_factor(g, h, counts[0] & counts[1]):
        return None
    said = f"{sum(only)} of {len(g)} rows (samples or tokens) have a gradient in {who}, and none "
    said += f"in {other}; the others have the same, or the same times a factor."
    if not is_token:
        return Cause(f"Some samples do not count in {other}'s loss: other targets, a margin, or "
                     "a mask", said, "targets")  # fmt: skip
    return Cause(f"Padding, or a mask, does not count in {other}'s loss (ignore_index)", said,
                 "loss")  # fmt: skip


def _is_factor(g: Rows, h: Rows, where: Any) -> bool:
    x, y = g[where], h[where]
    if not x.size:
        return False
    scale = float((x * y).sum() / max((x * x).sum(), 1e-300))
    return bool(np.abs(y - scale * x).max() <= 1e-3 * np.abs(y).max())


def _same_function(ours: Loss, theirs: Loss, count: int) -> Cause | None:
    """Tell two losses of one kind apart: by targets, smoothing, or weights."""
    unlike = int((ours.labels != theirs.labels).sum())
    if unlike:
        place = tuple(np.argwhere(ours.labels != theirs.labels)[0])
        said = f"{unlike} of {ours.labels.size} targets differ, by their gradients: the first is "
        said += f"{int(ours.labels[place])} in A, {int(theirs.labels[place])} in B."
        name = TARGETS if unlike == ours.labels.size else f"{TARGETS} for some samples"
        return Cause(name, said, "targets")
    if ours.smoothing != theirs.smoothing:
        said = f"it is {ours.smoothing:g} in A, {theirs.smoothing:g} in B, by the gradients."
        return Cause("Another loss: label smoothing", said, "loss")
    if cause := _weights_of_columns(ours, theirs):
        return cause
    ratio = theirs.scales[ours.scales != 0] / ours.scales[ours.scales != 0]
    if not ratio.size or np.ptp(ratio) <= 1e-3 * ratio.max():
        return None
    kinds = ours.labels[ours.scales != 0]
    by_class = {int(k): ratio[kinds == k] for k in np.unique(kinds)}
    if all(np.ptp(r) <= 1e-3 * r.max() for r in by_class.values()) and len(by_class) > 1:
        said = "B's gradient relative to A's depends on the class: "
        said += ", ".join(f"{r[0]:.4g} for {k}" for k, r in list(by_class.items())[:4]) + "."
        return Cause("Another loss: weights of the classes (weight, pos_weight)", said, "loss")
    said = f"B's gradient is between {ratio.min():.4g} and {ratio.max():.4g} times A's, by row."
    return Cause("Other weights of samples, tokens or classes in the loss", said, "loss")


def _weights_of_columns(ours: Loss, theirs: Loss) -> Cause | None:
    """Look for a weight of each class, where each column is a question of its own."""
    if ours.labels.ndim < 2 or ours.labels.shape[1] < 2 or (ours.scales == 0).any():
        return None
    ratio = theirs.scales / ours.scales
    groups = [ratio[:, n][ours.labels[:, n] == label] for n in range(ratio.shape[1])
              for label in (0, 1)]  # fmt: skip
    groups = [group for group in groups if len(group)]
    if np.ptp(ratio) <= 1e-3 * ratio.max() or max(map(len, groups)) < 2:
        return None
    if any(np.ptp(group) > 1e-3 * group.max() for group in groups):
        return None
    means = sorted({round(float(group.mean()), 3) for group in groups})
    said = "B's gradient relative to A's depends on the class and its target alone: "
    said += ", ".join(f"{m:g}" for m in means[:4]) + (" ..." if means[4:] else ".")
    return Cause("Another loss: weights of the classes (weight, pos_weight)", said, "loss")


def _unknown(p: Line, q: Line, path: str) -> Cause:
    ours, theirs = p["loss"][path], q["loss"][path]
    same_places = ours.get("zeros") == theirs.get("zeros") and ours.get("zeros")
    said = "the gradients differ by no common factor, and fit no loss that is known"
    said += "; as many values are 0 in both." if same_places else "."
    said += " If the targets come from a second network, watch that one on both sides, too."
    return Cause(UNKNOWN, said, "targets")
