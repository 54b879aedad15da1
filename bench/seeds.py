"""Hold the lesson speed against cifar, on the real images, for several seeds: `make bench-speed`.

Trains both lessons on both sides with each seed, `speed` also with a network of its own, in turns,
each training in a process of its own and on one thread, and takes the processor's time of the
training alone (validation between epochs included). Then each of the means of `speed` is taken
away, or added, on the plain side. Writes seeds.json into --output, and the tables into the page of
that name beside the folder, docs/speed.md.
"""

from bench.parallel import machine_now, number
from bench.report import fill, read_measured
from bench.ring import markdown
from common import ROOT, SIDES
from common.data import EpochSampler
from common.download import is_here
from common.folders import read_metrics, write_whole
from common.messages import BadInput, Parser, Stopped, clear_messages
from common.proof.evidence import observed, told
from common.proof.fingerprints import fingerprints, sha256, versions
from common.proof.lessons import load
from common.run import ready

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader

# What is held against each other: a lesson, and its settings. The last one shall take as long as
# cifar and get as far as it can; docs/speed.md has its command line.
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar": ("cifar", {}),
    "speed": ("speed", {}),
    "speed, small network": (
        "speed",
        dict(network="small", batch_size=256, max_epochs=4, limit_train_batches=155, lr=0.1,
             precision="bf16-mixed", weight_decay=0.1, flip="alternate", label_smoothing=0.1,
             freeze_at=1.0, tta=True),
    ),
}  # fmt: skip
# What is changed, and how: each against the recipe as it stands in plain/speed.py. `pixels` is no
# option, but a change of its text.
SIGNED = ("Normalize(CIFAR10_MEAN, CIFAR10_STD)", "Normalize((0.5,) * 3, (0.5,) * 3)")
MEANS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "SGD with Nesterov's momentum, learning rate 0.1": dict(optimizer="sgd", lr=0.1),
    "AdamW, learning rate 0.005": dict(optimizer="adam", lr=0.005),
    "batches of 64, learning rate 0.025": dict(batch_size=64, lr=0.025, limit_train_batches=380),
    "batches of 256, learning rate 0.08": dict(batch_size=256, lr=0.08, limit_train_batches=95),
    "the first layer trained to the end": dict(freeze_at=1.0),
    "without channels_last": dict(channels_last=False),
    "pixels from -1 to 1": dict(pixels="signed"),
    "with weight decay 0.01": dict(weight_decay=0.01),
    "with label smoothing 0.1": dict(label_smoothing=0.1),
    "with mirrored images": dict(flip="random"),
    "with images moved by up to 2 pixels": dict(translate=2),
    "with bfloat16": dict(precision="bf16-mixed"),
    "compiled, the compiling counted": dict(compile=True),
}


class Clock:
    """The processor's time from the first batch that is trained on to the first that is tested."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def begin(self, *_: Any) -> None:
        self.began = self.began or time.process_time()

    def end(self, loader: DataLoader) -> None:
        if loader.dataset.split == "test":  # type: ignore[attr-defined]
            self.ended = self.ended or time.process_time()

    @property
    def seconds(self) -> float:
        assert 0 < self.began < self.ended, "nothing was trained, or nothing tested"
        return self.ended - self.began


def train(side: str, name: str, seed: int, data_dir: Path, **settings: Any) -> dict[str, Any]:
    """Train one side; return its accuracies, its weights' digest, and the processor's seconds."""
    module = load(side, name, *([SIGNED] if settings.pop("pixels", "") == "signed" else []))
    clock = Clock()
    with (
        clear_messages(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        observed(EpochSampler, "__iter__", told(clock.begin)),
        observed(DataLoader, "__iter__", told(clock.end)),
    ):
        args = module.Args(
            seed=seed, accelerator="cpu", threads=1, data="cifar10", data_dir=data_dir,
            runs_dir=Path(folder), **settings,
        )  # fmt: skip
        args = ready(args, ROOT / side / f"{name}.py")
        torch.set_num_threads(args.threads)
        net = module.main(args)
        val, test = read_metrics(args.folder, "val")[-1], read_metrics(args.folder, "test")[-1]
    digest = sha256(json.dumps(fingerprints(net.state_dict())).encode())
    return {
        "side": side, "lesson": name, "seed": seed, "cpu_seconds": clock.seconds,
        "val": val["accuracy"], "test": test["accuracy"], "weights": digest,
    }  # fmt: skip


def train_alone(side: str, name: str, seed: int, data_dir: Path, **settings: Any) -> dict[str, Any]:
    """Train in a process of its own, so that no time depends on what went before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "common.proof.lessons"])  # imported once, for all
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(train, side, name, seed, data_dir, **settings).result()


