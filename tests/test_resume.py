"""The lesson `resume`: killed anywhere and carried on, a run ends as if it had never stopped.

The kills are real: a process of its own trains, and SIGKILL ends it at a chosen moment.
"""

from common import ROOT, checkpoints, resume
from common import data as data_module
from common.data import EpochSampler, eval_loader, train_loader
from common.messages import BadInput, clear_messages
from common.options import Options
from common.parity import compare
from common.recipes import RECIPES

import contextlib
import csv
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIDES, Noisy, count, load_lesson, small_data, train
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

STAGES = "data start steps weights optimizer random metrics decisions".split()
# Three epochs of eight batches; the last batch is short. The third epoch is the best.
SETTINGS = dict(lesson="resume", lr=0.05, batch_size=16, max_epochs=3, patience=9,
                checkpoint_every_n_steps=5)  # fmt: skip
BATCHES, STEPS = 8, 24
# It stops by itself after five of eight epochs, two after the best one.
STOPS = SETTINGS | dict(lr=0.1, max_epochs=8, patience=2)


# Processes that can be killed.


@dataclass
class Ended:
    """How a process ended: its exit status, what it printed, and the moments that it passed.

    Where it came to the end of the run, also what came of it, under the names that a Run has.
    """

    status: int
    said: str
    moments: list[str]
    outcome: dict | None
    content: bytes

    def result(self):
        assert self.outcome, self.said
        return json.loads(json.dumps(self.outcome))

    def weights(self):
        return self.content


class Children:
    """Trains in processes of their own, one at a time.

    They are forked from one that has imported the lessons and trained nothing: each takes a third
    of a second, not the ten of the imports.
    """

    def __init__(self, folder):
        self.folder, self.numbers, self.ended = folder, itertools.count(), {}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, side, runs_dir, *changes, at=(), after=None, **settings):
        """Train one side. `at` are moments, by number or name, and what is to happen in each.

        That is a signal, "full", from when on no file may grow beyond 20,000 bytes as on a full
        disk, or a number of seconds to sleep. `after` is a number of seconds, then SIGKILL.
        """
        out = self.folder / f"{next(self.numbers)}"
        out.mkdir()
        job = dict(side=side, runs_dir=str(runs_dir), changes=changes, at=at, after=after,
                   settings=settings, out=str(out))  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        said, moments, result, weights = map(out.joinpath, ("said", "moments", "result", "weights"))
        return Ended(
            status,
            said.read_text(),
            moments.read_text().splitlines(),
            json.loads(result.read_text()) if result.exists() else None,
            weights.read_bytes() if weights.exists() else b"",
        )

    def never_stopped(self, side, **settings):
        """Return a run of these settings that was never stopped, and its folder; run but once."""
        key = side, *sorted(settings.items())
        if key not in self.ended:
            folder = self.folder / f"never stopped {len(self.ended)}"
            self.ended[key] = self(side, folder, **settings), folder
        return self.ended[key]

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with contextlib.closing(Children(tmp_path_factory.mktemp("children"))) as children:
        yield children


