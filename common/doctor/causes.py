"""What differs between two runs, and the causes that fit: the catalogue of common.doctor.

Each check looks at the same part of both traces. The causes come in the order in which they fit;
each says what it saw, so that a reader can judge it.
"""

from common.trace import read

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What does not change an update, or is only a schedule's own note.
NOT_SETTINGS = {"params", "foreach", "fused", "capturable", "initial_lr", "max_lr", "min_lr",
                "base_momentum", "max_momentum", "swa_lr"}  # fmt: skip

# The largest difference, relative to the tensor, that another order of the same sums makes where
# all before was equal: some units in the last place. 64 of them are 8e-6 in single precision.
UNITS = 64

Line = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """A cause that fits: what it is, what speaks for it, and the page's section."""

    name: str
    evidence: str
    page: str = ""


@dataclass(frozen=True)
class Found:
    """A difference as the checks below return it; see Diagnosis."""

    stage: str
    what: str
    causes: list[Cause]
    others: int = 0
    size: float | None = None
    rounding: bool = False


@dataclass
class Run:
    """One trace: its first and last line, and those of the steps as they are written."""

    name: str
    head: Line
    steps: list[str]
    end: Line

    @classmethod
    def of(cls, path: Path | str, name: str) -> "Run":
        lines = read(path)
        return cls(name, json.loads(lines[0]), lines[1:-1], json.loads(lines[-1]))

    def step(self, index: int) -> Line:
        """Return the recorded step with that index, from 0."""
        return json.loads(self.steps[index])

    def every_step(self) -> Iterator[Line]:
        return (json.loads(line) for line in self.steps)


def tensors(
    stage: str, ours: Line, theirs: Line, find: Callable[[bool], list[Cause]],
    before: Line | None = None,
) -> Found | None:  # fmt: skip
    """Compare tensors by name; `before`, A's, makes the size that of the change, not of them."""
    if ours.keys() != theirs.keys():
        one_sided = sorted(ours.keys() ^ theirs.keys())
        what = f"{one_sided[0]}, which only {'A' if one_sided[0] in ours else 'B'} has"
        return Found(stage, what, find(False), len(one_sided) - 1)
    names = [name for name in ours if differ(ours[name], theirs[name])]
    if not names:
        return None
    pairs = [(ours[name], theirs[name]) for name in names]
    # All together: a gradient that is 0 but for rounding, as of a bias before BatchNorm, differs
    # by as much as it has.
    apart = math.hypot(*(_apart(*pair) for pair in pairs))
    how_far = apart / max(_total(ours), 1e-300)
    rounding = all(is_rounding(how_far, *pair) for pair in pairs)
    if before and before.keys() == ours.keys():
        how_far = apart / max(math.hypot(*(_apart(before[n], ours[n]) for n in ours)), 1e-300)
        rounding = rounding and how_far < 1e-2
    return Found(stage, names[0], find(rounding), len(names) - 1, how_far, rounding)


def differ(one: Line, other: Line) -> bool:
    return any(one.get(key) != other.get(key) for key in ("bits", "shape", "dtype"))


def size(one: Line, other: Line) -> float | None:
    """Return the norm of the difference relative to the first tensor's, by their sketches."""
    if not one or not other or one["shape"] != other["shape"]:
        return None
    return _apart(one, other) / max(one["norm"], 1e-300)


def _apart(one: Line, other: Line) -> float:
    """Return the norm of the difference of two tensors, estimated by their sketches."""
    if one["shape"] != other["shape"]:
        return math.inf
    return float(np.linalg.norm(np.subtract(one["sketch"], other["sketch"])))


def is_rounding(how_far: float | None, one: Line, other: Line) -> bool:
    """Tell whether a relative difference is as small as another order of the same sums makes it."""
    if how_far is None or one["dtype"] != other["dtype"]:
        return False
    dtype = getattr(torch, one["dtype"])
    return dtype.is_floating_point and how_far <= UNITS * torch.finfo(dtype).eps


def weights_before(run: Run, index: int) -> Line:
    """Return the weights before a recorded step, of the recorded step before it."""
    return run.step(index - 1)["weights"] if index else run.head["start"]


def _total(tensors: Line) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(t["norm"] ** 2 for t in tensors.values()))


def named(tensor: Line) -> str:
    return f"{'x'.join(map(str, tensor['shape']))}, {tensor['dtype']}"


