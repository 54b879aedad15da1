"""Measure what a trace costs: `make bench-trace`.

Trains the network of the lesson cifar on batches that are already there, without a trace, with one
of each step and with one of each tenth, in turns. Prints the medians of the ratios to the training
without, with their spread, and the size of the files; writes nothing else.
"""

from common.messages import Parser, clear_messages
from common.models import DeepNet, Net

import contextlib
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from samebits import Trace

THIN = 10


def train(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """Make that many steps on one batch; return the seconds."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - began


def measure(model: type, batch_size: int, steps: int, rounds: int) -> tuple[list, list, int]:
    """Return the ratios with a trace of each step, of each tenth, and the bytes of one step."""
    net = model()
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.arange(batch_size) % 10
    train(net, images, labels, THIN)
    every: list[float] = []
    thin: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.trace"
        for _ in range(rounds):
            without = train(net, images, labels, steps)
            with Trace(net, path=path, every=THIN):
                thin.append(train(net, images, labels, steps) / without)
            with Trace(net, path=path):
                every.append(train(net, images, labels, steps) / without)
        size = path.stat().st_size // steps
    return every, thin, size


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.trace", description="Measure what a trace costs.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps in each round")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(
        title="time of a step with a trace, relative to one without", title_justify="left"
    )
    for name in ("network", "batch", "each step traced", "each tenth", "bytes a step"):
        table.add_column(name, justify="right")
    for model in (Net, DeepNet):
        for batch_size in (4, 32, 128):
            every, thin, size = measure(model, batch_size, given.steps, given.rounds)
            cells = (f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"
                     for r in (every, thin))  # fmt: skip
            table.add_row(model.__name__, f"{batch_size}", *cells, f"{size:,}")
    console = Console(width=100)
    console.print(table)
    print(f"{given.rounds} rounds of {given.steps} steps, in turns; one thread; median and range.")
    with contextlib.suppress(OSError):
        names = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        print(names[0].split(":")[1].strip(), end="; ")
    print(f"Python {platform.python_version()}, torch {torch.__version__}.")


if __name__ == "__main__":
    with clear_messages():
        sys.exit(main(sys.argv[1:]))
