"""Hold two traces against each other, find the first difference, and name its likely cause.

What follows a difference differs too and says nothing. So only the first one is diagnosed, in the
order in which a step happens: STAGES. And only one that reached a weight counts: where the weights
after a step are equal, what differed before is a remark.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from . import causes_input, causes_step
from .evidence import Cause, Found, differ, differing, eps, stage, unknown
from .files import Line
from .messages import PAGES, SAMENESS, BadInput, printable
from .remarks import environment, harmless, not_seen
from .rounding import TIMES, measured
from .run import Run, align, load, sane, weights_found
from .steps import first_in_step

STAGES = {
    "start": "the initial weights",
    "batch": "the batch, as the network got it",
    "mode": "the mode, train or eval",
    "weights": "the weights that the forward pass found",
    "random": "the random numbers of the forward pass",
    "output": "what the network computed",
    "buffers": "what forward passes left in the buffers, such as running averages",
    "loss": "the loss (its gradient at the network's output)",
    "gradient": "the gradients of the backward pass",
    "clipping": "what was done to the gradients before the step",
    "update": "the step of the optimizer",
    "steps": "the number of steps, or of batches in one",
}


@dataclass(frozen=True)
class Diagnosis:
    """The first difference of two runs.

    `stage` is a key of STAGES, None where no difference was seen. `step` counts from 1; 0 is before
    the training. `what` names the tensor or setting, `others` how many more differ there. `size` is
    the norm of all their differences relative to the norm of all the tensors of that stage in the
    first run (to how far they moved, for weights after a step), estimated within a third of it;
    None where there is none, as for a mode.
    `rounding` tells whether another order of the same sums explains it. `causes` come in the order
    in which they fit, `remarks` say what else is worth knowing. `unseen` are weights that a trace
    could not read: then nobody knows whether the runs are equal.
    """

    steps: int
    stage: str | None = None
    step: int = 0
    what: str = ""
    others: int = 0
    size: float | None = None
    rounding: bool = False
    causes: tuple[Cause, ...] = ()
    remarks: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.stage is None and not self.unseen

    def __str__(self) -> str:
        """Say it in at most 15 lines, of which the first says what differs, and since when."""
        return printable("\n".join(self._lines()[:15]))

    def _lines(self) -> list[str]:
        if self.unseen:
            more = f" and {len(self.unseen) - 1} more" if len(self.unseen) > 1 else ""
            return [f"No difference was seen in {self.steps:,} steps, but not all weights were "
                    f"seen, so nobody knows: {self.unseen[0]}{more}.", *self.remarks]  # fmt: skip
        if self.stage is None:
            return [f"The runs are equal, bit for bit: {self.steps:,} steps.", *self.remarks]
        when = f"from step {self.step:,} on" if self.step else "before the first step"
        more = f" and {self.others} more" if self.others else ""
        lines = [f"The runs differ {when}, first in {STAGES[self.stage]}: {self.what}{more}."]
        if self.size is not None:
            kind = "rounding" if self.rounding else "more than rounding"
            size = f"{self.size:.1g}" if self.size else "below what the trace resolves"
            lines.append(f"Its size, relative to A's: {size}; that is {kind}.")
        if self.step:
            steps = f" and all steps before, {self.step - 1:,}" if self.step > 1 else ""
            lines.append(f"Equal until then: the initial weights{steps}.")
        for number, cause in enumerate(self.causes[:3], start=1):
            page = f" ({PAGES}#{cause.page})" if cause.page else ""
            lines += [f"{number}. {cause.name}{page}", f"   {cause.evidence}"]
        return [*lines, *self.remarks]


def compare(a: Path | str, b: Path | str, nudged: Path | str | None = None) -> Diagnosis:
    """Compare two traces and diagnose their first difference.

    `nudged` is the trace of A's run made once more with Trace(..., nudge=True): what it differs by
    is what rounding makes here, instead of a fixed number of units in the last place.

    Raises BadInput where one is no trace, is empty, or they were thinned differently.
    """
    with sane(a, b):
        first = load(a, "A")
        diagnosis = _compare(first, load(b, "B"))
        if nudged is not None and diagnosis.size is not None:
            diagnosis = _measured(diagnosis, load(a, "A"), load(nudged, "the nudged run"))
        str(diagnosis)  # what cannot be said is nonsense, too
        return diagnosis


def _compare(a: Run, b: Run) -> Diagnosis:
    for name in ("every", "first"):
        ours, theirs = a.head[name], b.head[name]
        if ours != theirs:
            raise BadInput(
                f"A was made with {name}={ours} and B with {name}={theirs}; trace both with the "
                f"same `{name}`."
            )
    is_thin = a.head["every"] > 1 or a.head["first"] > 1
    counts = [(run.end["optimizers"], run.end["end"]) for run in (a, b)]
    if is_thin and counts[0][0] != counts[1][0] and counts[0][1] != counts[1][1]:
        raise BadInput(
            f"A made {counts[0][1]} steps (number of optimizers: {counts[0][0]}), B {counts[1][1]} "
            f"(optimizers: {counts[1][0]}); which of them belong together is seen only where each "
            "step is recorded: trace both without `every` and `first`."
        )
    spread = [bool(run.head.get("sharded")) for run in (a, b)]
    if spread[0] != spread[1]:
        raise BadInput(
            f"{'A' if spread[0] else 'B'}'s weights are spread over processes, and the other run's "
            "are not; compare two runs of one strategy."
        )
    remarks = [*environment(a, b), *align(a, b)]
    steps = a.end["end"]
    found, step = _start(a, b), 0
    if found is None:
        found, step, seen = _steps(a, b)
        remarks += seen
    if found is None:
        remarks += not_seen(a, b)
        return Diagnosis(steps, remarks=tuple(remarks), unseen=_unseen(a, b))
    return Diagnosis(
        steps, found.stage, step, found.what, found.others, found.size, found.rounding,
        tuple(found.causes), (*remarks, *not_seen(a, b)),
    )  # fmt: skip


def _measured(diagnosis: Diagnosis, a: Run, nudged: Run) -> Diagnosis:
    """Judge the size of a difference by what one unit in the last place makes of it."""
    by = measured(a, nudged, max(diagnosis.step, 1), str(diagnosis.stage))
    said = f"A itself, begun one unit in the last place beside, differs by {by:.1g} there."
    is_rounding = diagnosis.size is not None and diagnosis.size <= TIMES * by
    causes = diagnosis.causes
    if is_rounding and not diagnosis.rounding:
        causes = (Cause(f"The same sums in another order: {SAMENESS}", said), *causes)
    return replace(diagnosis, rounding=is_rounding, causes=causes,
                   remarks=(said, *diagnosis.remarks))  # fmt: skip


def assert_parity(a: Path | str, b: Path | str) -> None:
    """Raise AssertionError, with the diagnosis, unless two traces are equal bit for bit."""
    diagnosis = compare(a, b)
    if not diagnosis.equal:
        raise AssertionError(str(diagnosis))


def _steps(a: Run, b: Run) -> tuple[Found | None, int, list[str]]:
    """Go through both traces and stop at the first difference that matters."""
    remarks: list[str] = []
    for index in range(min(len(a.steps), len(b.steps))):
        if a.table is b.table is None and a.steps[index] == b.steps[index]:
            continue
        x, y = a.step(index), b.step(index)
        if found := first_in_step(a, b, index, x, y):
            return *causes_step.since(a, b, index, found), remarks
        if not remarks and (said := harmless(x, y)):
            remarks.append(said)
    # Without what was left out or joined: all steps were recorded, as the traces count them.
    is_whole = all(run.table is None and not run.is_joined for run in (a, b))
    ends = [run.end["end"] if is_whole else len(run.steps) for run in (a, b)]
    if len(a.steps) != len(b.steps) or ends[0] != ends[1]:
        return causes_step.other_length(a, b, ends), min(ends) + 1, remarks
    return _end(a, b), ends[0] + 1, remarks


def _end(a: Run, b: Run) -> Found | None:
    """Compare the weights after the last step."""
    names = differing(a.end["digests"], b.end["digests"])
    names = [n for n in names if a.head["buffers"].get(n, True)]
    if not names:
        return None
    said = causes_step.changed_afterwards(a, b, names)
    return Found("weights", names[0], said, len(names) - 1)


def _start(a: Run, b: Run) -> Found | None:
    """Compare the initial weights: names and shapes first, then as the first forward pass found."""
    ours, theirs = a.head["start"], b.head["start"]
    if found := causes_input.other_network(a, b):
        return found
    found_by = [weights_found(run, 0) for run in (a, b)]
    names = [n for n in ours if n in theirs and differ(ours[n], theirs[n])]
    if not any(differ(found_by[0].get(n, "?"), found_by[1].get(n, "?")) for n in names):
        return None  # loaded, or drawn anew, before they were used
    return stage(
        "start", _as_stage(ours), _as_stage(theirs),
        find=lambda rounding: causes_input.start_causes(a, b), among=names,
        dtypes=[ours[n].get("dtype", "float32") for n in names if eps(ours[n].get("dtype", ""))],
    )  # fmt: skip


def _as_stage(tensors: Line) -> Line:
    norm = sum(t.get("norm", 0) ** 2 for t in tensors.values()) ** 0.5
    bits = {n: t["bits"] for n, t in tensors.items()}
    return {"bits": bits, "full": tensors, "norm": norm, "sketch": [0.0]}


def _unseen(a: Run, b: Run) -> tuple[str, ...]:
    """Return the weights that one of the traces could not read, at the last step."""
    last = [run.step(-1 % len(run.steps))["weights"]["bits"] for run in (a, b)]
    return tuple(f"{n} ({bits[1:]})" for weights in last for n, bits in weights.items()
                 if unknown(bits))  # fmt: skip


def to_json(diagnosis: Diagnosis) -> str:
    """Return a diagnosis for machines: the fields of Diagnosis, and `equal`."""
    fields = {name: getattr(diagnosis, name) for name in Diagnosis.__dataclass_fields__}
    causes = [vars(cause) for cause in diagnosis.causes]
    return json.dumps(fields | {"equal": diagnosis.equal, "causes": causes}, indent=2)