def other_network(ours: Line, theirs: Line) -> Found | None:
    """Compare the parameters' names and shapes."""
    a, b = ({name: t["shape"] for name, t in tensors.items()} for tensors in (ours, theirs))
    if a == b:
        return None
    one_sided = sorted(a.keys() ^ b.keys())
    names = one_sided or [name for name in a if a[name] != b[name]]
    said = f"{names[0]}: {a.get(names[0], 'none')} in A, {b.get(names[0], 'none')} in B."
    cause = Cause("Another network", said, "layer")
    if sorted(map(str, a.values())) == sorted(map(str, b.values())):
        cause = Cause("Layers in another order", f"all shapes are in both, elsewhere; {said}",
                      "seed-and-layers")  # fmt: skip
    return Found("start", f"shape of {names[0]}", [cause], len(names) - 1)


def start_causes(a: Run, b: Run, rounding: bool) -> list[Cause]:
    ours, theirs = a.head["start"], b.head["start"]
    different = [n for n in ours if ours[n]["bits"] != theirs[n]["bits"]]
    drawn = [n for n in ours if ours[n]["norm"] and not _is_constant(ours[n])]
    if {t["bits"] for t in ours.values()} == {t["bits"] for t in theirs.values()}:
        said = "the same tensors have other names."
        return [Cause("Layers in another order", said, "seed-and-layers")]
    last = a.step(-1)["weights"], b.step(-1)["weights"]
    for run, trained, start in ((a, last[0], theirs), (b, last[1], ours)):
        if trained.keys() == start.keys() and not any(differ(trained[n], start[n]) for n in start):
            said = f"the other run starts with the weights with which {run.name} ends."
            return [Cause("A checkpoint was loaded", said)]
    ratios = [_ratio(ours[n], theirs[n]) for n in different]
    similar = all(0.5 < r < 2 for n, r in zip(different, ratios, strict=True)
                  if math.prod(ours[n]["shape"]) > 64)  # fmt: skip
    share = f"{len(different)} of {len(ours)} tensors differ, and those that are drawn"
    seed = Cause(
        "Another seed, or random numbers drawn before the network was built",
        f"{share} have about the same norms.", "seed-and-layers",
    )  # fmt: skip
    if similar and len(different) < len(drawn):
        cause = Cause(
            "Random numbers drawn between the layers, or layers built in another order",
            f"{len(drawn) - len(different)} tensors are equal, such as "
            f"{next(n for n in drawn if n not in different)}; {different[0]} is not.",
            "seed-and-layers",
        )
        return [cause, seed]
    if similar:
        return [seed]
    said = f"norms differ: {different[0]} {ours[different[0]]['norm']:.4g} in A, "
    said += f"{theirs[different[0]]['norm']:.4g} in B."
    return [Cause("Another initialization, or pretrained weights on one side", said), seed]


def batch_causes(a: Run, b: Run, index: int, place: int, x: Line, y: Line) -> list[Cause]:
    one, other = x["inputs"][0], y["inputs"][0]
    if one["shape"][1:] != other["shape"][1:]:
        said = f"a sample has the shape {one['shape'][1:]} in A and {other['shape'][1:]} in B."
        return [Cause("Samples of another shape", said)]
    rows = [[r["rows"] for line in run.every_step() for r in line["batches"]] for run in (a, b)]
    here = sum(len(line["batches"]) for line in map(a.step, range(index))) + place
    mine, yours = x["rows"], y["rows"]
    if len(mine) != len(yours):
        return _other_batch_size(rows, here, mine, yours)
    if sorted(mine) == sorted(yours):
        said = f"all {len(mine)} samples are the same ones."
        return [Cause("The same samples in another order within the batch", said, "order")]
    seen = [{row for batch in run for row in batch} for run in rows]
    common = sum(row in seen[1] for row in mine)
    if common * 2 > len(mine) and sum(m == y for m, y in zip(mine, yours, strict=True)) == 0:
        return _other_order(a, b, rows, here, mine, yours, common)
    return _other_values(one, other, x, y, mine, yours, common)


def _other_batch_size(rows: list, here: int, mine: list, yours: list) -> list[Cause]:
    said = f"{len(mine)} samples in A, {len(yours)} in B."
    if here and len(rows[0][here - 1]) == len(rows[1][here - 1]):
        short = "A" if len(mine) < len(yours) else "B"
        last = f"{said} The batches before were equally large; the short one is {short}'s."
        cause = Cause("The last batch of an epoch is dropped on one side (drop_last)", last,
                      "mean-of-means")  # fmt: skip
        return [cause, Cause("Another batch size", said)]
    whole = mine[: len(yours)] == yours[: len(mine)]
    order = " The smaller batch is the larger one's beginning." if whole else ""
    return [Cause("Another batch size", said + order, "batch-size-and-devices")]


