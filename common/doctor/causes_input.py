"""The causes of a difference before the forward pass: in the initial weights, or in a batch.

Like its neighbours, it looks at the same part of both traces. The causes come in the order in which
they fit; each says what it saw, so that a reader can judge it.
"""

import math
import sys

import numpy as np

from .evidence import Cause, Found, differ
from .files import Line, Run


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


def _ratio(one: Line, other: Line) -> float:
    return other["norm"] / one["norm"] if one["norm"] else math.inf


def _is_constant(tensor: Line) -> bool:
    """Tell whether all values are equal, as the ones of a BatchNorm."""
    count = math.prod(tensor["shape"])
    return count > 1 and math.isclose(tensor["norm"] ** 2 * count, tensor["sum"] ** 2, rel_tol=1e-6)


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
