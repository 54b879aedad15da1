"""Measure what the Trainer costs in each step, and what a loop can waste: `make bench`.

Six ways to train the same network on the same images, in turns, in one process, for two networks
and four batch sizes:

floor     forward, backward and step, on batches that are already there
plain     the lesson plain/cifar.py, its whole main
tutorial  the tutorial's own form: PIL images one by one, DataLoader's defaults, loss.item()
bare      Lightning with barebones=True: no logger, no bar, no checkpoints
lesson    the lesson lightning/cifar.py, its whole main, with its logger and its bar
defaults  Lightning with all its defaults: logger, bar, checkpoints, summary; self.log in each step

Writes overhead.json and overhead.png into --output, and the tables into the page of that name
beside the folder, docs/speed.md.
"""

from bench.parallel import machine_now, number, numbers
from bench.report import fill, read_measured
from bench.ring import markdown
from bench.workers import lesson
from common import ROOT, SIDES, figures
from common.data import Data, Images, make_loader
from common.folders import write_whole
from common.messages import Parser, clear_messages
from common.models import DeepNet, Net
from common.networks import TO_ONE
from common.proof.fingerprints import versions
from common.run import default_threads, ready
from common.shapes import CLASSES, draw_shapes

import argparse
import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torchvision import transforms

WARM_UP = 2  # steps before the clock starts
EVALUATED = 8  # images to validate and to test on: a lesson does both, and no clock runs then
SECONDS = 0.4  # that the steps of one measurement shall take
PROFILED = (4, 128)  # batch sizes
MODELS: dict[str, type[nn.Module]] = {"Net": Net, "DeepNet": DeepNet}
WAYS = ("floor", "plain", "tutorial", "bare", "lesson", "defaults")
# How each way is drawn: its name, its colour, its mark.
DRAWN = {
    "floor": ("floor", figures.GREY, ""),
    "plain": ("plain loop", figures.BLUE, "o"),
    "tutorial": ("the tutorial's form", "black", "s"),
    "bare": ("Lightning, bare", figures.GREEN, "^"),
    "lesson": ("Lightning, the lesson", figures.ORANGE, "D"),
    "defaults": ("Lightning, its defaults", figures.PURPLE, "v"),
}


class Case(NamedTuple):
    """One thing to measure."""

    way: str
    model: str
    batch_size: int


class Clock:
    """Called after each optimizer step; takes the time of those after the warm-up."""

    def __init__(self, steps: int) -> None:
        self.last, self.done, self.began, self.ended = WARM_UP + steps, 0, 0.0, 0.0

    def __call__(self, *_: Any) -> None:
        self.done += 1
        if self.done == WARM_UP:
            self.began = time.perf_counter()
        elif self.done == self.last:
            self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        assert self.ended, f"{self.done} steps were made, and not {self.last}"
        return (self.ended - self.began) / (self.last - WARM_UP)


# The six ways. Each makes `steps` optimizer steps; the clock listens to the optimizer.