def _other_order(
    a: Run, b: Run, rows: list, here: int, mine: list, yours: list, common: int
) -> list[Cause]:
    share = f"{common} of {len(mine)} samples of A's batch come in B at another place"
    for run, own, other, name in ((rows[1], yours, rows[0], "B"), (rows[0], mine, rows[1], "A")):
        if own in run[:here] and other[here] not in other[:here]:
            said = f"{name}'s batch is that of its batch {run.index(own) + 1} again."
            return [Cause(f"set_epoch is missing in {name}: every epoch has the same order", said,
                          "set-epoch")]  # fmt: skip
    for shift in (1, 2, 3, -1, -2, -3):
        there = slice(max(here + shift, 0), here + shift + 2)
        if rows[1][there] and rows[0][here : here + 2] == rows[1][there]:
            ahead = "A is ahead" if shift > 0 else "B is ahead"
            said = f"{ahead} by {abs(shift)}: A's batch {here + 1} is B's {here + 1 + shift}."
            return [Cause("A batch was left out, or taken twice, on one side", said, "steps")]
    drawn = _first_random_difference(a, b)
    seed = Cause("Shuffled with another seed or generator, or not shuffled on one side",
                 f"{share}.", "order")  # fmt: skip
    if here == 0 or drawn > here + 1:
        generator = Cause("A loader with a generator of its own", f"{share}, after "
                          f"{here} equal batches.", "own-generator")  # fmt: skip
        return [generator, seed] if here else [seed]
    said = f"{share}; the random generators differ from step {drawn} on."
    validation = Cause("A validation, or something else, drew random numbers on one side", said,
                       "validation-and-order")  # fmt: skip
    return [validation, seed]


def _first_random_difference(a: Run, b: Run) -> int:
    """Return the first step in which the random generators differ; a large number if none."""
    for x, y in zip(a.every_step(), b.every_step(), strict=False):
        for one, other in zip(x["batches"], y["batches"], strict=False):
            if one["random"] != other["random"]:
                return x["step"]
    return sys.maxsize


def _other_values(
    one: Line, other: Line, x: Line, y: Line, mine: list, yours: list, common: int
) -> list[Cause]:
    equal = sum(m == n for m, n in zip(mine, yours, strict=True))
    if one["dtype"] != other["dtype"]:
        said = f"{one['dtype']} in A, {other['dtype']} in B."
        return [Cause("Another type of number", said, "scaling")]
    if said := _affine(x["excerpt"], y["excerpt"], one["shape"]):
        return [Cause("Another scaling or normalization", said, "scaling")]
    close = [math.isclose(one[k], other[k], rel_tol=1e-6, abs_tol=1e-6) for k in ("norm", "sum")]
    if all(close):
        said = f"sum and norm are equal, {len(mine) - equal} of {len(mine)} samples differ."
        return [Cause("The same values in other places: flipped, turned, or channels exchanged",
                      said, "augmentation")]  # fmt: skip
    if equal:
        said = f"{equal} of {len(mine)} samples are equal."
        return [Cause("Some samples are changed on one side, as by an augmentation", said,
                      "augmentation")]  # fmt: skip
    said = f"{common} of {len(mine)} samples of A's batch come anywhere in B."
    return [Cause("Other samples: another split or data set, or an augmentation", said, "split")]


def _affine(ours: list[float], theirs: list[float], shape: list[int]) -> str:
    """Say how B's values follow from A's by a factor and an offset, if they do; else ''."""
    a, b = np.array(ours), np.array(theirs)
    if len(a) < 4 or np.ptp(a) == 0:
        return ""
    channels = np.zeros(len(a), int)
    if len(shape) == 4:  # those of an image may have a scaling of their own each
        channels = np.linspace(0, math.prod(shape[1:]) - 1, len(a)).astype(int)
        channels //= math.prod(shape[2:])
    for groups, how in ((np.zeros(len(a), int), ""), (channels, " in the first channel")):
        fits = []
        for group in np.unique(groups):
            x, y = a[groups == group], b[groups == group]
            if len(x) < 4 or np.ptp(x) == 0:
                return ""
            factor, offset = np.polyfit(x, y, 1)
            if np.abs(factor * x + offset - y).max() > 1e-4 * (np.ptp(y) + 1e-12):
                break
            fits.append((factor, offset))
        else:
            return f"B's values are {fits[0][0]:.4g} times A's, {fits[0][1]:+.4g}{how}."
    return ""


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
        causes += _rounding_causes(a, b, x, y)
    said = f"batch and weights are equal; {what} is the first whose output differs."
    return "output", [*causes, Cause("Another computation in the network", said, "layer")]


