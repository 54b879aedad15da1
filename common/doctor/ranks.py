"""Compare runs of several processes: a file for each rank, it.rank0.trace, it.rank1.trace ..."""

import dataclasses
from pathlib import Path

from .alone import check
from .diagnosis import STAGES, Diagnosis, compare
from .evidence import Cause, differing
from .messages import BadInput
from .run import load, sane, training, weights_found

ALL_THE_SAME = "All processes get the same samples: a DistributedSampler is missing"
ALIKE = "in each of the first steps, the samples of rank 0 are those of every rank."
DRIFT = "Replicas drift apart: the processes do not average the same gradients"


def of_ranks(path: Path | str) -> list[Path]:
    """Return the file of a run, or the files of its ranks in their order."""
    path = Path(path)
    found = {p.stem.rpartition(".rank")[2]: p for p in path.parent.glob(f"{path.stem}.rank*")
             if p.suffix == path.suffix}  # fmt: skip
    numbers = sorted(int(number) for number in found if number.isdigit())
    if path.exists() or not numbers:
        return [path]
    if numbers != list(range(len(numbers))):
        missing = min(set(range(max(numbers))) - set(numbers))
        raise BadInput(f"of '{path}' there is no trace of rank {missing}; trace all processes.")
    return [found[str(number)] for number in numbers]


def drift(paths: list[Path]) -> Cause | None:
    """Hold the ranks of one run against each other: after each step all weights are the same."""
    runs = [load(path, f"rank {n}") for n, path in enumerate(paths)]
    if any(run.head.get("sharded") for run in runs):
        return None  # each holds another part
    first, trainable = runs[0], set(runs[0].head["trainable"])
    for number, run in enumerate(runs[1:], start=1):
        count = min(len(run.steps), len(first.steps))
        # As the next step finds them: some optimizers spread the weights after their step.
        later = ((first.step(n - 1)["step"], weights_found(first, n), weights_found(run, n))
                 for n in range(1, count))  # fmt: skip
        last = (first.step(-1)["step"], first.end["digests"], run.end["digests"])
        for step, ours, theirs in (*later, *[last] * (len(run.steps) == len(first.steps))):
            if names := [n for n in differing(ours, theirs) if n in trainable]:
                said = f"after step {step:,}, {names[0]} and {len(names) - 1} more are others in "
                return Cause(DRIFT, f"{said}rank {number} than in rank 0.",
                             "batch-size-and-devices")  # fmt: skip
        if len(run.steps) != len(first.steps):
            said = f"rank 0 made {len(first.steps)} steps, rank {number} {len(run.steps)}."
            return Cause("The processes make another number of steps", said, "steps")
    return None


def same_batches(paths: list[Path]) -> bool:
    """Tell whether all processes get the same samples, each step; not where weights are spread.

    There it may be right: in tensor parallelism, all processes work on one batch.
    """
    runs = [load(path, "a rank") for path in paths]
    if len(runs) < 2 or any(run.head.get("sharded") for run in runs):
        return False
    count = min(4, *(len(run.steps) for run in runs))
    batches = [[record.get("rows") for n in range(count) for record in training(run.step(n))]
               for run in runs]  # fmt: skip
    return batches[0] != [] and None not in batches[0] and all(b == batches[0] for b in batches)


def check_ranks(path: Path | str) -> list[Cause]:
    """Return what is wrong with a run of one or of several processes; see `check`."""
    paths = of_ranks(path)
    causes = check(paths[0])
    known = {cause.name for cause in causes}
    for rank, other in enumerate(paths[1:], start=1):
        for cause in check(other):
            if cause.name not in known:
                known.add(cause.name)
                causes.append(Cause(cause.name, f"in rank {rank}: {cause.evidence}", cause.page))
    with sane(*paths):
        apart, are_same = drift(paths), same_batches(paths)
    if apart:
        causes.append(apart)
    if are_same:
        causes.append(Cause(ALL_THE_SAME, ALIKE, "batch-size-and-devices"))
    return causes


def compare_ranks(a: Path | str, b: Path | str, nudged: Path | str | None = None) -> Diagnosis:
    """Compare two runs: within each, rank against rank; then each rank with the other run's.

    Raises BadInput where a rank's trace is missing, or the runs have another number of them.
    """
    ours, theirs = of_ranks(a), of_ranks(b)
    if len(ours) != len(theirs):
        raise BadInput(
            f"A has traces of {len(ours)} processes, B of {len(theirs)}; trace both with as many."
        )
    if len(ours) == 1:
        return compare(ours[0], theirs[0], nudged)
    remarks = []
    alike = []
    for name, paths in (("A", ours), ("B", theirs)):
        with sane(*paths):
            cause = drift(paths)
            alike.append(same_batches(paths))
        if cause:
            remarks.append(f"Within {name}: {cause.name}: {cause.evidence}")
    found = [compare(x, y) for x, y in zip(ours, theirs, strict=True)]
    # What one rank got, all others see in their averaged gradients, which is later in a step.
    order = [*STAGES, None]
    rank = min(range(len(found)), key=lambda n: (found[n].equal, found[n].step,
                                                 order.index(found[n].stage), n))  # fmt: skip
    where = "." if found[rank].equal else f"; this is rank {rank}."
    said = [f"{len(found)} processes{where}"]
    causes = found[rank].causes
    if found[rank].stage == "batch" and alike[0] != alike[1]:
        which = f"in {'A' if alike[0] else 'B'}, {ALIKE}"
        causes = (Cause(ALL_THE_SAME, which, "batch-size-and-devices"), *causes)
    elif any(alike):
        remarks.append(f"{ALL_THE_SAME}, in {'A and B' if all(alike) else 'AB'[alike[1]]}?")
    return dataclasses.replace(found[rank], causes=causes,
                               remarks=(*said, *remarks, *found[rank].remarks))  # fmt: skip
