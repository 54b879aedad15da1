"""Measure what a trace costs: `make bench-trace`.

Trains networks on batches that are already there, without a trace, with one of each step and with
one of each tenth, in turns. Prints the medians of the ratios to the training without, in CPU time,
with their spread, and the size of the files; writes nothing else. The network of many tensors has
a million parameters in 100 tensors: what a trace costs grows with their number.
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
from torch import nn

THIN = 10


class ManyTensors(nn.Sequential):
    """50 layers of 140 by 140: 987,000 parameters in 100 tensors, and a head for 10 classes."""

    def __init__(self) -> None:
        layers = [part for _ in range(49) for part in (nn.Linear(140, 140), nn.ReLU())]
        super().__init__(*layers, nn.Linear(140, 10))
        for layer in list(self)[::2]:
            # By default gradients would vanish on their way through 50 layers: Adam would compute
            # with denormal numbers, which is slow, and the trace would seem to cost less.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def batch_of(model: type, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (140,) if model is ManyTensors else (3, 32, 32)
    return torch.randn(size, *shape), torch.arange(size) % 10


def train(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> float:
    """Make that many steps of Adam on one batch; return the seconds of CPU time."""
    inputs, labels = batch
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    began = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return time.process_time() - began


def measure(model: type, batch_size: int, steps: int, rounds: int) -> tuple[list, list, int]:
    """Return the ratios with a trace of each step, of each tenth, and the bytes of a later step."""
    net = model()
    batch = batch_of(model, batch_size)
    train(net, batch, THIN)
    every: list[float] = []
    thin: list[float] = []
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.trace"
        for _ in range(rounds):
            without = train(net, batch, steps)
            for ratios, distance in ((thin, THIN), (every, 1)):
                with Trace(net, path=path, every=distance):
                    train(net, batch, THIN)  # with the first step, which is written in full
                    ratios.append(train(net, batch, steps) / without)
        # The first step is written in full: what one more costs is what counts in a long run.
        for number in (steps, 2 * steps):
            with Trace(net, path=path):
                train(net, batch, number)
            sizes.append(path.stat().st_size)
    return every, thin, (sizes[1] - sizes[0]) // steps


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.trace", description="Measure what a trace costs.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps in each round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 32, 128])
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title="CPU time with a trace, relative to that without", title_justify="left")
    for name in ("network", "batch", "each step traced", "each tenth", "MB per 1,000 steps"):
        table.add_column(name, justify="right")
    for model in (Net, DeepNet, ManyTensors):
        for batch_size in given.batch_sizes:
            every, thin, size = measure(model, batch_size, given.steps, given.rounds)
            cells = (f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"
                     for r in (every, thin))  # fmt: skip
            table.add_row(model.__name__, f"{batch_size}", *cells, f"{size / 1000:.1f}")
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