def measure(seeds: list[int], few: list[int], data_dir: Path) -> dict[str, Any]:
    """Return what seeds.json holds."""
    machine = machine_now()
    jobs = [
        (seed, what, side)
        for seed in seeds
        for what in COMPARED
        for side in SIDES
        if what in ("cifar", "speed") or seed in few  # the others take their time
    ]
    show = dict(disable=not sys.stdout.isatty())
    rows = []
    for seed, what, side in track(jobs, "seeds", **show):
        name, settings = COMPARED[what]
        rows.append({"what": what, **train_alone(side, name, seed, data_dir, **settings)})
    for seed, what, _ in jobs:
        ends = {r["weights"] for r in rows if (r["seed"], r["what"]) == (seed, what)}
        if len(ends) != 1:
            raise Stopped(f"The two sides of {what} end with other weights for seed {seed}.", 1)
    means = []
    for seed in track(few, "means", **show):
        for what, changes in MEANS.items():
            trained = train_alone("plain", "speed", seed, data_dir, **changes)
            means.append({"means": what, **trained})
    return {"machine": machine, "versions": versions(), "seeds": rows, "means": means}


def seed_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each lesson and side: accuracy and time, mean and spread over the seeds."""
    rows = [["what", "side", "test accuracy, each seed", "mean", "processor time", "of cifar's"]]
    for side in SIDES:
        base: dict[int, float] = {}
        for what in COMPARED:
            some = [r for r in found["seeds"] if (r["what"], r["side"]) == (what, side)]
            tests, times = [r["test"] for r in some], [r["cpu_seconds"] for r in some]
            base = base or {r["seed"]: r["cpu_seconds"] for r in some}  # cifar comes first
            share = mean(r["cpu_seconds"] / base[r["seed"]] for r in some)
            rows.append([
                what, side, ", ".join(f"{100 * t:.2f}" for t in tests),
                f"{100 * mean(tests):.2f} % ± {100 * stdev(tests) if len(tests) > 1 else 0:.2f}",
                f"{mean(times):.2f} s ({min(times):.2f} to {max(times):.2f})", f"{share:.3f}",
            ])  # fmt: skip
    return rows


def mean_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return what each of the means gives: validation accuracy and time against as it is."""
    rows = [["the recipe", "validation accuracy", "gives", "processor time", "of it as it is"]]
    usual: dict[str, float] = {}
    for what in dict.fromkeys(r["means"] for r in found["means"]):
        some = [r for r in found["means"] if r["means"] == what]
        now = {k: mean(r[k] for r in some) for k in ("val", "cpu_seconds")}
        usual = usual or now
        rows.append([
            what, f"{100 * now['val']:.2f} %", f"{100 * (now['val'] - usual['val']):+.2f}",
            f"{now['cpu_seconds']:.2f} s", f"{now['cpu_seconds'] / usual['cpu_seconds']:.2f}",
        ])  # fmt: skip
    return rows


def text_of(found: dict[str, Any]) -> str:
    """Return what stands between the marks of docs/speed.md."""
    m, v = found["machine"], found["versions"]
    seeds = sorted({r["seed"] for r in found["seeds"]})
    few = sorted({r["seed"] for r in found["means"]})
    made = (
        f"Measured on {m['cpu']}, {m['cores']} cores, load {m['load_average_at_start']} before it "
        f"began; Python {v['python']}, torch {v['torch']}, lightning {v['lightning']}; the real "
        "CIFAR-10; each training in a process of its own, on one thread. "
        f"Seeds {', '.join(map(str, seeds))} for the first table, {', '.join(map(str, few))} for "
        "its small network and for the second table, whose accuracies are those of the validation "
        "images, since the recipe was chosen by them. The processor's time is "
        "that of fit: training, and the validation after each epoch. Both sides ended with the "
        "same weights, for every seed."
    )
    return "\n\n".join([made, markdown(*seed_rows(found)), markdown(*mean_rows(found))])


def write(found: dict[str, Any], output: Path) -> None:
    """Write seeds.json, and the tables into the page; print them."""
    for rows in (seed_rows(found), mean_rows(found)):
        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    text = json.dumps(found, indent=1) + "\n"
    write_whole(output / "seeds.json", lambda path: path.write_text(text))
    page = output.with_suffix(".md")
    if page.is_file():
        filled = fill(page.read_text(), {"seeds": text_of(found)}, "bench.seeds")
        write_whole(page, lambda path: path.write_text(filled))
        print(f"The tables of {page} are written anew.")


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="bench.seeds",
        description="Hold the lesson speed against cifar, for several seeds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=number, default=5, metavar="N", help="for the comparison with cifar")
    add("--few", type=number, default=3, metavar="N", help="for the means and the small network")
    add("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "data")), metavar="DIR",
        help="the folder with the real images")  # fmt: skip
    add("--output", type=Path, default=ROOT / "docs" / "speed", metavar="DIR", help="for results")
    add("--tables", action="store_true", help="measure nothing; write the tables anew")
    given = parser.parse_args(argv)
    path = given.output / "seeds.json"
    if given.tables:
        write(read_measured(path), given.output)
        return
    if given.seeds < 2 or not is_here(given.data_dir, "cifar10"):
        raise BadInput(
            f"this takes two seeds or more and the real CIFAR-10, which is not in "
            f"'{given.data_dir}'; name its folder with --data-dir."
        )
    given.output.mkdir(parents=True, exist_ok=True)
    write(measure(list(range(given.seeds)), list(range(given.few)), given.data_dir), given.output)


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
