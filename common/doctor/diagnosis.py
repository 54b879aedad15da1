"""Hold two traces against each other, find the first difference, and name its likely cause.

What follows a difference differs too and says nothing. So only the first one is diagnosed, in the
order in which a step happens: STAGES.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import causes_input, causes_network, causes_step
from .evidence import Cause, Found, differ, is_rounding, named, size, tensors
from .files import Line, Run, weights_before
from .messages import BadInput

STAGES = {
    "start": "the initial weights",
    "batch": "the batch, as the network got it",
    "mode": "the mode, train or eval",
    "weights": "the weights that the forward pass found",
    "random": "the random numbers of the forward pass",
    "output": "the network's output",
    "loss": "the loss (its gradient at the network's output)",
    "gradient": "the gradients of the backward pass",
    "clipping": "what was done to the gradients before the step",
    "update": "the step of the optimizer",
    "steps": "the number of steps, or of batches in one",
}

PITFALLS = "docs/pitfalls.md"


@dataclass(frozen=True)
class Diagnosis:
    """The first difference of two runs.

    `stage` is a key of STAGES, None where the runs are equal. `step` counts from 1; 0 is before the
    training. `what` names the tensor or setting, `others` how many more differ there. `size` is the
    norm of all their differences relative to the norm of all the tensors of that stage in the first
    run (to how far they moved, for weights after a step), estimated within a third of it; None
    where there is none, as for a mode.
    `rounding` tells whether another order of the same sums explains it. `causes` come in the order
    in which they fit, `remarks` say what else is worth knowing.
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

    @property
    def equal(self) -> bool:
        return self.stage is None

    def __str__(self) -> str:
        """Say it in at most 15 lines, of which the first says what differs, and since when."""
        if self.stage is None:
            return "\n".join((f"The runs are equal, bit for bit: {self.steps:,} steps.",
                              *self.remarks))  # fmt: skip
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
            page = f" ({PITFALLS}#{cause.page})" if cause.page else ""
            lines += [f"{number}. {cause.name}{page}", f"   {cause.evidence}"]
        return "\n".join([*lines, *self.remarks][:15])


def compare(a: Path | str, b: Path | str) -> Diagnosis:
    """Compare two traces and diagnose their first difference.

    Raises BadInput where one is no trace, is empty, or they were thinned differently.
    """
    first, second = Run.of(a, "A"), Run.of(b, "B")
    for name in ("every", "first"):
        ours, theirs = (run.head.get(name, 1) for run in (first, second))
        if ours != theirs:
            raise BadInput(
                f"A was made with {name}={ours} and B with {name}={theirs}; trace both with the "
                f"same `{name}`."
            )
    for run, path in ((first, a), (second, b)):
        if not run.steps:
            why = run.end["error"] or "no optimizer that holds its parameters made a step"
            raise BadInput(f"'{path}' holds no step ({why}); trace the code that trains.")
    renamed = _rename(first, second)
    return _first_difference(first, second, (*renamed, *_remarks(first, second)))


def assert_parity(a: Path | str, b: Path | str) -> None:
    """Raise AssertionError, with the diagnosis, unless two traces are equal bit for bit."""
    diagnosis = compare(a, b)
    if not diagnosis.equal:
        raise AssertionError(str(diagnosis))


def _first_difference(a: Run, b: Run, remarks: tuple[str, ...]) -> Diagnosis:
    """Go through both traces and stop at the first difference that matters."""
    steps = a.end["end"]
    if found := _start(a, b):
        return _diagnosis(steps, 0, found, remarks)
    harmless = ""
    for index, (ours, theirs) in enumerate(zip(a.steps, b.steps, strict=False)):
        if ours == theirs:
            continue
        x, y = json.loads(ours), json.loads(theirs)
        if found := _step(a, b, index, x, y):
            return _diagnosis(steps, x["step"], found, remarks)
        harmless = harmless or _harmless(x, y)
    if len(a.steps) != len(b.steps) or steps != b.end["end"]:
        step = min(steps, b.end["end"]) + 1
        return _diagnosis(steps, step, causes_step.other_length(a, b), remarks)
    if a.end["weights"] or b.end["weights"]:
        ours = a.end["weights"] or a.step(-1)["weights"]
        theirs = b.end["weights"] or b.step(-1)["weights"]
        if found := tensors(
            "weights", ours, theirs, lambda rounding: [causes_step.CHANGED_AFTERWARDS]
        ):
            return _diagnosis(steps, steps + 1, found, remarks)
    return Diagnosis(steps, remarks=(*remarks, *[harmless] * bool(harmless)))


def _harmless(x: Line, y: Line) -> str:
    """Say what differs in a step after which all weights are equal."""
    for one, other in zip(x["batches"], y["batches"], strict=False):
        seen = [batch["evaluation"]["batches"] for batch in (one, other)]
        drawn = [n for n in one["random"] if one["random"][n] != other["random"].get(n)]
        if drawn:
            said = f"the state of {drawn[0]}'s generator differs"
        elif seen[0] != seen[1]:
            said = f"A had evaluated {seen[0]} batches, B {seen[1]}"
        else:
            continue
        return f"Before step {x['step']:,} {said}; no weight depended on it."
    return f"In step {x['step']:,} something differs on which no weight depended."


def _diagnosis(steps: int, step: int, found: Found, remarks: tuple[str, ...]) -> Diagnosis:
    return Diagnosis(
        steps, found.stage, step, found.what, found.others, found.size, found.rounding,
        tuple(found.causes), remarks,
    )  # fmt: skip


