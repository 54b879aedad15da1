"""Hold two runs against each other, stage by stage, and name the first difference.

`python -m common.parity LESSON [options]` runs whichever side has not been run with these options,
compares the two results and prints a table. Without a lesson it does so for all of them, and ends
with one table. Exit status 0: all agree; 1: they differ; 2: they cannot be compared.

`compare` and `assert_parity` do the same for two traces of any code; they are in samebits.
"""

from common import ROOT, SIDES, pretrained
from common.data import is_here
from common.messages import BadInput, clear_messages
from common.options import Options, parse_options
from common.recipes import RECIPES, Recipe
from common.runs import code_sha256, hyperparameters, run_folder, versions

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from samebits import assert_parity as assert_parity
from samebits import compare as compare

Result = dict[str, Any]  # what common.runs.Run.result returns, and result.json holds

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

    Where a lesson decides when to stop, decisions come last.
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
    checks: tuple[tuple[str, Callable[[Result, Result], tuple[int, str | None]]], ...] = (
        ("data", _prints("data")),
        ("start", _prints("start")),
        ("steps", _steps),
        ("weights", _prints("weights")),
        ("optimizer", _prints("optimizer")),
        ("random", _prints("random")),
        ("metrics", _metrics),
        ("decisions", _decisions),
    )
    stages: list[Stage] = []
    for name, check in checks:
        if name == "decisions" and not a["decisions"] and not b["decisions"]:
            continue  # most lessons take none
        if any(stage.difference is not None for stage in stages):
            stages.append(Stage(name, 0, None))
            continue
        compared, difference = check(a, b)
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


def _decisions(a: Result, b: Result) -> tuple[int, str | None]:
    """Check what stopped the training, which epoch was best, and its loss: equal to the bit."""
    ours, theirs = a["decisions"], b["decisions"]
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            return len(ours), f"{name}: {_sides(a, ours.get(name), b, theirs.get(name))}"
    return len(ours), None


def _sides(a: Result, x: Any, b: Result, y: Any) -> str:
    """Say which value is whose."""
    return f"{a['side']} {x}, {b['side']} {y}"


def _short(value: Any) -> str:
    """Say in a few words what a fingerprint stands for."""
    if not isinstance(value, dict):
        return f"{value}"[:12]
    return f"{'x'.join(map(str, value['shape']))} of norm {value['norm']!r}"


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


# From here on: the command.


def main(argv: list[str]) -> int:
    """Compare the two sides of one lesson, or of all; return the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(
            "usage: python -m common.parity [LESSON] [options]\n"
            f"Compare both sides of a lesson ({', '.join(RECIPES)}), or of all,\n"
            "with the lesson's options, which LESSON --help lists; for all lessons, with those\n"
            "that all have."
        )
        return 0
    lessons = list(RECIPES)
    if argv and not argv[0].startswith("-"):
        lessons, argv = argv[:1], argv[1:]
        if lessons[0] not in RECIPES:
            raise BadInput(f"there is no lesson '{lessons[0]}'; there are: {', '.join(RECIPES)}.")
    # Read for all before anything is run: an option that one lesson lacks ends it here.
    settings = [parse_options(lesson, argv) for lesson in lessons]
    pairs = []
    for recipe, options in settings:
        start = Path(getattr(recipe, "start_from", "")).resolve()
        if (options.runs_dir / recipe.lesson).resolve() in start.parents:
            raise BadInput(
                f"--start-from '{start}' is in the folder of a run that will be moved "
                "away for the new one; copy the file elsewhere and name the copy."
            )
        for side in SIDES:
            if status := run_if_needed(side, recipe, options, argv):
                return status
        a, b = (read_result(side, recipe, options) for side in SIDES)
        pairs.append((a, b, compare_results(a, b)))
        show(*pairs[-1])
    if len(pairs) > 1:
        show_all(pairs)
    return 0 if all(comparison.agree for _, _, comparison in pairs) else 1


def run_if_needed(side: str, recipe: Recipe, options: Options, argv: list[str]) -> int:
    """Run one side, unless its result is there; return the exit status."""
    if _is_of(read_result(side, recipe, options), side, recipe, options):
        return 0
    print(
        f"The {side} side of {recipe.lesson} has not been run with these settings: running it.",
        flush=True,
    )
    command = [sys.executable, str(ROOT / side / f"{recipe.lesson}.py"), *argv]
    status = _wait_for(subprocess.Popen(command))
    return status if status in (0, 130) else 2  # a side that broke off is no difference


def _wait_for(process: subprocess.Popen) -> int:
    """Return the exit status; after Ctrl-C the other process says so and ends by itself."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def read_result(side: str, recipe: Recipe, options: Options) -> Result:
    """Return the content of a side's result.json; {} where there is none, or none to be read."""
    try:
        return json.loads((run_folder(options, recipe.lesson, side) / "result.json").read_text())
    except (OSError, ValueError):
        return {}


