"""Measure what it costs that a run is watched: `make bench-evidence`.

Makes training steps of the tutorial's network with batches of four images, bare and under Evidence,
in turns in one process: once on batches that are already there, and once with a loader as the
lessons have it. Prints the medians of the ratios with their spread; writes nothing.
"""

from bench.parallel import machine_now, number, print_measured
from common.data import Images, make_loader
from common.messages import Parser, clear_messages
from common.models import Net
from common.networks import TO_ONE
from common.proof.evidence import Evidence
from common.shapes import CLASSES, draw_shapes

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

BATCH_SIZE, AIM = 4, 1.02


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> float:
    """Train on some batches; return the processor's seconds."""
    began = time.process_time()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return time.process_time() - began


def measure(loading: bool, steps: int, rounds: int) -> tuple[list[float], float]:
    """Return the ratio of each round, watched to bare, and the seconds of a bare step."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    drawn = draw_shapes(steps * BATCH_SIZE, seed=1)
    images = Images(*drawn, TO_ONE, split="train", name="shapes", classes=CLASSES)
    args = SimpleNamespace(batch_size=BATCH_SIZE, seed=0, num_workers=0, limit_train_batches=1.0)
    batches: Any = make_loader(images, args)
    batches = batches if loading else list(batches)
    train(net, optimizer, batches)  # kernels are chosen, memory is fetched
    ratios, bare = [], []
    for turn in range(rounds):
        taken = {}
        # Every other round the other way about: who comes first shall not matter.
        for watched in (False, True) if turn % 2 else (True, False):
            with Evidence() if watched else contextlib.nullcontext():
                taken[watched] = train(net, optimizer, batches)
        ratios.append(taken[True] / taken[False])
        bare.append(taken[False] / steps)
    return ratios, median(bare)


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="bench.evidence",
        description="Measure what it costs that a run is watched.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=number, default=41, metavar="N", help="how often")
    parser.add_argument("--steps", type=number, default=500, metavar="N", help="in each round")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = machine_now()
    title = f"processor time of a step with {BATCH_SIZE} images, watched to bare; aim: {AIM}"
    table = Table("batches", "bare", "ratio", "middle half", "all", title=title,
                  title_justify="left")  # fmt: skip
    for what, loading in (("already there", False), ("from a loader", True)):
        ratios, bare = measure(loading, given.steps, given.rounds)
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        table.add_row(
            what, f"{1e6 * bare:.0f} µs", f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )  # fmt: skip
    how = f"{given.rounds} rounds of {given.steps} steps, in turns; one thread"
    print_measured(table, how, machine)


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
