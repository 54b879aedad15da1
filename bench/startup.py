"""Measure what a whole command takes beside the import of its library: `make bench-startup`.

Runs each side of the lesson cifar for one step, validation and test of one batch each, and a bare
import of the library that it stands on, in turns, each in a process of its own. Prints the medians
with their spread; writes nothing.
"""

from bench.parallel import machine_now, number, print_measured
from common import ROOT, SIDES
from common.messages import Parser, clear_messages

import argparse
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from rich.table import Table

# What a side stands on, and how much longer than its import the whole command may take.
LIBRARIES = {"plain": ("torch", 2.5), "lightning": ("lightning", 1.5)}
ONE_STEP = "--data shapes --max-epochs 1 --limit-train-batches 1 --limit-val-batches 1 "
ONE_STEP += "--limit-test-batches 1"


def run(command: list[str]) -> tuple[float, float]:
    """Return the processor's seconds of a command and its children, and the clock's."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after, took = os.times(), time.perf_counter() - began
    spent = after.children_user - before.children_user
    return spent + after.children_system - before.children_system, took


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="bench.startup",
        description="Measure what a whole command takes beside the import of its library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=number, default=7, metavar="N", help="how often")
    given = parser.parse_args(argv)
    machine = machine_now()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = [*ONE_STEP.split(), "--runs-dir", folder]
        commands = {
            (side, what): command
            for side in SIDES
            for what, command in (
                ("import", ["-c", f"import {LIBRARIES[side][0]}"]),
                ("whole", [str(ROOT / side / "cifar.py"), *options]),
            )
        }
        for command in commands.values():
            run(command)  # files are read, shapes are drawn and kept
        for _ in range(given.rounds):
            for key, command in commands.items():
                found.setdefault(key, []).append(run(command))
    title = "one step of cifar, the whole command, and the import alone"
    table = Table("side", "import", "whole command", "ratio", "spread", "aim", "by the clock",
                  title=title, title_justify="left")  # fmt: skip
    for side in SIDES:
        (library, aim), whole, alone = LIBRARIES[side], found[side, "whole"], found[side, "import"]
        ratios, clock = (
            [a[n] / b[n] for a, b in zip(whole, alone, strict=True)] for n in (0, 1)
        )  # fmt: skip
        table.add_row(
            side, f"{library} {median(a for a, _ in alone):.2f} s",
            f"{median(a for a, _ in whole):.2f} s", f"{median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}", f"at most {aim}", f"{median(clock):.2f}",
        )  # fmt: skip
    print_measured(table, f"{given.rounds} rounds, in turns; processor time", machine)


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