def floor(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)
    batch = next(iter(make_loader(data.train, args)))
    for images, labels in [batch] * steps:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def plain(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    run_lesson("plain", args, data, net)


def run_lesson(side: str, args: Any, data: Data, net: nn.Module) -> None:
    """Call the lesson's main, with images and a network that it would not find by itself."""
    module, found = lesson(side, "cifar"), {"load_images": lambda *_: data, "Net": lambda: net}
    with patch.multiple(module, **found, summary=lambda *_, **__: None):
        module.main(args)


class PILImages(torch.utils.data.Dataset):
    """As torchvision's CIFAR10 hands them out: each image through PIL and the transforms."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = images.images.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        half = (0.5, 0.5, 0.5)
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(half, half)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def tutorial(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    loader = DataLoader(PILImages(data.train), batch_size=args.batch_size, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)
    running_loss = 0.0
    for step, (inputs, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(net(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if step + 1 == steps:
            break


class Small(L.LightningModule):
    """The least that the Trainer needs; with log, what its documentation shows."""

    def __init__(self, net: nn.Module, args: Any, log: bool) -> None:
        super().__init__()
        self.net, self.args, self.logs = net, args, log

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        if self.logs:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.args.lr, self.args.momentum)


def bare(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    trainer = L.Trainer(barebones=True, max_steps=steps, accelerator="cpu", devices=1)
    trainer.fit(Small(net, args, log=False), make_loader(data.train, args))


def as_shipped(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    run_lesson("lightning", args, data, net)


def defaults(args: Any, data: Data, net: nn.Module, steps: int) -> None:
    # Where to, and how long, and on what: the rest is Lightning's own.
    trainer = L.Trainer(
        default_root_dir=args.runs_dir, max_steps=steps, accelerator="cpu", devices=1
    )
    trainer.fit(Small(net, args, log=True), make_loader(data.train, args))


RUN: dict[str, Callable[..., None]] = {
    "floor": floor, "plain": plain, "tutorial": tutorial, "bare": bare, "lesson": as_shipped,
    "defaults": defaults,
}  # fmt: skip


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Let what is printed go to a terminal that nobody sees: bars are drawn only on one."""
    master, slave = pty.openpty()
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    with (
        os.fdopen(slave, "w", buffering=1) as unseen,
        contextlib.redirect_stdout(unseen),
        contextlib.redirect_stderr(unseen),
    ):
        yield


def _drain(master: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(master, 65536):
            pass
    os.close(master)


def drawn(count: int) -> Data:
    """Return so many drawn images to train on, and a few to validate and to test on."""
    pixels, labels = draw_shapes(count, seed=1)
    few = {"train": count, "val": EVALUATED, "test": EVALUATED}
    return Data(*(
        Images(pixels[:n], labels[:n], TO_ONE, split=split, name="shapes", classes=CLASSES)
        for split, n in few.items()
    ))  # fmt: skip


def measure_one(case: Case, data: Data, steps: int) -> float:
    """Return the seconds of one step."""
    torch.manual_seed(0)
    net = MODELS[case.model]()
    side = "lightning" if case.way == "lesson" else "plain"
    clock = Clock(steps)
    hook = register_optimizer_step_post_hook(clock)
    try:
        with tempfile.TemporaryDirectory() as folder, terminal():
            # As the lesson is shipped: batches, logging, bar and threads of its command line.
            args = lesson(side, "cifar").Args(
                batch_size=case.batch_size, max_epochs=1, limit_train_batches=WARM_UP + steps,
                accelerator="cpu", refresh_rate=100, runs_dir=Path(folder),
            )  # fmt: skip
            args = ready(args, ROOT / side / "cifar.py")
            torch.set_num_threads(args.threads)
            RUN[case.way](args, data, net, WARM_UP + steps)
    finally:
        hook.remove()
    return clock.seconds


def measure(batch_sizes: list[int], rounds: int) -> dict[str, Any]:
    """Return what overhead.json holds."""
    machine = machine_now()
    most = max(batch_sizes) * 12
    data = drawn(max(most, 4000))
    cases = [Case(way, model, size) for model in MODELS for size in batch_sizes for way in WAYS]
    steps = {}
    for case in cases:
        if case.way == "floor":  # also a warm-up: kernels are chosen, memory is fetched
            once = measure_one(case, data, 2)
        fits = len(data.train) // case.batch_size - WARM_UP - 1  # in one epoch
        steps[case] = max(2, min(int(SECONDS / once), fits, 400))
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in track(range(rounds), "measuring", disable=not sys.stdout.isatty()):
        # Every other round the other way about: who comes first shall not matter.
        for case in cases if turn % 2 == 0 else reversed(cases):
            times[case].append(measure_one(case, data, steps[case]))
    return {
        "machine": machine,
        "versions": versions(),
        "setting": {"rounds": rounds, "threads": {b: default_threads(b) for b in batch_sizes}},
        "steps": [
            {**case._asdict(), "count": steps[case], "seconds": times[case]} for case in cases
        ],
        "profile": [profile(data, rounds, size) for size in PROFILED if size in batch_sizes],
        "start": [start(side) for _ in range(rounds) for side in SIDES],
    }


# Where the lesson's extra time goes.


class Watch:
    """Adds up the time within some of the Trainer's functions; inner ones count for themselves."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside: list[float] = []

    def around(self, owner: Any, name: str, what: str) -> Callable[[], None]:
        """Put a clock around a method; return what takes it away."""
        usual = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            began = time.perf_counter()
            try:
                return usual(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                own = took - self.inside.pop()
                self.seconds[what] = self.seconds.get(what, 0.0) + own
                if self.inside:
                    self.inside[-1] += took

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, usual)


def profile(data: Data, rounds: int, batch_size: int) -> dict[str, Any]:
    """Return the seconds of a step of the lesson with Net, by what they go to."""
    from lightning.pytorch import callbacks, loops, trainer
    from lightning.pytorch.loops import fetchers
    from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

    calls, connector = trainer.call, logger_connector._LoggerConnector
    automatic = loops.optimization.automatic._AutomaticOptimization
    module = lesson("lightning", "cifar")
    watched = [
        (L.LightningModule, "log", "logging: self.log"),
        (connector, "on_batch_start", "logging: around it"),
        (connector, "on_batch_end", "logging: around it"),
        (connector, "update_train_step_metrics", "logging: around it"),
        (callbacks.TQDMProgressBar, "on_train_batch_start", "the bar"),
        (callbacks.TQDMProgressBar, "on_train_batch_end", "the bar"),
        (fetchers._PrefetchDataFetcher, "__next__", "fetching a batch"),
        (calls, "_call_callback_hooks", "hooks: calling those of callbacks"),
        (calls, "_call_lightning_module_hook", "hooks: calling those of the module"),
        (calls, "_call_strategy_hook", "hooks: calling those of the strategy"),
        (automatic, "run", "optimizer: closure, precision, progress"),
        (L.LightningModule, "backward", "backward pass"),
        (module.LitClassifier, "training_step", "training_step, the lesson's own"),
        (torch.optim.SGD, "zero_grad", "zero_grad"),
        # Not SGD.step: PyTorch would wrap it once more, and the clock hear of each step twice.
        (sys.modules["torch.optim.sgd"], "sgd", "the update itself"),
    ]  # fmt: skip
    case = Case("lesson", "Net", batch_size)
    steps = min(300, len(data.train) // batch_size - WARM_UP - 1)  # in one epoch
    without: dict[str, dict[str, Any]] = {
        "without the bar": dict(enable_progress_bar=False, callbacks=[]),
        "without the logger": dict(logger=False),
    }
    whole: list[float] = []
    by_hand: list[float] = []
    timed: list[tuple[float, dict[str, float]]] = []
    less: dict[str, list[float]] = {what: [] for what in without}
    for _ in range(rounds):
        by_hand.append(measure_one(case._replace(way="plain"), data, steps))
        whole.append(measure_one(case, data, steps))
        for what, more in without.items():
            less[what].append(without_(case, data, steps, more))
        watch = Watch()
        undo = [watch.around(*each) for each in watched]
        try:
            seconds = measure_one(case, data, steps)
        finally:
            for each in reversed(undo):
                each()
        made = steps + WARM_UP
        timed.append((seconds, {what: s / made for what, s in watch.seconds.items()}))
    # The parts of the round whose step took the median time: then they add up.
    seconds, parts = sorted(timed, key=lambda pair: pair[0])[len(timed) // 2]
    return {
        "case": case._asdict(),
        "seconds": median(whole),
        "seconds_by_hand": median(by_hand),
        "seconds_while_watched": seconds,
        "parts": parts,
        "without": {what: median(s) for what, s in less.items()},
    }


def without_(case: Case, data: Data, steps: int, more: dict[str, Any]) -> float:
    """Return the seconds of a step of the lesson with other arguments of the Trainer."""
    usual = L.Trainer

    def changed(**arguments: Any) -> Any:
        return usual(**(arguments | more))

    module = lesson("lightning", "cifar")
    module.L.Trainer = changed
    try:
        return measure_one(case, data, steps)
    finally:
        module.L.Trainer = usual


# Starts a command and prints its peak memory. A process's own peak begins with the memory of the
# one that started it: this one is large, and would be measured in place of its child.
SMALL_PARENT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


ONE_BATCH = [w for s in ("train", "val", "test") for w in (f"--limit-{s}-batches", "1")]


def start(side: str) -> dict[str, Any]:
    """Start a side of the lesson for one step; return seconds until its end, and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SMALL_PARENT, sys.executable]
        command += [str(ROOT / side / "cifar.py"), "--data", "shapes", "--runs-dir", folder]
        command += ["--max-epochs", "1", *ONE_BATCH]
        began = time.perf_counter()
        peak = int(subprocess.check_output(command))
        took = time.perf_counter() - began
    imports = "import lightning" if side == "lightning" else "import torch"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", imports], check=True)
    return {
        "side": side, "import": time.perf_counter() - began, "one_step": took,
        "peak_memory": peak * (1 if sys.platform == "darwin" else 1024),
    }  # fmt: skip


# What is shown.


def ratios(found: dict[str, Any], way: str, to: str, model: str, batch_size: int) -> list[float]:
    """Return the ratio of two ways in each round."""
    times = {
        row["way"]: row["seconds"]
        for row in found["steps"]
        if (row["model"], row["batch_size"]) == (model, batch_size)
    }
    return [ours / theirs for ours, theirs in zip(times[way], times[to], strict=True)]


def step_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the table: milliseconds of the floor, and each way's ratio to it."""
    rows = [["network", "batch", "floor", *(way for way in WAYS if way != "floor")]]
    for row in found["steps"]:
        if row["way"] == "floor":
            cells = [row["model"], f"{row['batch_size']}", f"{1e3 * median(row['seconds']):.2f} ms"]
            for way in WAYS[1:]:
                r = ratios(found, way, "floor", row["model"], row["batch_size"])
                cells.append(f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})")
            rows.append(cells)
    return rows


