"""The causes of another batch: other samples, in another order, or with other values."""

import math
import sys
from collections.abc import Callable

import numpy as np

from .evidence import Cause, bits, size
from .files import Line
from .run import Run, training


def batch_causes(
    a: Run, b: Run, index: int, p: Line, q: Line, one: Line, other: Line
) -> list[Cause]:
    """Name the causes where the samples differ that a forward pass got."""
    if one["shape"][1:] != other["shape"][1:]:
        return _other_shape(one, other, _sample(p), _sample(q))
    rows = [[r["rows"] for line in run.every_step() for r in _like(p, line)]
            for run in (a, b)]  # fmt: skip
    here = _before(a, index, p, lambda step: _like(p, step))
    mine, yours = p["rows"], q["rows"]
    for who, run, rest in (("A", a, yours), ("B", b, mine)):
        if any(r.get("rows") == rest and not r["loss"] for r in run.step(index)["passes"]):
            said = f"{who} made a forward pass of the other's batch, and no backward pass."
            return [Cause(f"A batch makes no step in {who}: it was skipped, as where training_step "
                          "returns None", said, "steps")]  # fmt: skip
    if len(mine) != len(yours):
        return _other_passes(a, b, index, p) or _other_batch_size(rows, here, mine, yours)
    if sorted(mine) == sorted(yours):
        said = f"all {len(mine)} samples are the same ones."
        return [Cause("The same samples in another order within the batch", said, "order")]
    seen = [{row for batch in run for row in batch} for run in rows]
    common = max(sum(row in seen[1] for row in mine), sum(row in seen[0] for row in yours))
    equal = sum(m == n for m, n in zip(mine, yours, strict=True))
    # Of few different samples, as of single numbers, some meet by chance.
    if common * 2 > len(mine) and equal * 2 < len(mine) and common > equal:
        return _other_order(a, b, rows, here, mine, yours, common)
    return _other_values(one, other, p, q, mine, yours, common)


def _like(p: Line, step: Line) -> list[Line]:
    """Return a step's passes through the same module: others get other samples."""
    return [r for r in training(step) if "rows" in r and r["module"] == p["module"]]


def _before(run: Run, index: int, p: Line, passes: Callable[[Line], list[Line]]) -> int:
    """Return how many of a run's passes of one kind came before `p`, which is in that step."""
    earlier = sum(len(passes(run.step(n))) for n in range(index))
    return earlier + sum(r["begin"] < p["begin"] for r in passes(run.step(index)))


def _sample(record: Line, path: str = "") -> list[float]:
    """Return values of the first sample that an argument has; of the batch itself by default."""
    samples = record["samples"]
    found = samples.get(path or next(iter(samples), ""), {"rows": []})
    return [x for row in found["rows"] for x in row]


def argument_causes(a: Run, b: Run, index: int, p: Line, q: Line, path: str) -> list[Cause]:
    """Name the causes where an argument differs of which the samples are not recorded."""
    one, other = p["inputs"][path], q["inputs"][path]
    ours, theirs = _sample(p, path), _sample(q, path)
    if ours and theirs:
        if one["shape"][1:] != other["shape"][1:]:
            return _other_shape(one, other, ours, theirs)
        if cause := _shifted(one, ours, theirs):
            return [cause]
    every = [[bits(r["inputs"][path]) for line in run.every_step() for r in _given(p, line, path)]
             for run in (a, b)]  # fmt: skip
    here = _before(a, index, p, lambda step: _given(p, step, path))
    for who, mine, yours in (("A", *every), ("B", *reversed(every))):
        if not here < min(len(mine), len(yours)):
            break
        if mine[here] in mine[:here] and yours[here] not in yours[:here]:
            said = f"{who}'s {path} is that of its batch {mine.index(mine[here]) + 1} again, the "
            said += f"other run's is a new one; {here} were equal before."
            name = f"{path} begins again in {who}: an epoch has another number of batches, as "
            return [Cause(f"{name}where several loaders are joined", said, "steps")]
    if cause := _ahead(every[0], every[1], here):
        return [cause]
    said = f"all arguments before {path} are equal."
    return [Cause(f"Another value of the argument {path}", said)]


def _given(p: Line, step: Line, path: str) -> list[Line]:
    """Return a step's passes through the same module that got that argument."""
    return [r for r in training(step) if r["module"] == p["module"] and path in r["inputs"]]


