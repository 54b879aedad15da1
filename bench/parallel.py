"""Measure what more processes bring to the lesson `parallel`, on both sides: `make bench-parallel`.

`python -m bench.parallel` starts one group of processes for each number in --devices. The groups
stay; in each round each of them takes its turn, alone, while the others sleep: on each side, with
gradients sent and not sent, then an all-reduce alone. It writes parallel.json and parallel.png into
--output, and the tables into the page of that name beside the folder, docs/scale.md.
"""

from bench import report
from bench.workers import GRADIENTS, WARM_UP, Job, groups, lesson
from common import ROOT, SIDES
from common.data import Data, Images
from common.folders import write_whole
from common.messages import BadInput, Parser, Stopped, clear_messages, notice
from common.networks import TO_ONE
from common.proof.fingerprints import versions
from common.shapes import CLASSES, draw_shapes

import argparse
import itertools
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

MOST_IMAGES = 200_000  # drawn at once, for one epoch: 600 MB


def measure(devices: list[int], batch_sizes: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Return what parallel.json holds: the setting, the machine, and all times, by round."""
    machine = machine_now()
    for side in SIDES:
        lesson(side)
    count = max(batch_sizes) * (WARM_UP + steps)
    drawn = draw_shapes(count, seed=1)
    made = [
        Images(*drawn, TO_ONE, split=split, name="shapes", classes=CLASSES)
        for split in ("train", "val", "test")
    ]
    data = Data(*made)
    asked = [
        Job(number, steps, side, batch_size, sync)
        for batch_size in batch_sizes
        for number in devices
        for sync in (True, False)
        for side in SIDES
    ]
    times: dict[Job, list[float]] = {job: [] for job in asked}
    sent: dict[tuple[int, int], list[float]] = {}
    with groups(devices, data) as started:
        for turn in track(range(rounds), "measuring", disable=not sys.stdout.isatty()):
            weights = {}
            # Every other round the other way about: who comes first shall not matter.
            for job in asked if turn % 2 == 0 else reversed(asked):
                answer = started[job.devices].ask(job)
                times[job].append(answer["seconds"])
                weights[job] = answer["weights"]
            check(weights)
            for number in devices[1:]:
                for size, seconds in started[number].ask(Job(number, steps))["all_reduce"].items():
                    sent.setdefault((number, size), []).append(seconds)
    return {
        "setting": {"rounds": rounds, "steps": steps, "threads": 1, "gradient_bytes": GRADIENTS},
        "machine": machine,
        "versions": versions(),
        "steps": [
            {"side": job.side, "batch_size": job.batch_size, "devices": job.devices}
            | {"sync": job.sync, "seconds": seconds}
            for job, seconds in times.items()
        ],
        "all_reduce": [
            {"devices": number, "bytes": size, "seconds": seconds}
            for (number, size), seconds in sent.items()
        ],
    }


def check(weights: dict[Job, list[str]]) -> None:
    """Raise Stopped unless the two sides did the same, and sent gradients where they were to."""
    for job, ours in weights.items():
        if ours != weights[job._replace(side="plain")]:
            raise Stopped(f"The two sides end with other weights, so not compared: {job}.", 1)
        if len(set(ours)) != (1 if job.sync else job.devices):
            raise Stopped(f"The processes' weights are not as `sync` says: {job}.", 1)


def machine_now() -> dict[str, Any]:
    """Return the processor, the cores that may be used, and how many programs are running."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    load = os.getloadavg()[0]
    if load > 0.5:
        notice(
            f"The load average is {load:.1f}: other programs are running here.",
            "The times are theirs, too; measure again when it is quiet.",
        )
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": len(allowed(0)), "load_average_at_start": round(load, 2)}


def print_measured(table: Table, how: str, machine: dict[str, Any]) -> None:
    """Print a table, and below it how and where its numbers were measured."""
    Console(width=100).print(table)
    load = machine["load_average_at_start"]
    print(f"{how}; {machine['cpu']}, load {load} before; torch {versions()['torch']}.")


def numbers(text: str) -> list[int]:
    """Read an option's list of numbers; argparse says what is wrong with another one."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on such as '1 2', got '{text}'")
    return sorted({int(word) for word in words})


def number(text: str) -> int:
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"expected one number from 1 on, got '{text}'")
    return found[0]


def main(argv: list[str]) -> None:
    """Measure, or take what was measured before, and write and print what follows from it."""
    parser = Parser(
        prog="bench.parallel",
        description="Measure a training step of the lesson parallel with 1, 2, 4 processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", type=numbers, default="1 2 4", metavar="N", help="numbers of processes")
    add("--batch-sizes", type=numbers, default="32 512", metavar="N", help="images in a step")
    add("--rounds", type=number, default=7, metavar="N", help="how often all is measured")
    add("--steps", type=number, default=40, metavar="N", help="steps that are timed in each round")
    add("--output", type=Path, default=ROOT / "docs" / "scale", metavar="DIR", help="for results")
    add("--tables", action="store_true", help="measure nothing; write tables and picture anew")
    given = parser.parse_args(argv)
    most = 4 * (os.cpu_count() or 1)
    if given.devices[0] != 1 or len(given.devices) == 1 or given.devices[-1] > most:
        raise BadInput(f"--devices must be 1 and larger numbers up to {most}, such as '1 2'.")
    for devices, size in itertools.product(given.devices, given.batch_sizes):
        if size % devices:
            raise BadInput(f"--batch-sizes {size} cannot be split evenly over {devices} processes.")
    images = given.batch_sizes[-1] * (WARM_UP + given.steps)
    if images > MOST_IMAGES:
        raise BadInput(
            f"--steps {given.steps} with --batch-sizes {given.batch_sizes[-1]} takes {images:,} "
            f"images, and {MOST_IMAGES:,} are the most; name a smaller number, or more --rounds."
        )
    path = given.output / "parallel.json"
    if given.tables:
        found = report.read_measured(path)
    else:
        given.output.mkdir(parents=True, exist_ok=True)
        found = measure(given.devices, given.batch_sizes, given.rounds, given.steps)
        text = json.dumps(found, indent=1) + "\n"
        write_whole(path, lambda path: path.write_text(text))
    report.write(found, given.output)


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