def _is_of(result: Result, side: str, recipe: Recipe, options: Options) -> bool:
    """Tell whether a result was made by today's code, packages and data with these settings."""
    if (
        result.get("data") != recipe.data
        and options.data == "auto"
        and is_here(options.data_dir, recipe.data)
    ):
        return False  # the shapes stood in, but the real images have come since
    used = result.get("decisions", {}).get("weights at the start")
    own: Any = recipe
    if used == "random" and own.weights == "auto" and pretrained.is_here(own.backbone):
        return False  # random weights stood in, but the pretrained ones have come since
    wanted = {
        "seed": recipe.seed,
        "hyperparameters": hyperparameters(recipe, options),
        "versions": versions(),
        "threads": options.threads,
        "code_sha256": code_sha256(side),
    }
    return all(result.get(name) == wanted[name] for name in wanted)


def show(a: Result, b: Result, comparison: Comparison) -> None:
    """Print the comparison as a table, with the verdict under it."""
    table = Table(
        title=f"{a['lesson']} on {a['data']}: {a['side']} and {b['side']}", title_justify="left"
    )
    table.add_column("stage")
    table.add_column("compared", justify="right")
    table.add_column("result")
    for stage in comparison.stages:
        verdict = "equal" + (f" within {RELATIVE}" if stage.name == "metrics" else ", bit for bit")
        if stage.difference is not None:
            verdict = "DIFFERENT"
        elif stage.compared == 0:
            verdict = "not compared"
        table.add_row(NAMES[stage.name], f"{stage.compared:,}", verdict)
    table.add_section()
    for name in ("train_seconds", "test_seconds"):
        times = ", ".join(f"{result['side']} {result[name]:.1f}" for result in (a, b))
        table.add_row(name.replace("_", " "), "", times)
    Console().print(table)
    if first := comparison.first_difference:
        print(f"The two sides differ, first in {NAMES[first.name]}: {first.difference}.")
    else:
        steps, accuracy = len(a["train_loss"]), a["test_accuracy"]
        print(f"The two sides agree: {steps:,} steps, test accuracy {accuracy:.2%}.")


def show_all(pairs: list[tuple[Result, Result, Comparison]]) -> None:
    """Print one table of all lessons."""
    table = Table(title="all lessons: plain and lightning", title_justify="left")
    for name in ("lesson", "data"):
        table.add_column(name)
    for name in ("steps", "compared", "test accuracy", "train seconds"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for a, b, comparison in pairs:
        first = comparison.first_difference
        table.add_row(
            a["lesson"],
            a["data"],
            f"{len(a['train_loss']):,}",
            f"{sum(stage.compared for stage in comparison.stages):,}",
            f"{a['test_accuracy']:.2%}",
            f"{a['train_seconds']:.1f}, {b['train_seconds']:.1f}",
            f"DIFFERENT: {NAMES[first.name]}" if first else "equal",
        )
    Console().print(table)
    agreeing = sum(comparison.agree for _, _, comparison in pairs)
    print(f"The two sides agree in {agreeing} of {len(pairs)} lessons.")


NAMES = {
    "data": "data, split and order",
    "start": "initial weights",
    "steps": "loss of every step",
    "weights": "final weights",
    "optimizer": "optimizer state",
    "random": "state of the random generators",
    "metrics": "counts and averages",
    "decisions": "decisions",
}


if __name__ == "__main__":
    with clear_messages():
        sys.exit(main(sys.argv[1:]))
