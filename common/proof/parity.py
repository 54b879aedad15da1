"""Holds two runs against each other, stage by stage, and names the first difference.

`python -m common.proof.parity LESSON [options]` runs whichever side has not been run with these
options, compares the two results and prints a table. Without a lesson it does so for all of them,
and ends with one table. Exit status 0: all agree; 1: they differ; 2: they cannot be compared.
"""

from common import ROOT, SIDES, pretrained, results
from common.data import is_here
from common.messages import BadInput, clear_messages, printable
from common.networks import NETWORKS
from common.proof.explain import draw, explain
from common.proof.fingerprints import code_sha256, versions
from common.proof.lessons import lessons, load
from common.proof.watch import Result, at_chance, hyperparameters
from common.run import parse
from common.signals import Terminated

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
    names = [name for name in CHECKS if name != "checkpoints"]
    # Some lessons write none.
    names += ["checkpoints"] * bool(a["checkpoints"] or b["checkpoints"])
    return compare_stages(a, b, names)


def compare_stages(a: Result, b: Result, names: Sequence[str]) -> Comparison:
    """Compare two results in the stages that are named, each only if those before it are equal."""
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


def _checkpoints(a: Result, b: Result) -> tuple[int, str | None]:
    """Check which checkpoints were left: of which epoch and step, with which weights."""
    ours, theirs = a["checkpoints"], b["checkpoints"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return len(ours), f"{name}: {_sides(a, ours.get(name), b, theirs.get(name))}"
    return len(ours), None


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
    """Say in a few words what a fingerprint stands for."""
    if not isinstance(value, dict) or not value.keys() >= {"shape", "norm"}:
        return f"{value}"[:12]
    return f"{'x'.join(map(str, value['shape']))} of norm {value['norm']!r}"


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


# From here on: the command.


def main(argv: list[str]) -> int:
    """Compare the two sides of one lesson, or of all; return the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(
            "usage: python -m common.proof.parity [LESSON] [options]\n"
            f"Compare both sides of a lesson ({', '.join(lessons())}), or of all,\n"
            "with the lesson's options, which LESSON --help lists; for all lessons, with those\n"
            "that all have."
        )
        return 0
    names = lessons()
    if argv and not argv[0].startswith("-"):
        names, argv = argv[:1], argv[1:]
        if names[0] not in lessons():
            raise BadInput(f"there is no lesson '{names[0]}'; there are: {', '.join(lessons())}.")
    # Read for all before anything is run: an option that one lesson lacks ends it here.
    settings = {name: settings_of(name, argv) for name in names}
    pairs = []
    for args in settings.values():
        start = Path(getattr(args, "start_from", "") or "").resolve()
        if (args.runs_dir / args.lesson).resolve() in start.parents:
            raise BadInput(
                f"--start-from '{start}' is in the folder of a run that will be moved "
                "away for the new one; copy the file elsewhere and name the copy."
            )
        for side in SIDES:
            if status := run_if_needed(side, args, argv):
                return status
        a, b = (read_result(side, args) for side in SIDES)
        pairs.append((a, b, compare_results(a, b)))
        show(*pairs[-1])
        losses = [a["train_loss"], b["train_loss"]]
        if first := pairs[-1][2].first_difference:
            print(explain(args, argv, first.name, losses))
        picture = args.runs_dir / args.lesson / "parity.png"
        draw(losses, f"{args.lesson} on {a['data']}: both sides", picture)
        print(printable(f"Both loss curves, and their difference: {picture}"))
    if len(pairs) > 1:
        show_all(pairs)
    return 0 if all(comparison.agree for _, _, comparison in pairs) else 1


def settings_of(lesson: str, argv: list[str]) -> Any:
    """Return the Args of a lesson for a command line; `ckpt_path` is left to the sides."""
    return parse(load("plain", lesson).Args, ROOT / "plain" / f"{lesson}.py", argv)


def run_if_needed(side: str, args: Any, argv: list[str]) -> int:
    """Run one side, unless its result is there; return the exit status."""
    reason = why_run(read_result(side, args), side, args)
    if not reason:
        return 0
    print(f"{reason}: running the {side} side of {args.lesson}.", flush=True)
    command = [sys.executable, str(ROOT / side / f"{args.lesson}.py"), *argv]
    status = _wait_for(subprocess.Popen(command))
    if status < 0:
        name = signal.Signals(-status).name
        raise BadInput(f"the {side} side of {args.lesson} was ended by {name}; run it again.")
    return status if status in (0, 130, 143) else 2  # a side that broke off is no difference


def _wait_for(process: subprocess.Popen) -> int:
    """Return the exit status; after Ctrl-C or SIGTERM the other process says so, and ends first."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # it has got it, too
        except Terminated:
            process.terminate()


def read_result(side: str, args: Any) -> Result:
    """Return what result.json holds, {} without one; raise BadInput where it is broken."""
    path = args.runs_dir / args.lesson / side / "result.json"
    result = results.read(path)
    if result and (result["lesson"], result["side"]) != (args.lesson, side):
        fault = f"is of the {result['side']} side of {result['lesson']}"
        raise BadInput(f"the result '{path}' {fault}; remove it, and let that side run again.")
    return result


def why_run(result: Result, side: str, args: Any) -> str:
    """Say why a side has to be run; "" where today's code, packages and data made its result."""
    if not result:
        return "There is no result yet"
    data = next(network.data for network in NETWORKS if network.lesson == args.lesson)
    if result.get("data") != data and args.data == "auto" and is_here(args.data_dir, data):
        return f"The shapes stood in for {data}, but the real images are here now"
    if getattr(args, "weights", "") == "auto" and pretrained.came_after(
        args.backbone, args.runs_dir / args.lesson / side / "result.json"
    ):
        return "Random weights stood in, but the pretrained ones are here now"
    changed = [name for name, _, _ in _other(result.get("code_sha256"), code_sha256(side))]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{changed[0]}{more} has changed since its run"
    wanted = {"seed": args.seed, "threads": args.threads} | hyperparameters(args)
    made = {"seed": result.get("seed"), "threads": result.get("threads")}
    made |= result.get("hyperparameters") or {}
    for name, then, now in _other(made, wanted) + _other(result.get("versions"), versions()):
        return f"Its last run had {name} {then}, and {now} is asked for"
    return ""


def _other(then: Any, now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the names whose values differ, with both values; one that is missing is None."""
    then = then if isinstance(then, dict) else {}
    names = [*now, *(name for name in then if name not in now)]
    return [(n, then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)]


def show(a: Result, b: Result, comparison: Comparison) -> None:
    """Print the comparison as a table, with the verdict under it."""
    title = f"{a['lesson']} on {a['data']}: {a['side']} and {b['side']}"
    times = ", ".join(f"{result['side']} {result['train_seconds']:.1f}" for result in (a, b))
    print_stages(title, comparison, ("seconds of training", "", times))
    if comparison.agree:
        steps, accuracy = len(a["train_loss"]), a["test_accuracy"]
        print(f"The two sides agree: {steps:,} batches, test accuracy {accuracy:.2%}.")
        if chance := at_chance(a):
            print(f"Both are still at {chance}: they agree, but there was little to agree on.")


def print_stages(title: str, comparison: Comparison, *more: tuple[str, str, str]) -> None:
    """Print the stages as a table, `more` rows under them, and the first difference if any."""
    table = Table(title=title, title_justify="left")
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
    for row in more:
        table.add_row(*row)
    Console().print(table)
    if first := comparison.first_difference:
        where = NAMES[first.name]
        print(printable(f"The two sides differ, first in {where}: {first.difference}."))


def show_all(pairs: list[tuple[Result, Result, Comparison]]) -> None:
    """Print one table of all lessons."""
    table = Table(title="all lessons: plain and lightning", title_justify="left")
    for name in ("lesson", "data"):
        table.add_column(name)
    for name in ("batches", "compared", "test accuracy", "train seconds"):
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
    "random": "random-number generators",
    "metrics": "counts and averages",
    "checkpoints": "checkpoints",
}


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