def _rounding_causes(a: Run, b: Run, x: Line, y: Line) -> list[Cause]:
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
    factor = _factor(one, other)
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
    if counts[0] != counts[1] and _near(factor, counts[0] / counts[1]):
        said += f" A makes a step from {counts[0]} batches, B from {counts[1]}."
        return Cause("Gradients of several batches are accumulated on one side", said,
                     "accumulation")  # fmt: skip
    if any(count > 1 and _near(whole, count) for count in (*shape[:1], math.prod(shape))):
        said += f" The network's output is {'x'.join(map(str, shape))}."
        return Cause("reduction='sum' on one side, 'mean' on the other", said, "reduction")
    if whole >= 1024 and _near(math.log2(whole), round(math.log2(whole))):
        return Cause("A loss that is scaled for float16", said, "precision")
    if whole < 1024 and _near(whole, round(whole)):
        said += " Accumulation, or the average over devices, divides by such a number."
        return Cause(f"The loss is divided by {round(whole)} on one side", said, "accumulation")
    return Cause("A loss with another weight", said, "loss")


def gradient_causes(a: Run, b: Run, x: Line, y: Line, rounding: bool) -> list[Cause]:
    if rounding:
        return _rounding_causes(a, b, x["batches"][0], y["batches"][0])
    one_sided = sorted(x["fresh"].keys() ^ y["fresh"].keys())
    if one_sided:
        said = f"{len(one_sided)} parameters get a gradient in one run only, first {one_sided[0]}."
        return [Cause("Frozen or detached on one side (requires_grad, detach, no_grad)", said,
                      "frozen")]  # fmt: skip
    names = [n for n in x["fresh"] if differ(x["fresh"][n], y["fresh"][n])]
    factors = [_factor(x["fresh"][n], y["fresh"][n]) for n in names]
    if all(factors):
        said = f"B's gradient of {names[0]} is {factors[0]:.6g} times A's."
        return [Cause("A hook, or a part of the loss, scales gradients", said, "accumulation")]
    said = f"output and its gradient are equal; {len(names)} of {len(x['fresh'])} gradients differ."
    penalty = "A term of the loss that does not come from the output, as a penalty on weights"
    return [Cause(penalty, said, "weight-decay")]


def clipping_causes(x: Line, y: Line, rounding: bool) -> list[Cause]:
    """The backward passes gave the same: what was done to it before the step?"""
    norms = _total(x["used"]), _total(y["used"])
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
            if inverse > 1.5 and _near(inverse, round(inverse)):
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
        return _rounding_causes(a, b, x["batches"][0], y["batches"][0])
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


CHANGED_AFTERWARDS = Cause(
    "Weights were loaded after the last step, such as the best checkpoint's",
    "all steps are equal, and the weights at the end are not.", "best-or-last",
)  # fmt: skip


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


def _ratio(one: Line, other: Line) -> float:
    return other["norm"] / one["norm"] if one["norm"] else math.inf


def _factor(one: Line, other: Line) -> float | None:
    """Return f where the second tensor is f times the first, by their sketches; else None."""
    if one["shape"] != other["shape"] or not one["norm"] or not other["norm"]:
        return None
    x, y = np.array(one["sketch"]), np.array(other["sketch"])
    if not x @ x:
        return None
    factor = float(x @ y / (x @ x))
    close = np.abs(y - factor * x).max() <= 1e-5 * np.abs(y).max()
    return factor if close and factor and abs(factor - 1) > 1e-6 else None


def _near(number: float, other: float) -> bool:
    return math.isclose(number, other, rel_tol=1e-4)


def _is_constant(tensor: Line) -> bool:
    """Tell whether all values are equal, as the ones of a BatchNorm."""
    count = math.prod(tensor["shape"])
    return count > 1 and math.isclose(tensor["norm"] ** 2 * count, tensor["sum"] ** 2, rel_tol=1e-6)
