"""Holds two runs against each other, stage by stage, and names the first difference.

`python -m common.proof.parity LESSON [options]` runs whichever side has not been run with these
options, compares the two results and prints a table. Without a lesson it does so for all of them,
and ends with one table. Exit status 0: all agree; 1: they differ; 2: they cannot be compared.
"""

from common import ROOT, pretrained, results, script_of, sides_of
from common.data import is_here
from common.messages import BadInput, clear_messages, printable
from common.networks import data_of
from common.proof.compare import (
    NAMES,
    RELATIVE,
    Comparison,
    as_data,
    compare_results,
    measure,
)
from common.proof.explain import draw, explain
from common.proof.fingerprints import code_sha256, versions
from common.proof.lessons import lessons, load
from common.proof.watch import Result, at_chance, hyperparameters
from common.run import parse
from common.signals import Terminated

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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
        ran = []
        for side in sides_of(args.lesson):
            ran.append(run_if_needed(side, args, argv))
            if ran[-1]:
                return ran[-1]
        if not any(status is not None for status in ran):
            folder = printable(f"{args.runs_dir / args.lesson}/")
            print(f"All sides have been run with these settings: comparing what is in {folder}.")
        a, b, *third = (read_result(side, args) for side in sides_of(args.lesson))
        for other in (b, *third):
            pairs.append((a, other, compare_results(a, other)))
            show(*pairs[-1])
        losses = [a["train_loss"], b["train_loss"]]
        if first := compare_results(a, b).first_difference:
            print(explain(args, argv, first.name, losses))
        picture = args.runs_dir / args.lesson / "parity.png"
        draw(losses, f"{args.lesson} on {a['data']}: both sides", picture)
        print(printable(f"Both loss curves, and their difference: {picture}"))
        proof = json.dumps(as_data(a, b, compare_results(a, b)), indent=1)
        picture.with_suffix(".json").write_text(f"{proof}\n", encoding="utf-8")
    if len(pairs) > 1:
        show_all(pairs)
    return 0 if all(comparison.agree for _, _, comparison in pairs) else 1


def settings_of(lesson: str, argv: list[str]) -> Any:
    """Return the Args of a lesson for a command line; `ckpt_path` is left to the sides."""
    return parse(load("plain", lesson).Args, ROOT / "plain" / f"{lesson}.py", argv)


def run_if_needed(side: str, args: Any, argv: list[str]) -> int | None:
    """Run one side, and return the exit status; None where its result is there."""
    reason = why_run(read_result(side, args), side, args)
    if not reason:
        return None
    print(f"{reason}: running the {side} side of {args.lesson}.", flush=True)
    command = [sys.executable, str(script_of(side, args.lesson)), *argv]
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
    data = data_of(args.lesson)
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
        # Where two networks train against each other, a batch has a backward pass for each.
        of = "batches" if "scores" not in a else "losses"
        print(f"The two sides agree: {len(a['train_loss']):,} {of}, {measure(a)}.")
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
    table = Table(title="all lessons: plain and the others", title_justify="left")
    for name in ("lesson", "data"):
        table.add_column(name)
    for name in ("batches", "compared", "test", "train seconds"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for a, b, comparison in pairs:
        first = comparison.first_difference
        table.add_row(
            a["lesson"] + ("" if b["side"] == "lightning" else f", {b['side']}"),
            a["data"],
            f"{len(a['train_loss']):,}",
            f"{sum(stage.compared for stage in comparison.stages):,}",
            measure(a).removeprefix("test accuracy "),
            f"{a['train_seconds']:.1f}, {b['train_seconds']:.1f}",
            f"DIFFERENT: {NAMES[first.name]}" if first else "equal",
        )
    Console().print(table)
    agreeing = sum(comparison.agree for _, _, comparison in pairs)
    print(f"The sides agree in {agreeing} of {len(pairs)} comparisons.")


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