GOALS = (
    # what, way, to, batch size, whether it must be at most (or at least) the bound
    ("plain / floor", "plain", "floor", 128, "at most", 1.05),
    ("plain / floor", "plain", "floor", 4, "at most", 1.20),
    ("lesson / plain", "lesson", "plain", 128, "at most", 1.05),
    ("lesson / plain", "lesson", "plain", 4, "at most", 1.50),
    ("tutorial / plain", "tutorial", "plain", 4, "at least", 1.4),
    ("tutorial / plain", "tutorial", "plain", 128, "at least", 2.5),
    ("bare / plain", "bare", "plain", 4, "", 0.0),
    ("defaults / plain", "defaults", "plain", 4, "", 0.0),
)


def goal_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the ratios that the project has set itself, for Net."""
    rows = [["ratio", "batch", "measured, median of the rounds", "aim", ""]]
    sizes = {row["batch_size"] for row in found["steps"]}
    for what, way, to, batch_size, word, bound in GOALS:
        if batch_size not in sizes:
            continue
        r = ratios(found, way, to, "Net", batch_size)
        kept = median(r) <= bound if word == "at most" else median(r) >= bound
        verdict = "" if not word else "reached" if kept else "not reached"
        aim = f"{word} {bound:g}" if word else ""
        cells = [what, f"{batch_size}", f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})", aim]
        rows.append([*cells, verdict])
    return rows


def profile_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return where a step of the lesson goes: a column for each batch size that was profiled."""
    rows = [["part of a step of the lesson, Net"]]
    rows[0] += [f"batch of {p['case']['batch_size']}" for p in found["profile"]]
    columns = [
        {
            **dict(sorted(p["parts"].items(), key=lambda item: -item[1])),
            "the rest of the loop: counting, checking, asking who is due": (
                p["seconds_while_watched"] - sum(p["parts"].values())
            ),
            "all, while it is watched": p["seconds_while_watched"],
            "all, unwatched": p["seconds"],
            **{f"all, unwatched, {what}": s for what, s in p["without"].items()},
            "all, by hand: the plain lesson": p["seconds_by_hand"],
        }
        for p in found["profile"]
    ]
    rows += [[what, *(f"{1e6 * c[what]:,.0f} µs" for c in columns)] for what in columns[0]]
    return rows