def _shifted(one: Line, ours: list[float], theirs: list[float]) -> Cause | None:
    for by in range(1, len(ours) // 2 + 1):
        for first, second, who in ((ours, theirs, "B"), (theirs, ours, "A")):
            part = first[by:]
            if len(one["shape"]) == 2 and len(set(part)) > 3 and part == second[:-by]:
                said = f"of the first sample, {who}'s values are those of the other from number "
                said += f"{by + 1} on."
                many = "one" if by == 1 else str(by)
                return Cause(
                    f"The sequences are shifted by {many} in {who}, or cut elsewhere", said
                )
    return None


def _other_shape(one: Line, other: Line, ours: list[float], theirs: list[float]) -> list[Cause]:
    said = f"a sample has the shape {one['shape'][1:]} in A and {other['shape'][1:]} in B"
    short, long = sorted((ours, theirs), key=len)
    who = "A" if len(ours) > len(theirs) else "B"
    if len(one["shape"]) == len(other["shape"]) == 2 and 0 < len(short) < len(long):
        for rest, kept in ((long[len(short) :], long[: len(short)]),
                           (long[: -len(short)], long[-len(short) :])):  # fmt: skip
            if kept == short and len(set(rest)) == 1:
                more = f"{said}; {who} has {len(rest)} times {rest[0]:g} more."
                return [Cause("The samples are padded to another length", more)]
            if kept == short:
                return [Cause("The samples are cut to another length", f"{said}.")]
    if math.prod(one["shape"][1:]) == math.prod(other["shape"][1:]) and ours == theirs:
        said += ", with the same values"
    return [Cause("Samples of another shape", f"{said}.")]


def _other_passes(a: Run, b: Run, index: int, p: Line) -> list[Cause]:
    """Look whether one run's passes of a step got together what the other's got in fewer."""
    every = [[r["rows"] for r in _like(p, run.step(index))] for run in (a, b)]
    whole = [sorted(row for batch in side for row in batch) for side in every]
    if whole[0] != whole[1] or len(every[0]) == len(every[1]):
        return []
    said = f"all {len(whole[0])} samples of the step are the same ones: {len(every[0])} forward "
    said += f"passes in A, {len(every[1])} in B. BatchNorm takes its averages over each of them."
    return [Cause("The same samples in another number of forward passes", said,
                  "batch-size-and-devices")]  # fmt: skip


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
    share = f"{common} of {len(mine)} samples of a batch come in the other run at another place"
    for run, own, other, name in ((rows[1], yours, rows[0], "B"), (rows[0], mine, rows[1], "A")):
        if own in run[:here] and other[here] not in other[:here]:
            said = f"{name}'s batch is that of its batch {run.index(own) + 1} again."
            known = {row for batch in run + other[:here] for row in batch}
            if not known & set(other[here]):
                who = "A" if name == "B" else "B"
                said += f" No sample of {who}'s comes anywhere before."
                again = f"Samples that come again are others in {who}, not in {name}: changed in "
                again += "place, or drawn once and kept"
                return [Cause(again, said, "augmentation")]
            return [Cause(f"set_epoch is missing in {name}: every epoch has the same order", said,
                          "set-epoch")]  # fmt: skip
    if cause := _ahead(rows[0], rows[1], here):
        return [cause]
    seen = [_again(run) for run in rows]
    for who, its, other in (("A", seen[0], seen[1]), ("B", seen[1], seen[0])):
        if said := _replaced(its, other):
            return [Cause(f"The samples are drawn with replacement in {who} (a sampler)", said,
                          "order")]  # fmt: skip
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


def _ahead(ours: list, theirs: list, here: int) -> Cause | None:
    """Look whether two batches from `here` on are those of the other run some batches away."""
    for shift in (1, 2, 3, -1, -2, -3):
        there = slice(max(here + shift, 0), here + shift + 2)
        for who, other, one, its in (("A", "B", ours, theirs), ("B", "A", theirs, ours)):
            if its[there] and one[here : here + 2] == its[there]:
                said = f"{who if shift > 0 else other} is ahead by {abs(shift)}: {who}'s batch "
                said += f"{here + 1} is {other}'s {here + 1 + shift}."
                return Cause("A batch was left out, or taken twice, on one side", said, "steps")
    return None


def _again(batches: list[list[str]]) -> list[bool]:
    """Tell of each sample whether it came before."""
    seen: set[str] = set()
    found = []
    for row in (row for batch in batches for row in batch):
        found.append(row in seen)
        seen.add(row)
    return found


def _replaced(its: list[bool], other: list[bool]) -> str:
    """Say how many samples come again while the other run's are new, and others are new still.

    A few may be in the data twice; and where an epoch is shorter, all come again after it.
    """
    thirds = [[n for n, is_again in enumerate(run) if is_again][2:3] for run in (its, other)]
    whole = min(len(its), *thirds[1], len(other))
    count = sum(its[:whole])
    rest = its[thirds[0][0] : whole] if thirds[0] else []
    if count < max(5, whole // 10) or rest.count(False) < 0.3 * len(rest):
        return ""
    return f"of the first {whole:,} samples {count:,} came before; in the other run nearly none."


def _first_random_difference(a: Run, b: Run) -> int:
    """Return the first step in which the random generators differ; a large number if none."""
    for x, y in zip(a.every_step(), b.every_step(), strict=False):
        for one, other in zip(training(x), training(y), strict=False):
            if one["random"] != other["random"]:
                return x["step"]
    return sys.maxsize


def _other_values(
    one: Line, other: Line, p: Line, q: Line, mine: list, yours: list, common: int
) -> list[Cause]:
    equal = sum(m == n for m, n in zip(mine, yours, strict=True))
    if one["dtype"] != other["dtype"]:
        said = f"{one['dtype']} in A, {other['dtype']} in B."
        return [Cause("Another type of number", said, "scaling")]
    ours, theirs = _sample(p), _sample(q)
    if cause := _shifted(one, ours, theirs):
        return [cause]
    if said := _affine(ours, theirs, one["shape"]):
        return [Cause("Another scaling or normalization", said, "scaling")]
    close = [math.isclose(one.get(k, 0), other.get(k, 1), rel_tol=1e-6, abs_tol=1e-6)
             for k in ("norm", "sum")]  # fmt: skip
    norms = one.get("norm", 0), other.get("norm", 0)
    if all(close):
        said = f"sum and norm are equal, {len(mine) - equal} of {len(mine)} samples differ."
        return [Cause("The same values in other places: flipped, turned, or channels exchanged",
                      said, "augmentation")]  # fmt: skip
    # A mean of two samples of the batch, each for each, leaves the sum of the batch; not its norm.
    if not equal and abs(one.get("sum", 0) - other.get("sum", 1)) < 1e-5 * max(norms):
        said = "no sample is the same, but all together have the same sum; their norm is "
        said += f"{norms[0]:.5g} in A, {norms[1]:.5g} in B."
        return [Cause("The samples of a batch are mixed with each other (mixup) on one side, or "
                      "otherwise", said, "augmentation")]  # fmt: skip
    how_far = size(one, other)
    if not equal and how_far is not None and how_far < 0.05:
        said = f"no sample is the same, and all together they differ by {how_far:.1g} only."
        return [Cause("The same samples with slightly other values: rounded, resized, or noisy",
                      said, "augmentation")]  # fmt: skip
    if equal:
        said = f"{equal} of {len(mine)} samples are equal."
        return [Cause("Some samples are changed on one side, as by an augmentation", said,
                      "augmentation")]  # fmt: skip
    states = [record["random"].get("torch") for record in (p, q)]
    if not common and states[0] != states[1]:
        said = "no sample of the batch comes anywhere in the other run, and the state of torch's "
        said += "generator differs: so it is where a batch is made with random numbers."
        return [Cause("Random numbers from another state, in the batch: noise, a crop, a sampled "
                      "time", said, "validation-and-order"),
                Cause("Other samples: another split or data set", said, "split")]  # fmt: skip
    said = f"{common} of {len(mine)} samples of a batch come anywhere in the other run."
    return [Cause("Other samples: another split or data set, or an augmentation", said, "split")]


def _affine(ours: list[float], theirs: list[float], shape: list[int]) -> str:
    """Say how B's values follow from A's by a factor and an offset, if they do; else ''."""
    a, b = np.array(ours), np.array(theirs)
    if len(a) != len(b) or len(a) < 4 or np.ptp(a) == 0 or ours == theirs:
        return ""  # of equal ones, another sample differs
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
            # By rounding, the values of one type of number become those of another.
            if all(abs(f - 1) < 1e-3 and abs(o) < 1e-3 * np.ptp(a) for f, o in fits):
                return ""
            factor, offset = fits[0]
            more = "" if abs(offset) < 1e-4 * np.ptp(b) else f", {offset:+.4g}"
            return f"B's values are {factor:.4g} times A's{more}{how}."
    return ""
