"""Look at one run alone: what is wrong with it needs no second run to be seen."""

import math
from pathlib import Path

from .evidence import Cause, differ
from .files import Line
from .run import Run, sane, stepped, training

FORGOTTEN = "model.train() is missing: the network trains in eval mode"


def check(path: Path | str) -> list[Cause]:
    """Return what is wrong with a run, each with what speaks for it; an empty list if nothing is.

    Raises BadInput where there is no whole trace at path.
    """
    with sane(path):
        return _check(Run(path, "the run"))


def _check(run: Run) -> list[Cause]:
    if not run.steps:
        why = run.end["error"] or "the trace saw no step of an optimizer that holds a parameter"
        said = f"{why}; {len(run.head['trainable'])} parameters should train."
        return [Cause("The optimizer does not hold the network's parameters", said,
                      "parameter-groups")]  # fmt: skip
    steps = list(run.every_step())
    return [*_parameters(run, steps), *_gradients(run, steps), *_modes(steps), *_losses(steps)]


def _parameters(run: Run, steps: list[Line]) -> list[Cause]:
    """Look for parameters that no optimizer holds, or that never move."""
    held = {name for step in steps for name in stepped(step)}
    wanted = [name for name in run.head["trainable"] if name not in run.head["tied"]]
    missing = [name for name in wanted if name not in held]
    causes = []
    if missing:
        said = f"{len(missing)} of {len(wanted)} parameters that should train, first {missing[0]}."
        causes.append(Cause("Parameters that the optimizer was not given", said,
                            "parameter-groups"))  # fmt: skip
    start = {name: value["bits"] for name, value in run.head["start"].items()}
    moved = {n for step in steps for n, bits in step["weights"]["bits"].items()
             if differ(bits, start.get(n, "?"))}  # fmt: skip
    still = [n for n in wanted if n in held and n not in moved and start.get(n, "?")[0] != "?"
             and n not in _without_meaning(run, steps)]  # fmt: skip
    if still:
        without = [n for n in still if not any(n in step["used"]["bits"] for step in steps)]
        said = f"{len(still)} parameters, first {still[0]}, are the same after {len(steps)} steps"
        said += f"; {len(without)} of them never get a gradient." if without else "."
        causes.append(Cause("Parameters that should train, and never move", said, "frozen"))
    return causes


def _without_meaning(run: Run, steps: list[Line]) -> set[str]:
    """Return the parameters on which no output depends but for rounding, or without values.

    So is a bias before BatchNorm, which takes the mean away again: its gradient is rounding.
    """
    empty = {name for name, value in run.head["start"].items() if 0 in value.get("shape", ())}
    tiny: set[str] = set()
    for step in steps:
        used = step["used"]
        for name, norm in zip(used["bits"], used["norms"], strict=True):
            if 0 < norm < 1e-5 * used["norm"]:
                tiny.add(name)
    return empty | tiny


def _gradients(run: Run, steps: list[Line]) -> list[Cause]:
    """Look for gradients that are zero throughout, or no numbers."""
    norms: dict[str, list[float]] = {}
    causes: list[Cause] = []
    for step in steps:
        for name, norm in zip(step["used"]["bits"], step["used"]["norms"], strict=True):
            norms.setdefault(name, []).append(norm)
            if not math.isfinite(norm) and not causes:
                said = f"that of {name} in step {step['step']:,}."
                causes.append(Cause("A gradient is not finite", said, "precision"))
    start = run.head["start"]
    zero = [name for name, found in norms.items()
            if not any(found) and 0 not in start.get(name, {}).get("shape", ())]  # fmt: skip
    if zero:
        said = f"{len(zero)} gradients, first that of {zero[0]}, in all {len(steps)} steps."
        causes.append(Cause("Gradients that are always zero", said, "frozen"))
    return causes


def _modes(steps: list[Line]) -> list[Cause]:
    """Look for training in eval mode."""
    for step in steps:
        for record in training(step):
            if record["loss"] and "1" not in record["mode"]:
                said = f"all {len(record['mode'])} modules are in eval mode in step "
                return [Cause(FORGOTTEN, f"{said}{step['step']:,}.", "train-and-eval")]
    return []


def _losses(steps: list[Line]) -> list[Cause]:
    for step in steps:
        for backward in step["backwards"]:
            for value in backward["loss"]:
                if value is not None and not math.isfinite(value):
                    said = f"it is {value} in step {step['step']:,}."
                    return [Cause("The loss is not finite", said, "precision")]
    return []