def _start(a: Run, b: Run) -> Found | None:
    """Compare the initial weights: names and shapes first."""
    ours, theirs = a.head["start"], b.head["start"]
    return causes_input.other_network(ours, theirs) or tensors(
        "start", ours, theirs, partial(causes_input.start_causes, a, b)
    )


def _step(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Compare one step."""
    for place in range(min(len(x["batches"]), len(y["batches"]))):
        ours, theirs = x["batches"][place], y["batches"][place]
        found = _forward(a, b, index, place, ours, theirs) or tensors(
            "loss", ours["loss"], theirs["loss"], partial(causes_network.loss_causes, x, y, place)
        )
        if found:
            return found
    if len(x["batches"]) != len(y["batches"]):
        return causes_step.other_count(x, y)
    # Only where it is needed: the step before has to be read again for it.
    before = weights_before(a, index) if x["weights"] != y["weights"] else None
    update = partial(causes_step.update_causes, a, b, index, x, y)
    return (
        tensors(
            "gradient", x["fresh"], y["fresh"], partial(causes_step.gradient_causes, a, b, x, y)
        )
        or tensors("clipping", x["used"], y["used"], partial(causes_step.clipping_causes, x, y))
        or causes_step.settings(a, b, index, x, y)
        or tensors("update", x["weights"], y["weights"], update, before)
        or tensors("update", x["state"], y["state"], update)
    )


def _forward(a: Run, b: Run, index: int, place: int, x: Line, y: Line) -> Found | None:
    """Compare one forward pass."""
    for one, other in zip(x["inputs"], y["inputs"], strict=False):
        if differ(one, other):
            found = causes_input.batch_causes(a, b, index, place, x, y)
            how_far = size(one, other)
            names = dict.fromkeys(map(named, (one, other)))
            what = " and ".join(names)  # once, where shape and type are equal
            rounding = is_rounding(how_far, one, other)
            return Found("batch", what, found, 0, how_far, rounding)
    if len(x["inputs"]) != len(y["inputs"]):
        what = f"{len(x['inputs'])} and {len(y['inputs'])} tensors"
        return Found("batch", what, [Cause("Another input", "the networks get other arguments.")])
    if x["mode"] != y["mode"] and len(x["mode"]) == len(y["mode"]):
        return causes_network.other_mode(a, x, y)
    return causes_network.changed(a, b, index, x, y) or _output(a, b, x, y)


def _output(a: Run, b: Run, x: Line, y: Line) -> Found | None:
    """Compare what the layers gave, in the order in which they were called, and the output."""
    outputs = {f"number {n + 1}": one for n, one in enumerate(x["outputs"])}
    others = {f"number {n + 1}": one for n, one in enumerate(y["outputs"])}
    # A layer that is called elsewhere, or has another name, does not matter where these are equal.
    if not any(differ(outputs[n], others.get(n, {})) for n in outputs):
        return None
    ours, theirs = x["layers"] | outputs, y["layers"] | others
    names = [n for n in ours if n in theirs and differ(ours[n], theirs[n])]
    one, other = ours[names[0]], theirs[names[0]]
    how_far = size(one, other)
    rounding = is_rounding(how_far, one, other)
    stage, found = causes_network.output_causes(a, b, names[0], x, y, rounding)
    return Found(stage, f"output of {names[0]}", found, len(names) - 1, how_far, rounding)


def _rename(a: Run, b: Run) -> tuple[str, ...]:
    """Give B's parameters the names that A has, where they are the same but for their names."""
    ours, theirs = list(a.head["start"]), list(b.head["start"])
    if set(ours) == set(theirs):
        return ()
    if [t["shape"] for t in a.head["start"].values()] != [
        t["shape"] for t in b.head["start"].values()
    ]:
        return ()
    names = dict(zip(theirs, ours, strict=True))
    layers = {n.rpartition(".")[0]: names[n].rpartition(".")[0] for n in theirs}

    def keys(line: Any, table: dict[str, str]) -> dict:
        return {table.get(name, name): value for name, value in line.items()}

    b.head["start"] = keys(b.head["start"], names)
    b.head["modules"] = keys(b.head["modules"], layers)
    b.end["weights"] = keys(b.end["weights"], names)
    steps = []
    for line in b.every_step():
        for part in ("fresh", "used", "weights"):
            line[part] = keys(line[part], names)
        split = ((key, *key.split(": ")) for key in line["state"])
        line["state"] = {f"{names.get(n, n)}: {w}": line["state"][k] for k, n, w in split}
        for group in line["groups"]:
            group["params"] = [names.get(name, name) for name in group["params"]]
        for batch in line["batches"]:
            batch["changed"] = keys(batch["changed"], names)
            batch["layers"] = keys(batch["layers"], layers)
        steps.append(json.dumps(line))
    b.steps = steps
    return (f"The parameters have other names, and were paired in their order: {theirs[0]} is "
            f"{ours[0]}.",)  # fmt: skip


def _remarks(a: Run, b: Run) -> tuple[str, ...]:
    """Say what of the environment differs: it can change the last bit of a sum."""
    ours, theirs = a.head["environment"], b.head["environment"]
    differ = []
    for name in ours:
        if name == "versions":
            for package in ours[name].keys() & theirs[name].keys():
                if ours[name][package] != theirs[name][package]:
                    differ.append(f"{package} {ours[name][package]} and {theirs[name][package]}")
        elif ours[name] != theirs.get(name):
            differ.append(f"{name} {ours[name]} and {theirs.get(name)}")
    return (f"The runs were not made alike: {'; '.join(differ)}.",) if differ else ()