def serve():
    """Fork a child for each line of stdin, wait for it, and print how it ended."""
    torch.set_num_threads(1)
    small_data(lesson="resume")  # drawn once, for all of them
    for side in SIDES:
        load_lesson(side, "resume")  # and with it Lightning
    assert threading.active_count() == 1  # a fork copies no other thread
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            work(job)
        if job["after"] is not None:
            time.sleep(job["after"])
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(job):
    """Do what one job says, and end this process."""
    out = Path(job["out"])
    said = os.open(out / "said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    passed, at, status = (out / "moments").open("w"), dict(job["at"]), 0

    def happen(moment, number=itertools.count()):  # noqa: B008
        # At once, also where the process is killed in the next moment.
        print(moment, file=passed, flush=True)
        what = at.get(moment, at.get(next(number)))
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        elif isinstance(what, float):
            time.sleep(what)
        elif what:
            os.kill(os.getpid(), what)

    try:
        with pytest.MonkeyPatch.context() as monkeypatch, clear_messages():
            watch(monkeypatch, happen)
            run = train(job["side"], Path(job["runs_dir"]), monkeypatch, *job["changes"],
                        **job["settings"])  # fmt: skip
        (out / "weights").write_bytes(run.weights())
        (out / "result").write_text(json.dumps(run.result()))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    os._exit(status)  # nothing of what pytest or the parent would do at the end


def watch(monkeypatch, happen):
    """Call `happen` with the name of every moment at which it could matter that a run is killed.

    The names count what the process has done, not what the run has: `after step 1` is the first
    step after a carried-on run began.
    """
    numbers = {}

    def tell(what):
        numbers[what] = numbers.get(what, 0) + 1
        happen(f"{what} {numbers[what]}")

    register_optimizer_step_pre_hook(lambda *_: tell("before step"))
    register_optimizer_step_post_hook(lambda *_: tell("after step"))

    def forward(module, _):
        if isinstance(module, Noisy) and not module.training:
            tell("evaluation of batch")

    torch.nn.modules.module.register_module_forward_pre_hook(forward)

    def save(content, file, save=torch.save):
        whole = io.BytesIO()
        save(content, whole)
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        file.flush()
        tell("half of checkpoint")
        file.write(whole.getvalue()[half:])

    def fsync(handle, fsync=os.fsync):
        tell("before the sync of checkpoint")
        fsync(handle)

    def rename(path, target, rename=Path.replace):
        happen(f"before {target.name} has its name")
        rename(path, target)
        happen(f"after {target.name} has its name")

    def unlink(path, missing_ok=False, unlink=Path.unlink):
        if pruned := path.name.startswith("step_"):
            tell("before removal")
        unlink(path, missing_ok)
        if pruned:
            tell("after removal")

    def row(writer, row, write=csv.DictWriter.writerow):
        tell("row")
        return write(writer, row)

    def rows(writer, rows, write=csv.DictWriter.writerows):
        tell("rows")
        return write(writer, rows)

    for where, name, what in (
        (torch, "save", save), (os, "fsync", fsync), (Path, "replace", rename),
        (Path, "unlink", unlink), (csv.DictWriter, "writerow", row),
        (csv.DictWriter, "writerows", rows),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, what)


# What is compared.


def files(runs_dir, side, pattern="step_*.ckpt"):
    return sorted((runs_dir / "resume" / side / "checkpoints").glob(pattern))


def names(runs_dir, side):
    return [path.name for path in files(runs_dir, side, "[!.]*")]


def metrics(runs_dir, side):
    return (runs_dir / "resume" / side / "metrics.csv").read_bytes()


def content(path):
    """What a checkpoint holds, but for the paths in the Trainer's callbacks, and free settings."""
    held = checkpoints.read(path)
    held.pop("callbacks", None)
    free = resume.FREE
    held["hyper_parameters"] = {
        k: v for k, v in held["hyper_parameters"].items() if k not in free
    }
    return held


def equal(a, b):
    """Tell whether two contents are the same to the bit, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def compared(ours, theirs):
    """Compare two runs that may differ in what a carried-on run may change."""
    a, b = ours.result(), theirs.result()
    for name in resume.FREE:
        b["hyperparameters"][name] = a["hyperparameters"][name]
    return compare(a, b)


def assert_same(ours, theirs):
    comparison = compared(ours, theirs)
    assert comparison.agree, comparison.first_difference
    assert [stage.name for stage in comparison.stages] == STAGES
    assert all(stage.compared > 0 for stage in comparison.stages)
    assert ours.weights() == theirs.weights() and len(ours.weights()) > 10_000


def assert_as_never_stopped(children, ended, runs_dir, side, **settings):
    """Assert that nothing tells a carried-on run from one that was never stopped."""
    reference, folder = children.never_stopped(side, **settings)
    assert ended.status == reference.status == 0, ended.said
    assert_same(reference, ended)
    assert metrics(runs_dir, side) == metrics(folder, side)
    assert names(runs_dir, side) == names(folder, side)
    for ours, theirs in zip(*(files(f, side, "[!.]*") for f in (runs_dir, folder)), strict=True):
        assert equal(content(ours), content(theirs)), ours.name


def assert_rows_agree(ours, theirs):
    """As two sides' metrics.csv do: the same rows, and averages equal within 1e-6."""
    tables = [list(csv.DictReader(io.StringIO(table.decode()))) for table in (ours, theirs)]
    for a, b in zip(*tables, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert (a[name] == "") == (b[name] == "")
            assert not a[name] or float(a[name]) == pytest.approx(float(b[name]), 1e-6)


# Killed.


def killed_and_carried_on(children, side, runs_dir, moments, **settings):
    """Kill a run at each of these moments, one after the other, then let it come to its end.

    Returns how it ended, and how many times it was killed: a moment by number may come too late.
    """
    for kills, moment in enumerate(moments):
        which = "last" if kills else ""
        ended = children(
            side, runs_dir, at=[(moment, signal.SIGKILL)], ckpt_path=which, **settings
        )
        if ended.outcome:
            return ended, kills
        # It was really killed, within a whole run, at that moment.
        assert ended.status == -signal.SIGKILL, ended.said
        assert ended.moments[-1] == moment or len(ended.moments) == moment + 1
        # Whatever has the name of a checkpoint is a whole one.
        for path in files(runs_dir, side, "[!.]*"):
            assert checkpoints.read(path)["run"]["losses"].numel() > 0
        # What was being written may be left: hidden, and nothing takes it for a checkpoint.
        assert len(files(runs_dir, side, ".*")) <= kills + 1
    ended = children(side, runs_dir, ckpt_path="last", **settings)
    assert ended.outcome, ended.said
    return ended, len(moments)


@pytest.mark.parametrize("side", SIDES)
def test_killed_and_carried_on(side, children, tmp_path):
    kills = 0
    # Within an epoch. At its boundary, while its checkpoint is written, then in the validation.
    for moments in (["after step 13"], ["half of checkpoint 3", "evaluation of batch 2"]):
        ended, times = killed_and_carried_on(children, side, tmp_path, moments, **SETTINGS)
        assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
        kills += times
        shutil.rmtree(tmp_path / "resume")
    assert kills == 3
    count(f"kills carried on to the same bits, {side}", kills)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_killed_at_every_moment(side, children, tmp_path):
    """Before and after every step, in every evaluation, at each stage of every checkpoint."""
    reference, _ = children.never_stopped(side, **SETTINGS)
    kinds = {moment.rstrip("0123456789") for moment in reference.moments}
    assert len([kind for kind in kinds if "ckpt" not in kind]) == 8 + (side == "plain")
    assert {f"after step_{step:08d}.ckpt has its name" for step in (5, 8, 10, 15, 16, 20, 24)} < {
        *reference.moments
    }
    kills = 0
    for moment in range(len(reference.moments)):
        folder = tmp_path / f"{moment}"
        ended, times = killed_and_carried_on(children, side, folder, [moment], **SETTINGS)
        assert_as_never_stopped(children, ended, folder, side, **SETTINGS)
        shutil.rmtree(folder)
        kills += times
    assert kills == len(reference.moments) >= 100
    count(f"kills carried on to the same bits, {side}", kills)


CHAINS = {
    "as above": SETTINGS,
    "stops early": STOPS,
    "every step saved": SETTINGS | dict(checkpoint_every_n_steps=1, log_every_n_steps=3),
    "saved at the epoch's end too": SETTINGS | dict(checkpoint_every_n_steps=4),
    "only epochs saved": SETTINGS | dict(checkpoint_every_n_steps=500, log_every_n_steps=1),
    "adam": SETTINGS | dict(optimizer="adam", lr=0.01, seed=5, checkpoint_every_n_steps=3),
    "limits": SETTINGS | dict(limit_train_batches=5, limit_val_batches=1, max_epochs=4),
    "max_steps": SETTINGS | dict(max_steps=21),
    "processes load": SETTINGS | dict(num_workers=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CHAINS)
def test_killed_again_and_again(name, side, children, tmp_path):
    settings, kills = CHAINS[name], 0
    draw = random.Random(f"{name}, {side}")
    for chain in range(3):
        folder = tmp_path / f"{chain}"
        moments = [draw.randrange(5, 60) for _ in range(4)]
        ended, times = killed_and_carried_on(children, side, folder, moments, **settings)
        assert_as_never_stopped(children, ended, folder, side, **settings)
        assert times >= 1
        kills += times
    assert kills >= 5
    count(f"kills carried on to the same bits, {side}", kills)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_killed_at_any_time(side, children, tmp_path):
    """Not at one of the moments that we thought of."""
    began = time.monotonic()
    children.never_stopped(side, **SETTINGS, threads=1)  # another key: it is run now
    duration, kills = time.monotonic() - began, 0
    draw = random.Random(side)
    for number in range(30):
        folder = tmp_path / f"{number}"
        first = children(side, folder, after=duration * draw.random(), **SETTINGS)
        assert first.status == -signal.SIGKILL or first.outcome
        ended = children(side, folder, ckpt_path="last", **SETTINGS)
        assert_as_never_stopped(children, ended, folder, side, **SETTINGS)
        kills += first.outcome is None
    count(f"kills carried on to the same bits, {side}", kills)


if __name__ == "__main__":
    serve()
