"""Compares two results, stage by stage, each only if the one before it is equal."""

from common.messages import BadInput
from common.proof.watch import Result

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AVERAGES = ("val_loss", "val_accuracy", "val_f1", "test_loss", "test_accuracy", "test_f1")
# Lightning's running mean adds up in float32. All that comes before the metrics is equal bit for
# bit; nothing there is compared within a tolerance.
RELATIVE = 1e-6


@dataclass(frozen=True)
class Stage:
    """One row of the comparison: how many things were compared, and what differs, if anything.

    `difference` is None where all are equal, and where an earlier stage differed (`compared` is
    then 0: what follows a difference differs too and says nothing).
    """

    name: str
    compared: int
    difference: str | None


@dataclass(frozen=True)
class Comparison:
    """The stages in their order: data, start, steps, weights, optimizer, random, metrics.

    Where a lesson writes checkpoints, these come last.
    """

    stages: tuple[Stage, ...]

    @property
    def first_difference(self) -> Stage | None:
        """Return the first stage that differs, None where all agree."""
        return next((stage for stage in self.stages if stage.difference is not None), None)

    @property
    def agree(self) -> bool:
        return self.first_difference is None


def compare_results(a: Result, b: Result) -> Comparison:
    """Compare two results stage by stage.

    Raises BadInput where they cannot be the same: other lesson, data, settings or versions.
    """
    refuse_different_settings(a, b)
    return compare_stages(a, b)


def compare_stages(a: Result, b: Result, names: Sequence[str] = ()) -> Comparison:
    """Compare two results stage by stage, each only if those before it are equal.

    The stages are those that are named, else all; the checkpoints only where there are any.
    """
    if not names:
        names = [name for name in CHECKS if name != "checkpoints"]
        names += ["checkpoints"] * bool(a["checkpoints"] or b["checkpoints"])
    stages: list[Stage] = []
    for name in names:
        if any(stage.difference is not None for stage in stages):
            stages.append(Stage(name, 0, None))
            continue
        compared, difference = CHECKS[name](a, b)
        if compared == 0 and difference is None:
            difference = "there was nothing to compare"
        stages.append(Stage(name, compared, difference))
    return Comparison(tuple(stages))


def refuse_different_settings(a: Result, b: Result) -> None:
    """Raise BadInput, with the name of the setting, unless both runs had the same settings."""
    first, second = a["side"], b["side"]
    if first == second:
        first, second = f"the first {first}", f"the second {second}"
    for name in ("lesson", "data", "seed", "hyperparameters", "versions", "device", "threads"):
        ours, theirs = a[name], b[name]
        if isinstance(ours, dict):
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    name, ours, theirs = key, ours.get(key), theirs.get(key)
                    break
        if ours != theirs:
            raise BadInput(
                f"the two runs cannot be compared: {name} is {ours} in {first} and {theirs} in "
                f"{second}; run both sides again with the same options."
            )


def _prints(part: str) -> Callable[[Result, Result], tuple[int, str | None]]:
    """Return a check of one part of the fingerprints, name by name."""

    def check(a: Result, b: Result) -> tuple[int, str | None]:
        ours, theirs = a["fingerprints"][part], b["fingerprints"][part]
        # The names first: to compare only the common ones would hide one that is missing. Where
        # one side stopped earlier, its last epochs are missing, and the steps will tell why.
        shorter = len(a["train_loss"]) != len(b["train_loss"])
        for name in sorted(ours.keys() ^ theirs.keys()):
            if shorter and name.startswith("order of epoch"):
                continue
            side = a["side"] if name in ours else b["side"]
            return len(ours), f"{name} is there only in {side}"
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                values = _sides(a, _short(ours[name]), b, _short(theirs[name]))
                return len(ours), f"{name}: {values}"
        return len(ours), None

    return check


def _steps(a: Result, b: Result) -> tuple[int, str | None]:
    """Check the loss of every optimizer step, and that the training did something."""
    ours, theirs = a["train_loss"], b["train_loss"]
    for step, (x, y) in enumerate(zip(ours, theirs, strict=False), start=1):
        if x != y:
            return len(ours), f"loss of step {step}: {_sides(a, x, b, y)}"
        if x is None:
            return len(ours), f"loss of step {step} is no number on both sides: nothing was learned"
    if len(ours) != len(theirs):
        return len(ours), f"number of steps: {_sides(a, len(ours), b, len(theirs))}"
    if a["fingerprints"]["start"] == a["fingerprints"]["weights"]:
        return len(ours), "the weights never changed: nothing was trained"
    return len(ours), None