def start_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return what a start takes: the median of the rounds, the least and the most."""
    rows = [["side", "import of its library", "the whole command, for one step", "peak memory"]]
    shown = {
        "import": (1, ".1f", "s"),
        "one_step": (1, ".1f", "s"),
        "peak_memory": (1e6, ".0f", "MB"),
    }
    for side in SIDES:
        rows.append([side])
        for what, (unit, form, name) in shown.items():
            every = [row[what] / unit for row in found["start"] if row["side"] == side]
            middle, least, most = (f"{x:{form}}" for x in (median(every), min(every), max(every)))
            rows[-1].append(f"{middle} {name} ({least} to {most})")
    return rows


def draw(found: dict[str, Any]) -> Figure:
    """Draw each way's ratio to the floor, by batch size, a panel for each network."""
    sizes = sorted({row["batch_size"] for row in found["steps"]})
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(MODELS)), MODELS, strict=True):
        for way in WAYS[1:]:
            every = [ratios(found, way, "floor", model, size) for size in sizes]
            middle = [median(r) for r in every]
            spread = [
                [m - min(r) for m, r in zip(middle, every, strict=True)],
                [max(r) - m for m, r in zip(middle, every, strict=True)],
            ]
            label, color, mark = DRAWN[way]
            panel.errorbar(range(len(sizes)), middle, spread, label=label, color=color,
                           marker=mark, capsize=3)  # fmt: skip
        panel.axhline(1, color=DRAWN["floor"][1], linestyle="--", label="floor")
        panel.set_yscale("log")
        panel.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        panel.minorticks_off()
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set(title=model, xlabel="images in a batch", ylabel="time of a step / floor")
        panel.legend(fontsize="small")
    return figure


def made_on(found: dict[str, Any]) -> str:
    """Say in a paragraph what was measured, where, and what was equalised."""
    m, v = found["machine"], found["versions"]
    threads = ", ".join(f"{n} for {b}" for b, n in found["setting"]["threads"].items())
    return (
        f"Measured on {m['cpu']}, {m['cores']} cores, load {m['load_average_at_start']} before it "
        f"began; Python {v['python']}, torch {v['torch']}, lightning {v['lightning']}. Median of "
        f"{found['setting']['rounds']} rounds, in brackets the least and the most; ratios within a "
        "round, all ways in turns in one process. The same for all: network and initial weights, "
        "SGD with momentum, batch size, the built-in shapes as bytes in memory (the tutorial's "
        "form makes PIL images of them), one process, no workers, no validation, a terminal for "
        f"the bars. Threads by batch, as the lesson takes them: {threads}."
    )


def tables(found: dict[str, Any]) -> dict[str, list[list[str]]]:
    return {
        "Time of a step, relative to the floor": step_rows(found),
        "What the project has set itself, for Net": goal_rows(found),
        "Where the lesson's time goes": profile_rows(found),
        "Starting": start_rows(found),
    }


def texts(found: dict[str, Any]) -> dict[Path, str]:
    """Return what stands between the marks of each page."""
    every = [f"**{title}**\n\n{markdown(*rows)}" for title, rows in tables(found).items()]
    return {ROOT / "docs" / "speed.md": "\n\n".join([made_on(found), *every])}


def write(found: dict[str, Any], output: Path) -> None:
    """Write overhead.json, overhead.png and the tables of the pages; print the tables."""
    for title, rows in tables(found).items():
        table = Table(*rows[0], title=title, title_justify="left")
        for row in rows[1:]:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    picture = io.BytesIO()
    draw(found).savefig(picture, format="png", dpi=100)
    write_whole(output / "overhead.png", lambda path: path.write_bytes(picture.getvalue()))
    text = json.dumps(found, indent=1) + "\n"
    write_whole(output / "overhead.json", lambda path: path.write_text(text))
    print(f"Written to {output}/: overhead.json, overhead.png")
    if output.resolve() != ROOT / "docs" / "speed":
        return  # a trial, which shall not change the pages
    for page, inside in texts(found).items():
        filled = fill(page.read_text(), {"overhead": inside}, "bench.overhead")
        write_whole(page, lambda path, filled=filled: path.write_text(filled))
        print(f"The tables of {page} are written anew.")


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="bench.overhead",
        description="Measure what a step costs by hand and in the Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch-sizes", type=numbers, default="4 32 128 512", metavar="N", help="images in a step")
    add("--rounds", type=number, default=5, metavar="N", help="how often all is measured")
    add("--output", type=Path, default=ROOT / "docs" / "speed", metavar="DIR", help="for results")
    add("--tables", action="store_true", help="measure nothing; write tables and picture anew")
    given = parser.parse_args(argv)
    path = given.output / "overhead.json"
    if given.tables:
        found = read_measured(path)
    else:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        given.output.mkdir(parents=True, exist_ok=True)
        found = measure(given.batch_sizes, given.rounds)
    write(found, given.output)


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