def _metrics(a: Result, b: Result) -> tuple[int, str | None]:
    """Check the counts, which must be equal, and the averages, within RELATIVE of each other."""
    if "scores" in a or "scores" in b:
        return _scores(a, b)
    if a["confusion_matrix"] != b["confusion_matrix"]:
        return 1, "the confusion matrices"
    compared = 1
    for name in AVERAGES:
        ours, theirs = _list(a[name]), _list(b[name])
        if len(ours) != len(theirs):
            return compared, f"{name}, epochs: {_sides(a, len(ours), b, len(theirs))}"
        compared += len(ours)
        for x, y in zip(ours, theirs, strict=True):
            # None stands for a number that is not finite: the last step can make it so, when the
            # losses before it still were. Equal or not, nothing was learned.
            if x is None or y is None or not math.isclose(x, y, rel_tol=RELATIVE):
                return compared, f"{name}: {_sides(a, x, b, y)}"
    ours, theirs = a["test_accuracy_per_class"], b["test_accuracy_per_class"]
    for name in ours.keys() | theirs.keys():
        compared += 1
        if not math.isclose(ours.get(name, -1), theirs.get(name, -1), rel_tol=RELATIVE):
            return compared, f"accuracy of {name}: {_sides(a, ours.get(name), b, theirs.get(name))}"
    return compared, None


def _scores(a: Result, b: Result) -> tuple[int, str | None]:
    """Check what a network that names no classes was measured by: losses."""
    ours, theirs = a.get("scores", {}), b.get("scores", {})
    for name in sorted(ours.keys() ^ theirs.keys()):
        return len(ours), f"{name} is there only in {a['side'] if name in ours else b['side']}"
    compared = 0
    for name in ours:
        values = _list(ours[name]), _list(theirs[name])
        if len(values[0]) != len(values[1]):
            lengths = _sides(a, len(values[0]), b, len(values[1]))
            return compared, f"{name}, epochs: {lengths}"
        for x, y in zip(*values, strict=True):
            compared += 1
            if x is None or y is None or not math.isclose(x, y, rel_tol=RELATIVE):
                return compared, f"{name}: {_sides(a, x, b, y)}"
    return compared, None


def measure(result: Result) -> str:
    """Name what the test gave in a few words: the accuracy, or the first loss."""
    if "scores" not in result:
        return f"test accuracy {result['test_accuracy']:.2%}"
    name, value = next((n, v) for n, v in result["scores"].items() if n.startswith("test_"))
    return f"{name.replace('_', ' ')} {value if value is None else round(value, 4)}"


def _checkpoints(a: Result, b: Result) -> tuple[int, str | None]:
    """Check which checkpoints were left: of which epoch and step, with which weights."""
    ours, theirs = a["checkpoints"], b["checkpoints"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return len(ours), f"{name}: {_sides(a, ours.get(name), b, theirs.get(name))}"
    return len(ours), None


NAMES = {
    "data": "data, split and order",
    "start": "initial weights",
    "steps": "loss of every step",
    "weights": "final weights",
    "optimizer": "optimizer state",
    "random": "random-number generators",
    "metrics": "counts and averages",
    "checkpoints": "checkpoints",
}
CHECKS: dict[str, Callable[[Result, Result], tuple[int, str | None]]] = {
    "data": _prints("data"),
    "start": _prints("start"),
    "steps": _steps,
    "weights": _prints("weights"),
    "optimizer": _prints("optimizer"),
    "random": _prints("random"),
    "metrics": _metrics,
    "checkpoints": _checkpoints,
}


def _sides(a: Result, x: Any, b: Result, y: Any) -> str:
    """Say which value is whose."""
    return f"{a['side']} {x}, {b['side']} {y}"


def _short(value: Any) -> str:
    """Say in a few words what a fingerprint stands for; an edited result may hold anything."""
    shape = value.get("shape") if isinstance(value, dict) else None
    if not isinstance(shape, list):
        return f"{value}"[:12]
    return f"{'x'.join(map(str, shape))} of norm {value.get('norm')!r}"


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def as_data(a: Result, b: Result, comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values, for whoever shows it: parity.json.

    `losses` are the means of up to 200 groups of steps, of each side.
    """
    group = -(-len(a["train_loss"]) // 200)
    losses = {}
    for result in (a, b):
        found = [math.nan if x is None else x for x in result["train_loss"]]
        means = (sum(found[n : n + group]) / group for n in range(0, len(found) - group + 1, group))
        losses[result["side"]] = [None if math.isnan(mean) else round(mean, 5) for mean in means]
    return {
        "lesson": a["lesson"],
        "data": a["data"],
        "versions": {k: v for k, v in a["versions"].items() if k != "system"},
        "batches": len(a["train_loss"]),
        "test_accuracy": a.get("test_accuracy"),
        "agree": comparison.agree,
        "stages": [[NAMES[s.name], s.compared, s.difference] for s in comparison.stages],
        "steps_in_a_mean": group,
        "losses": losses,
    }
