"""The lesson `resume`: killed anywhere and carried on, a run ends as if it had never stopped.

The kills are real: a process of its own trains, and SIGKILL ends it at a chosen moment.
"""

from common import ROOT, checkpoints, resume
from common import data as data_module
from common.data import EpochSampler, eval_loader, train_loader
from common.messages import BadInput, clear_messages
from common.options import Options
from common.parity import compare_results
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

import helpers
import numpy as np
import pytest
import torch
from helpers import SIDES, Noisy, count, load_lesson, small_data, some, train
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# The Trainer warns of what the lesson sees to.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("dataloader is not resumable", "logs directory", "Checkpoint directory")
]
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
        said, moments, result, weights = (
            path.read_bytes() if path.exists() else b""  # it may be killed before anything
            for path in map(out.joinpath, ("said", "moments", "result", "weights"))
        )
        outcome = json.loads(result) if result else None
        return Ended(status, said.decode(), moments.decode().splitlines(), outcome, weights)

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


@pytest.fixture(scope="module", autouse=True)
def drawn_images():
    """Which epoch is the best must be known: always the drawn shapes, in the children, too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("DATA_DIR", raising=False)
        drawn = helpers.some_images.__wrapped__("cifar10")
        monkeypatch.setattr(helpers, "some_images", lambda name: drawn)
        yield


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
        (out / "half").write_text(json.dumps(run.result()))
        (out / "half").rename(out / "result")  # last and whole: it is there where the run ended
    except SystemExit as end:
        status = end.code or 0  # as Python does
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
    held["hyper_parameters"] = {k: v for k, v in held["hyper_parameters"].items() if k not in free}
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
    for name in a["hyperparameters"].keys() & set(resume.FREE):
        b["hyperparameters"][name] = a["hyperparameters"][name]
    return compare_results(a, b)


def assert_same(ours, theirs):
    comparison = compared(ours, theirs)
    assert comparison.agree, comparison.first_difference
    assert [stage.name for stage in comparison.stages] == STAGES
    assert all(stage.compared > 0 for stage in comparison.stages)
    assert ours.weights() == theirs.weights() and len(ours.weights()) > 10_000


def assert_as_never_stopped(children, ended, runs_dir, side, **settings):
    """Assert that nothing tells a carried-on run from one that was never stopped.

    But for its checkpoints' names where it was stopped in order, after a step of its own.
    """
    reference, folder = children.never_stopped(side, **settings)
    assert ended.status == reference.status == 0, ended.said
    assert_same(reference, ended)
    assert metrics(runs_dir, side) == metrics(folder, side)
    ours, theirs = (names(each, side) for each in (runs_dir, folder))
    # One more where it was killed before the last removal: nothing has been saved since.
    assert resume.KEPT < len(theirs) + 1 <= resume.KEPT + 2 and ours[:1] == ["best.ckpt"]
    assert len(theirs) <= len(ours) <= len(theirs) + 1 and ours[-1] == theirs[-1]
    same = [resume_file for resume_file in ours if resume_file in theirs]
    for name in same:
        both = (each / "resume" / side / "checkpoints" / name for each in (runs_dir, folder))
        assert equal(*map(content, both)), name
    assert len(same) >= 2


def steps_of(ended):
    """How many steps a process trained."""
    return sum(moment.startswith("after step ") for moment in ended.moments)


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
        ended = children(side, runs_dir, at=[(moment, signal.SIGKILL)], ckpt_path=which, **settings)
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


@pytest.mark.parametrize("side", some(SIDES))
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
    assert len([kind for kind in kinds if "ckpt" not in kind]) == 9
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
    for number in range(12):
        folder = tmp_path / f"{number}"
        first = children(side, folder, after=duration * draw.random(), **SETTINGS)
        assert first.status == -signal.SIGKILL or first.outcome
        ended = children(side, folder, ckpt_path="last", **SETTINGS)
        assert_as_never_stopped(children, ended, folder, side, **SETTINGS)
        kills += first.outcome is None
    count(f"kills carried on to the same bits, {side}", kills)


# Every checkpoint.


@pytest.fixture(scope="module")
def every_checkpoint(tmp_path_factory):
    """Both sides' runs that kept a checkpoint of every step, and their folder."""
    folder = tmp_path_factory.mktemp("every")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "KEPT", 1000)
        runs = {
            side: train(side, folder, monkeypatch, **SETTINGS | dict(checkpoint_every_n_steps=1))
            for side in SIDES
        }
    for side in SIDES:
        expected = [f"step_{step:08d}.ckpt" for step in range(1, STEPS + 1)]
        assert names(folder, side) == ["best.ckpt", *expected]
    assert_same(*runs.values())
    return folder, runs


def carry_on(source, side, step, every_checkpoint, tmp_path, monkeypatch, **changes):
    """Carry on from one checkpoint of `source` by `side`, and hold it against the whole run."""
    folder, runs = every_checkpoint
    path = folder / "resume" / source / "checkpoints" / f"step_{step:08d}.ckpt"
    settings = SETTINGS | dict(checkpoint_every_n_steps=1, ckpt_path=str(path)) | changes
    run = train(side, tmp_path, monkeypatch, **settings)
    assert len(run.train_loss) == STEPS
    assert_same(runs[side], run)
    ours, theirs = metrics(tmp_path, side), metrics(folder, side)
    if side == source:
        assert ours == theirs
    else:
        assert_rows_agree(ours, theirs)
    count(f"checkpoints of {source} carried on by {side}")


@pytest.mark.parametrize("side", SIDES)
def test_the_other_side_carries_on(side, every_checkpoint, tmp_path, monkeypatch):
    (other,) = set(SIDES) - {side}
    # Within an epoch, before its end, at it, after it, in the last one, and at the very end.
    for step, workers in ((3, 0), (7, 0), (8, 2), (9, 2), (20, 0), (24, 0)):
        carry_on(other, side, step, every_checkpoint, tmp_path / f"{step}", monkeypatch,
                 num_workers=workers)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("source, side", itertools.product(SIDES, SIDES))
def test_every_checkpoint_can_be_carried_on(source, side, every_checkpoint, tmp_path, monkeypatch):
    for step in range(1, STEPS + 1):
        for workers in (0, 2) if step in (5, 8) else (0,):
            folder = tmp_path / f"{step} {workers}"
            carry_on(source, side, step, every_checkpoint, folder, monkeypatch, num_workers=workers)


def test_from_side_to_side_and_back(every_checkpoint, tmp_path, monkeypatch):
    """Five steps on one side, five on the other, and so on."""
    _, runs = every_checkpoint
    path = ""
    for number, steps in enumerate((5, 10, 15, 20, -1)):
        side = SIDES[number % 2]
        settings = SETTINGS | dict(max_steps=steps, ckpt_path=str(path))
        run = train(side, tmp_path / f"{number}", monkeypatch, **settings)
        path = files(tmp_path / f"{number}", side)[-1]
    assert_same(runs[side], run)


# Which checkpoints there are.


def test_both_sides_keep_the_same_files(children):
    for settings, best, kept in ((SETTINGS, 2, (16, 20, 24)), (STOPS, 2, (32, 35, 40))):
        for side in SIDES:
            ended, folder = children.never_stopped(side, **settings)
            expected = ["best.ckpt", *(f"step_{step:08d}.ckpt" for step in kept)]
            assert names(folder, side) == expected
            assert files(folder, side, ".*") == []
            held = [checkpoints.read(path) for path in files(folder, side, "*")]
            assert [one["global_step"] for one in held] == [BATCHES * (best + 1), *kept]
            assert [one["epoch"] for one in held] == [best, *((step - 1) // 8 for step in kept)]
            assert ended.result()["decisions"]["best epoch"] == best
            count("checkpoints kept", len(held))


@pytest.mark.parametrize("side", SIDES)
def test_a_folder_that_was_moved(side, children, tmp_path):
    """The best epoch was before the move; the Trainer notes the paths of its checkpoints."""
    settings = SETTINGS | dict(lr=0.02)
    reference, _ = children.never_stopped(side, **settings)
    assert reference.result()["decisions"]["best epoch"] == 0
    assert children(side, tmp_path / "old", max_steps=12, **settings).status == 0
    (tmp_path / "old").rename(tmp_path / "new")
    ended = children(side, tmp_path / "new", ckpt_path="last", **settings)
    assert_as_never_stopped(children, ended, tmp_path / "new", side, **settings)
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("side", SIDES)
def test_the_best_checkpoint_comes_along_with_a_file_from_elsewhere(side, children, tmp_path):
    settings = SETTINGS | dict(lr=0.02)
    assert children(side, tmp_path / "old", max_steps=12, **settings).status == 0
    (tmp_path / "old").rename(tmp_path / "elsewhere")
    path = files(tmp_path / "elsewhere", side)[-1]
    ended = children(side, tmp_path / "new", ckpt_path=str(path), **settings)
    shutil.rmtree(tmp_path / "elsewhere")
    assert_as_never_stopped(children, ended, tmp_path / "new", side, **settings)


@pytest.mark.parametrize("side", SIDES)
def test_the_best_checkpoint_can_be_carried_on_from(side, children, tmp_path):
    settings = SETTINGS | dict(lr=0.02)
    children(side, tmp_path, **settings)
    ended = children(side, tmp_path, ckpt_path="best", **settings)
    assert "after step 8." in ended.said and steps_of(ended) == STEPS - 8
    assert_as_never_stopped(children, ended, tmp_path, side, **settings)


@pytest.mark.parametrize("side", SIDES)
def test_a_run_that_begins_anew_loses_nothing(side, children, tmp_path):
    children(side, tmp_path, at=[("after step 18", signal.SIGKILL)], **SETTINGS)
    own = tmp_path / "resume" / side
    assert not (own / "result.json").exists()
    before = {path.name: path.read_bytes() for path in files(tmp_path, side, "*")}
    assert sorted(before) == [
        "best.ckpt", "step_00000010.ckpt", "step_00000015.ckpt", "step_00000016.ckpt"
    ]  # fmt: skip
    ended = children(side, tmp_path, **SETTINGS)
    assert steps_of(ended) == STEPS
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
    previous = own.with_name(f"{side}.previous") / "checkpoints"
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
    # Carried on, nothing is moved.
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before


@pytest.mark.parametrize("side", SIDES)
def test_what_was_saved_is_there_beside_another_run(side, children, tmp_path):
    """A run of other settings lies in the folder, and went further than the file to carry on."""
    children(side, tmp_path / "elsewhere", max_steps=5, **SETTINGS)
    children(side, tmp_path, **SETTINGS | dict(lr=0.1))
    path = files(tmp_path / "elsewhere", side)[-1]
    first = children(
        side, tmp_path, at=[("before step 2", signal.SIGINT)], ckpt_path=str(path), **SETTINGS
    )
    assert first.status == 130 and "after step 7, which was saved" in first.said
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert ended.status == 0 and steps_of(ended) == STEPS - 7
    assert_same(children.never_stopped(side, **SETTINGS)[0], ended)


@pytest.mark.parametrize("side", SIDES)
def test_a_best_checkpoint_of_an_epoch_still_to_come(side, children, tmp_path):
    """The best epoch is the third; killed before its own checkpoint is there, and ended sooner."""
    moment = "before step_00000024.ckpt has its name"
    killed = children(side, tmp_path, at=[(moment, signal.SIGKILL)], **SETTINGS)
    assert killed.status == -signal.SIGKILL
    assert checkpoints.read(files(tmp_path, side, "best.ckpt")[0])["epoch"] == 2
    first = children(side, tmp_path, max_steps=22, ckpt_path="last", **SETTINGS)
    # The weights that were best until then are gone: it says so, and tests no others.
    assert first.status == 2 and "best.ckpt' is of epoch 2, and the best one of this " in first.said
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# Where a run ends.


@pytest.mark.parametrize("side", SIDES)
def test_a_run_that_stopped_by_itself_trains_no_step_more(side, children, tmp_path):
    reference, _ = children.never_stopped(side, **STOPS)
    decisions = reference.result()["decisions"]
    assert decisions["stopped by"].startswith("early stopping: no validation loss lower")
    assert decisions["epochs"] == 5 and decisions["best epoch"] == 2
    for _ in range(2):
        which = "last" if files(tmp_path, side) else ""
        ended = children(side, tmp_path, ckpt_path=which, **STOPS)
        assert_as_never_stopped(children, ended, tmp_path, side, **STOPS)
    assert steps_of(ended) == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "moment", ["after step 20", "before step 33", "before step_00000040.ckpt has its name"]
)
def test_early_stopping_counts_the_epochs_before_the_kill(moment, side, children, tmp_path):
    ended, _ = killed_and_carried_on(children, side, tmp_path, [moment], **STOPS)
    assert_as_never_stopped(children, ended, tmp_path, side, **STOPS)


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_that_is_no_number_ends_it_for_good(side, children, tmp_path):
    settings = SETTINGS | dict(lr=1e38)
    reference, _ = children.never_stopped(side, **settings)
    assert len(reference.result()["train_loss"]) == BATCHES
    ended, _ = killed_and_carried_on(
        children, side, tmp_path, ["after step_00000008.ckpt has its name"], **settings
    )
    ours, theirs = reference.result(), ended.result()
    assert ours["decisions"] == theirs["decisions"]
    assert "is not a number" in ours["decisions"]["stopped by"]
    assert reference.weights() == ended.weights()


@pytest.mark.parametrize("steps", [13, 16])
@pytest.mark.parametrize("side", SIDES)
def test_max_steps_can_be_raised(side, steps, children, tmp_path):
    """In the middle of an epoch, and at its end."""
    first = children(side, tmp_path, max_steps=steps, **SETTINGS)
    assert len(first.result()["train_loss"]) == steps
    assert first.result()["decisions"]["stopped by"] == f"--max-steps {steps}"
    ended = children(side, tmp_path, max_steps=18, ckpt_path="last", **SETTINGS)
    assert len(ended.result()["train_loss"]) == 18
    assert steps_of(ended) == 18 - steps  # the last step was saved, due or not
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# Stopped in order.


STOPPED = {
    # name: (what happens at which moment, the step in the sentence, exit status)
    "Ctrl-C": ([("before step 4", signal.SIGINT)], (4,), 130),
    "SIGTERM": ([("after step 12", signal.SIGTERM)], (12, 13), 143),
    "in the validation": ([("evaluation of batch 4", signal.SIGTERM)], (8, 16), 143),
    "in the last validation, SIGTERM": ([("before step 24", signal.SIGTERM)], (24,), 143),
    "in the last validation": ([("before step 24", signal.SIGINT)], (24,), 130),
    "in the last step of an epoch": ([("before step 8", signal.SIGTERM)], (8,), 143),
    "before the first step": ([("evaluation of batch 1", signal.SIGTERM)], (1, 8), 143),
    "while a checkpoint is written": ([("half of checkpoint 1", signal.SIGINT)], (5,), 130),
    "SIGTERM, then Ctrl-C": (
        [("before step 3", signal.SIGTERM), ("after step 3", signal.SIGINT)], (3,), 130,
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_ends_it_in_order(name, side, children, tmp_path):
    at, steps, status = STOPPED[name]
    first = children(side, tmp_path, at=at, **SETTINGS)
    assert first.status == status, first.said
    sentence = first.said.strip().splitlines()[-1]
    why = "Ctrl-C" if status == 130 else "SIGTERM"
    assert sentence in [
        f"Stopped by {why} after step {step}, which was saved; carry on with the same options and "
        "--ckpt-path last."
        for step in steps
    ]
    assert "Traceback" not in first.said
    assert files(tmp_path, side)[-1].stem in {f"step_{step:08d}" for step in steps}
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
    count("signals")


@pytest.mark.parametrize("side", SIDES)
def test_a_signal_while_it_is_tested(side, children, tmp_path):
    """All is trained: it may come to its end, or not, but must not say that it did."""
    reference, _ = children.never_stopped(side, **SETTINGS)
    test = [moment for moment in reference.moments if moment.startswith("evaluation of batch")][-3]
    first = children(side, tmp_path, at=[(test, signal.SIGTERM)], **SETTINGS)
    assert first.outcome or first.status in (143, -signal.SIGTERM), first.said
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


@pytest.mark.parametrize("side", SIDES)
def test_a_second_ctrl_c_ends_it_at_once(side, children, tmp_path):
    at = [("evaluation of batch 4", signal.SIGINT), ("evaluation of batch 5", signal.SIGINT)]
    first = children(side, tmp_path, at=at, **SETTINGS)
    assert first.status == 130 and first.moments[-1] == "evaluation of batch 5", first.said
    assert first.said.strip().splitlines()[-1] == (
        "Stopped by Ctrl-C; what was written until now is kept."
    )
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


@pytest.mark.parametrize("side", SIDES)
def test_max_time(side, children, tmp_path):
    first = children(side, tmp_path, at=[("before step 7", 1.0)], max_time="00:00:00:01",
                     **SETTINGS)  # fmt: skip
    assert first.status == 124
    step = checkpoints.read(files(tmp_path, side)[-1])["global_step"]
    assert 0 < step <= 7
    assert first.said.strip().splitlines()[-1] == (
        f"Stopped by --max-time 00:00:00:01 after step {step}, which was saved; carry on with the "
        "same options and --ckpt-path last."
    )
    ended = children(side, tmp_path, ckpt_path="last", max_time="00:01:00:00", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


@pytest.mark.parametrize("side", SIDES)
def test_one_step_at_a_time(side, children, tmp_path):
    """No time at all: each call trains one step; one that ends an epoch validates it, too."""
    for step in range(1, BATCHES + 3):
        ended = children(side, tmp_path, ckpt_path="last", max_time="00:00:00:00", **SETTINGS)
        assert ended.status == 124 and f" after step {step}, which was saved" in ended.said
        assert steps_of(ended) == 1
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# Refused.


@dataclass
class Half:
    """A run that was ended in its second epoch, at step 13, and its settings."""

    side: str
    runs_dir: Path
    settings: dict

    @property
    def last(self):
        return files(self.runs_dir, self.side)[-1]

    def begin(self, ckpt_path, max_steps=-1, **changes):
        recipe = replace(RECIPES["resume"], ckpt_path=str(ckpt_path))
        options = Options(runs_dir=self.runs_dir, max_steps=max_steps)
        return resume.begin(recipe, options, self.side, {**self.settings, **changes})

    def snapshot(self):
        return {path: path.read_bytes() for path in self.runs_dir.rglob("*") if path.is_file()}

    def refuses(self, ckpt_path, *expected, **changes):
        """Assert that it is refused in one sentence, with `expected` in it, and nothing is lost."""
        before = self.snapshot()
        with pytest.raises(BadInput) as caught:
            self.begin(ckpt_path, **changes)
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.endswith("."), sentence
        for text in expected:
            assert str(text) in sentence, sentence
        assert self.snapshot() == before and len(before) >= 4
        count("checkpoints refused")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for side in SIDES:
            train(side, folder, monkeypatch, max_steps=13, **SETTINGS)
            expected = ["best.ckpt", *(f"step_{step:08d}.ckpt" for step in (8, 10, 13))]
            assert names(folder, side) == expected
    return folder


@pytest.fixture(params=SIDES)
def half(request, halves, tmp_path):
    shutil.copytree(halves, tmp_path / "runs")
    content = checkpoints.read(files(halves, request.param)[-1])
    return Half(request.param, tmp_path / "runs", dict(content["hyper_parameters"]))


def test_a_good_one_is_not_refused(half):
    folder = half.runs_dir / "resume" / half.side
    assert half.begin("last") == (folder, half.last)
    assert half.begin("best") == (folder, folder / "checkpoints" / "best.ckpt")
    other = files(half.runs_dir, half.side)[0]
    assert half.begin(other) == (folder, other)
    for name in set(resume.FREE) - {"max_steps"}:
        assert half.begin("last", **{name: 77}) == (folder, half.last)
    with pytest.raises(pytest.fail.Exception):
        half.refuses("last")  # or the tests below could not fail


def test_damaged_files_are_refused(half):
    path, draw = half.last, random.Random(half.side)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        half.refuses(path, path, "is cut short or altered")
    path.write_bytes(b"")
    half.refuses(path, path, "is empty")
    path.write_bytes(whole)
    # Within a tensor no byte is padding: one bit there, anywhere.
    for tensor in (
        max(checkpoints.weights(checkpoints.read(path), path).values(), key=torch.numel),
        checkpoints.read(path)["optimizer_states"][0]["state"][0]["momentum_buffer"],
        checkpoints.read(path)["run"]["losses"],
        checkpoints.read(path)["run"]["random"]["torch"],
    ):
        place = whole.find(tensor.numpy().tobytes())
        assert place > 0
        for _ in range(4):
            altered = bytearray(whole)
            altered[place + draw.randrange(tensor.nbytes)] ^= 1 << draw.randrange(8)
            path.write_bytes(altered)
            half.refuses(path, path, "is cut short or altered, in its part '")
    path.write_text("epoch,loss\n1,2.3\n")
    half.refuses(path, path, "is not a checkpoint at all")
    path.unlink()
    half.refuses(path, f"there is no file '{path}'")
    half.refuses(path.parent, f"there is no file '{path.parent}'")
    path.with_name("best.ckpt").unlink()
    for ckpt_path in ("best", "last", files(half.runs_dir, half.side)[0]):
        half.refuses(ckpt_path, f"there is no file '{path.with_name('best.ckpt')}'")


def test_what_cannot_be_carried_on_to_there_is_refused(half):
    half.refuses("last", half.last, "after step 13, and --max-steps is 12", max_steps=12)
    assert half.begin("last", max_steps=13)[1] == half.last
    # Beginning a new run would move the file away, in place of the folder that it is in.
    own = half.runs_dir / "resume" / half.side
    shutil.copytree(own, own.with_name(f"{half.side}.previous"))
    path = own.with_name(f"{half.side}.previous") / "checkpoints" / half.last.name
    half.refuses(path, path, "copy the folder elsewhere, and name the file in the copy")


class Calls:
    """What unpickles into a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_is_refused_and_not_run(half, tmp_path):
    path, trace = half.last, tmp_path / "trace"
    content = checkpoints.read(path)
    content["run"]["rows"] = Calls(trace)
    torch.save(content, path)
    half.refuses(path, path, "would call posix.mkdir, which is code")
    path.write_bytes(pickle.dumps(content))
    half.refuses(path, path, "nothing of it was run")
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it was real code


def without(content, name):
    """A checkpoint's content without one part, there or under `run`."""
    run = {k: v for k, v in content["run"].items() if k != name}
    return {k: v for k, v in content.items() if k != name} | ({} if name == "run" else {"run": run})


LACKS = {
    # name: (what is done to the content, what the sentence says of it)
    "weights.pt": (lambda c: c["state_dict"], "holds weights alone"),
    "no settings": (lambda c: without(c, "hyper_parameters"), "holds weights alone"),
    "another lesson": (
        lambda c: c | {"hyper_parameters": c["hyper_parameters"] | {"lesson": "callbacks"}},
        "is of the lesson callbacks, not of resume",
    ),
    "an older layout": (lambda c: c | {"run": c["run"] | {"layout": 0}}, "has the layout 0, and"),
    "a newer layout": (lambda c: c | {"run": c["run"] | {"layout": 2}}, "has the layout 2, and"),
    "no layout": (lambda c: without(c, "run"), "has the layout unknown, and"),
    "another step": (lambda c: c | {"global_step": 12}, "says step 12, but has 13 losses"),
    **{
        f"no {name}": (lambda c, name=name: without(c, name), f"lacks {name!r}")
        for name in resume.PARTS
    },
}  # fmt: skip


def test_what_lacks_a_part_is_refused(half):
    path = half.last
    content = checkpoints.read(path)
    assert len(LACKS) == 7 + len(resume.PARTS) >= 15
    for change, expected in LACKS.values():
        checkpoints.save(path, change(dict(content)))
        for ckpt_path in (path, "last"):
            half.refuses(ckpt_path, path, expected, "or leave out --ckpt-path")
    checkpoints.save(path, content)
    half.begin("last")


def test_what_a_real_run_of_another_lesson_left_is_refused(half, tmp_path, monkeypatch):
    train(half.side, tmp_path, monkeypatch, lesson="callbacks", max_epochs=1)
    path = tmp_path / "callbacks" / half.side / "checkpoints" / "last.ckpt"
    half.refuses(path, path, "is of the lesson callbacks, not of resume")


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.1), ("batch_size", 8), ("seed", 1), ("max_epochs", 4), ("optimizer", "adam"),
        ("data", "cifar10"), ("threads", 2), ("momentum", 0.5), ("patience", 1),
        ("limit_train_batches", 5), ("limit_val_batches", 2), ("log_every_n_steps", 3),
        ("devices", 2),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(name, value, half):
    then = half.settings[name]
    expected = f"was made with {name} {then!r}, and now it is {value!r}; carry on with the options"
    for ckpt_path in ("last", "best", half.last):
        half.refuses(ckpt_path, expected, **{name: value})


def test_one_batch_is_not_all_batches(half, monkeypatch):
    """The option's 1 is one batch, its 1.0 all of them; Python takes the two for equal."""
    before = half.snapshot()
    refusal = r"was made with limit_train_batches .*, and now it is .?1.?;"
    with pytest.raises(BadInput, match=refusal):
        train(half.side, half.runs_dir, monkeypatch, ckpt_path="last", limit_train_batches=1,
              **SETTINGS)  # fmt: skip
    assert half.snapshot() == before


def test_what_changes_no_number_is_no_setting(half):
    for name in ("checkpoint_every_n_steps", "ckpt_path", "max_time", "runs_dir", "data_dir"):
        assert name not in half.settings


def test_the_one_before_a_damaged_one(half, children, capsys):
    """Cut short, as no kill leaves it; the run ends the same, some steps later."""
    for path, length in zip(files(half.runs_dir, half.side)[1:], (0, 30_000), strict=True):
        path.write_bytes(path.read_bytes()[:length])
    damaged = files(half.runs_dir, half.side)[1:]
    assert half.begin("last")[1].name == "step_00000008.ckpt"
    said = capsys.readouterr().err
    assert f"the checkpoint '{damaged[0]}' is empty\n" in said
    assert f"the checkpoint '{damaged[1]}' is cut short or altered\n" in said
    assert said.count("The one before it is taken.") == 2
    ended = children(half.side, half.runs_dir, ckpt_path="last", **SETTINGS)
    assert "after step 8." in ended.said and steps_of(ended) == STEPS - 8
    assert_as_never_stopped(children, ended, half.runs_dir, half.side, **SETTINGS)
    for path in files(half.runs_dir, half.side):
        path.write_bytes(b"")
    half.refuses("last", "none of the 3 checkpoints in '", "can be read; leave out --ckpt-path")


def test_where_there_is_no_checkpoint_yet_it_begins_at_the_start(half, children, tmp_path, capsys):
    empty = replace(half, runs_dir=tmp_path / "empty")
    assert empty.begin("last") == (tmp_path / "empty" / "resume" / half.side, None)
    assert "this run begins at the start." in capsys.readouterr().err
    ended = children(half.side, tmp_path / "other", ckpt_path="last", **SETTINGS)
    assert "There is no checkpoint in " in ended.said
    assert_as_never_stopped(children, ended, tmp_path / "other", half.side, **SETTINGS)


def test_other_versions_are_told_and_not_refused(half, capsys):
    content = checkpoints.read(half.last)
    content["run"]["versions"]["torch"] = "1.0"
    checkpoints.save(half.last, content)
    assert half.begin("last")[1] == half.last
    said = capsys.readouterr().err
    assert "was written with torch 1.0, and here it is " in said and "last digits" in said


def test_the_command_refuses_in_one_sentence(half, tmp_path, monkeypatch, capsys):
    data = small_data(lesson="resume")
    monkeypatch.setattr(data_module, "load_data", lambda recipe, options: data)
    path = tmp_path / "cut.ckpt"
    path.write_bytes(half.last.read_bytes()[:5000])
    for arguments, expected in (
        (["--ckpt-path", str(path)], f"error: the checkpoint '{path}' is cut short or altered"),
        (["--ckpt-path", "nope.ckpt"], "error: there is no file 'nope.ckpt', "),
        (["--ckpt-path", "last", "--lr", "0.3"], "was made with "),
        (["--max-time", "1h"], "--max-time: expected DD:HH:MM:SS, got '1h'"),
        (["--checkpoint-every-n-steps", "0"], "expected a whole number from 1 on, got '0'"),
    ):
        before = half.snapshot()
        monkeypatch.setattr(
            sys, "argv", ["resume.py", "--runs-dir", str(half.runs_dir), *arguments]
        )
        with pytest.raises(SystemExit) as exit_:
            load_lesson(half.side, "resume").main()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit_.value.code == 2 and said.startswith("error: ") and expected in said, said
        assert half.snapshot() == before
        count("bad inputs")


@pytest.mark.parametrize("side", SIDES)
def test_a_full_disk(side, children, tmp_path):
    """From step 12 on: the next checkpoint cannot be written, and those before it are whole."""
    first = children(side, tmp_path, at=[("after step 12", "full")], **SETTINGS)
    path = tmp_path / "resume" / side / "checkpoints" / "step_00000015.ckpt"
    assert first.status == 2 and "Traceback" not in first.said, first.said
    assert first.said.strip().splitlines()[-1] == (
        f"error: the checkpoint '{path}' could not be written (File too large); those before it "
        "are whole: make room for it, or name another folder by --runs-dir."
    )
    assert names(tmp_path, side) == [
        "best.ckpt", "step_00000005.ckpt", "step_00000008.ckpt", "step_00000010.ckpt"
    ]  # fmt: skip
    assert files(tmp_path, side, ".*") == []
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert steps_of(ended) == STEPS - 10
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# What is left out is missed.


RESTORE = '        resume.set_random_states(run["random"])\n'
FILL_IN = "        resume.fill_in(checkpoint, trainer, self.batches)\n"
CONTROLS = {
    # what is lost: (side, checkpoint, stage that must differ first, (old text, new text), ...)
    "random states, by hand": ("plain", 13, "steps", (RESTORE, "")),
    "weights, by hand": (
        "plain", 13, "steps",
        ("ckpt = checkpoints.load(self.net, path)", "ckpt = checkpoints.read(path)"),
    ),
    "the place in the order, by hand": (
        "plain", 13, "data",
        ("        self.sampler.carry_on({epoch: order.tolist() for epoch, order in "
         "run[\"order\"].items()})\n", ""),
    ),
    "the schedule, by hand": (
        "plain", 13, "steps",
        ("        self.scheduler.load_state_dict(ckpt[\"lr_schedulers\"][0])\n", ""),
    ),
    "the optimizer's state, by hand": (
        "plain", 13, "steps",
        ("        self.optimizer.load_state_dict(ckpt[\"optimizer_states\"][0])\n", ""),
    ),
    "one of the losses, by hand": (
        "plain", 13, "data", ("list(run[\"losses\"].to(device))", "list(run[\"losses\"][1:])"),
    ),
    "rows, by hand": (
        "plain", 13, "metrics",
        ("self.log.write_again(run[\"rows\"])", "self.log.write_again([])"),
    ),
    "the reason to stop, by hand": (
        "plain", 40, "steps",
        ("list(run[\"losses\"].to(device)), run[\"reason\"]",
         "list(run[\"losses\"].to(device)), \"not stopped\""),
    ),
    "random states": ("lightning", 13, "steps", (RESTORE, "")),
    "weights": (
        "lightning", 13, "steps",
        (FILL_IN, f"{FILL_IN}        checkpoint[\"state_dict\"] = self.state_dict()\n"),
    ),
    "the place in the order": (
        "lightning", 13, "data", ("loader.sampler.carry_on(self.done or {})", "pass"),
    ),
    "the schedule": (
        "lightning", 13, "steps",
        (FILL_IN, f"{FILL_IN}        checkpoint[\"lr_schedulers\"] = []\n"),
    ),
    "the optimizer's state": (
        "lightning", 13, "steps",
        (FILL_IN, f"{FILL_IN}        checkpoint[\"optimizer_states\"] = []\n"),
    ),
    "the losses": (
        "lightning", 13, "data",
        ("        self.losses = list(run[\"losses\"].to(trainer.strategy.root_device))\n", ""),
    ),
    "the Trainer's counters": (
        "lightning", 13, "metrics",
        (FILL_IN, f"{FILL_IN}        if trainer.training:\n            "
         "checkpoint[\"loops\"] = {\"fit_loop\": trainer.fit_loop.state_dict()}\n"),

    ),
    "early stopping's count": (
        "lightning", 29, "steps",
        (FILL_IN, f"{FILL_IN}        checkpoint[\"callbacks\"].pop("
         "trainer.early_stopping_callback.state_key, None)\n"),
    ),
    "the reason to stop": (
        "lightning", 40, "steps",
        ("trainer.should_stop = self.reason != \"not stopped\"", "pass"),
    ),
    "rows": (
        "lightning", 13, "metrics",
        ("for row in run[\"rows\"]:", "for row in []:"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """Both sides' run that stops by itself, its folder, and that of its checkpoints."""
    folder = tmp_path_factory.mktemp("stopping")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "KEPT", 1000)
        settings = STOPS | dict(checkpoint_every_n_steps=1)
        return folder, {side: train(side, folder, monkeypatch, **settings) for side in SIDES}


def test_there_are_enough():
    for side in SIDES:
        assert sum(own == side for own, *_ in CONTROLS.values()) >= 8
    assert {stage for _, _, stage, *_ in CONTROLS.values()} == {"data", "steps", "metrics"}


@pytest.mark.parametrize("name", some(CONTROLS))
def test_what_is_left_out_is_missed(name, stopping, tmp_path, monkeypatch):
    side, step, stage, *changes = CONTROLS[name]
    folder, runs = stopping
    path = folder / "resume" / side / "checkpoints" / f"step_{step:08d}.ckpt"
    # As it is, it ends the same; changed, it does not.
    same = train(side, tmp_path / "same", monkeypatch, ckpt_path=str(path), **STOPS)
    assert_same(runs[side], same)
    if stage == "metrics":
        # Rows that do not tell of the best checkpoint are refused before anything is compared.
        monkeypatch.setattr(resume, "best_epoch", lambda *_: 0)
    other = train(side, tmp_path / "other", monkeypatch, *changes, ckpt_path=str(path), **STOPS)
    comparison = compared(runs[side], other)
    assert comparison.first_difference, f"{name} was not missed"
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")


# Why the lesson does not do it as one would with the Trainer.


def test_a_checkpoint_before_the_validation_skips_it(tmp_path, monkeypatch):
    """A ModelCheckpoint that monitors nothing saves at an epoch's last batch, before validation.

    Where this fails, Lightning has learned to validate then, and the lesson need not monitor.
    """
    monkeypatch.setattr(resume, "KEPT", 1000)
    settings = SETTINGS | dict(checkpoint_every_n_steps=8, lr=0.02)
    old = 'steps = ModelCheckpoint(folder, "step_{step:08d}", **after, **every)'
    new = """for name in ("monitor", "mode"):
        del after[name]
    steps = ModelCheckpoint(folder, "step_{step:08d}_early", **after, **every)"""
    whole = train("lightning", tmp_path / "whole", monkeypatch, (old, new), **settings)
    early = tmp_path / "whole/resume/lightning/checkpoints/step_00000016_early.ckpt"
    assert len(whole.val) == 3 and checkpoints.read(early)["global_step"] == 2 * BATCHES
    assert sum("val_loss" in row for row in checkpoints.read(early)["run"]["rows"]) == 1
    run = train("lightning", tmp_path / "skipped", monkeypatch, ckpt_path=str(early), **settings)
    assert len(run.train_loss) == STEPS
    assert run.val == [whole.val[0], whole.val[2]]  # and the epoch between was never validated
    # The lesson's own file of that step, which was saved after the validation.
    path = early.with_name("step_00000016.ckpt")
    run = train("lightning", tmp_path / "right", monkeypatch, ckpt_path=str(path), **settings)
    assert run.val == whole.val


def test_what_self_log_writes_comes_after_the_checkpoint(tmp_path, monkeypatch):
    """The row of a step that a checkpoint is saved after is not yet in metrics.csv then."""
    change = ("            self.logger.log_metrics(row, self.global_step)\n",
              "            self.log(\"train_loss\", row[\"train_loss\"])\n")  # fmt: skip
    train("lightning", tmp_path / "whole", monkeypatch, change, **SETTINGS)
    train("lightning", tmp_path / "half", monkeypatch, change, max_steps=10, **SETTINGS)
    train("lightning", tmp_path / "half", monkeypatch, change, ckpt_path="last", **SETTINGS)
    whole, half = (
        [int(row["step"]) for row in csv.DictReader(io.StringIO(
            metrics(tmp_path / name, "lightning").decode())) if row["train_loss"]]
        for name in ("whole", "half")
    )  # fmt: skip
    assert whole == [4, 9, 14, 19] and half == [4, 14, 19]


# The parts.


def orders(sampler, epochs=3):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_the_sampler_carries_on():
    whole = EpochSampler(50, seed=3)
    expected = orders(whole)
    assert sorted(expected[1]) == list(range(50)) and expected[0] != expected[1]
    for done in (0, 1, 16, 49, 50):
        sampler = EpochSampler(50, seed=3)
        before = {0: expected[0], 1: expected[1][:done]}
        sampler.carry_on(before)
        assert sampler.epoch == 1  # where processes that load ahead begin
        assert list(sampler) == expected[1][done:]
        assert sampler.handed_out == {0: expected[0], 1: expected[1]}
        sampler.set_epoch(2)
        assert list(sampler) == expected[2]
        assert sampler.handed_out == whole.handed_out
        assert before == {0: expected[0], 1: expected[1][:done]}  # the caller's own is unchanged
        sampler.set_epoch(1)
        assert list(sampler) == expected[1][done:]  # the second time as the first
    untouched = EpochSampler(50, seed=3)
    untouched.carry_on({})
    assert orders(untouched) == expected and untouched.handed_out == whole.handed_out


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_loader_carries_on(workers):
    data, recipe = small_data(lesson="resume"), replace(RECIPES["resume"], batch_size=16)
    options = Options(num_workers=workers)
    whole = train_loader(data.train, recipe, options)
    whole.sampler.set_epoch(1)
    expected = [images for images, _ in whole]
    assert len(expected) == BATCHES
    order = whole.sampler.handed_out[1]
    loader = train_loader(data.train, recipe, options)
    loader.sampler.carry_on({0: [], 1: order[:48]})
    # As the Trainer does it: processes fetch the first batches before set_epoch is called.
    batches = iter(loader)
    loader.sampler.set_epoch(1)
    got = [images for images, _ in batches]
    assert len(got) == BATCHES - 3
    assert all(map(torch.equal, got, expected[3:]))
    assert loader.sampler.handed_out[1] == order
    # Each evaluation loader comes whole, whatever was carried on.
    assert sum(len(labels) for _, labels in eval_loader(data.val, recipe, options)) == 130


def test_what_was_trained_on():
    order = {0: list(range(20)), 1: list(range(100, 120)), 2: list(range(200, 220))}
    for steps, expected in (
        (1, {0: 4}), (5, {0: 20}), (6, {0: 20, 1: 4}), (9, {0: 20, 1: 16}),
        (15, {0: 20, 1: 20, 2: 20}),
    ):  # fmt: skip
        found = resume.trained_on(order, steps, batches=5, batch_size=4)
        assert {epoch: len(samples) for epoch, samples in found.items()} == expected
        assert all(order[k][: len(v)] == v.tolist() for k, v in found.items())
    assert resume.trained_on({0: list(range(18))}, 5, 5, 4)[0].tolist() == list(range(18))


def test_the_last_ones_the_best_one_and_the_newest_are_kept(tmp_path):
    others = ["best.ckpt", ".tmp1234.ckpt", "note.txt"]
    steps = [f"step_{step:08d}.ckpt" for step in (9, 10, 99, 100, 12_345_678)]
    for name in others + steps[:3]:
        (tmp_path / name).touch()
    resume.prune(tmp_path / steps[2])
    assert {path.name for path in tmp_path.iterdir()} == {*others, *steps[:3]}
    for name in steps[3:]:
        (tmp_path / name).touch()
    # Of a run that carries on from an older checkpoint than the last: the one just written.
    resume.prune(tmp_path / steps[0])
    assert {path.name for path in tmp_path.iterdir()} == {*others, steps[0], *steps[-3:]}
    resume.save(tmp_path / steps[-1], {"global_step": 12_345_678})
    assert {path.name for path in tmp_path.iterdir()} == {*others, *steps[-resume.KEPT :]}
    assert resume.KEPT == 3


def test_random_states_survive_a_file(tmp_path):
    def drawn():
        numbers = [random.random(), random.gauss(0, 1), *np.random.normal(size=3).tolist()]
        return [*numbers, *torch.rand(5).tolist(), *torch.randn(17).tolist(), torch.randperm(9)[0]]

    random.gauss(0, 1)  # each keeps a second number for the next call
    np.random.normal()
    torch.randn(1)
    checkpoints.save(tmp_path / "states.ckpt", {"random": resume.random_states()})
    first, second = drawn(), drawn()
    assert first != second
    resume.set_random_states(checkpoints.read(tmp_path / "states.ckpt")["random"])
    assert drawn() == first and drawn() == second
    before = resume.random_states()
    resume.set_random_states(before)
    assert equal(resume.random_states(), before)  # neither draws a number
    count("generators carried on", 3)


# The real command.


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_the_real_command_is_stopped(side, tmp_path):
    """By Ctrl-C, by SIGKILL, and not at all; each ends with the same files."""

    def command(name, *more):
        arguments = (
            "--data shapes --max-epochs 2 --limit-train-batches 100 --limit-val-batches 1 "
            "--limit-test-batches 1 --checkpoint-every-n-steps 4 --runs-dir"
        ).split()
        arguments += [str(tmp_path / name), *more]
        return subprocess.Popen(
            [sys.executable, str(ROOT / side / "resume.py"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip

    def end(process, status):
        said, _ = process.communicate()
        assert process.returncode == status, said
        assert "Traceback" not in said
        return said

    end(command("whole"), 0)
    whole = tmp_path / "whole" / "resume" / side
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        name = number.name
        process = command(name)
        for _ in range(10_000):
            if files(tmp_path / name, side) or process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(number)
        said = end(process, status)
        own, step = tmp_path / name / "resume" / side, files(tmp_path / name, side)[-1].stem[5:]
        if status == 130:
            assert f" after step {int(step)}, which was saved; carry on" in said.splitlines()[-1]
        assert not (own / "result.json").exists()
        assert f", after step {int(step)}." in end(command(name, "--ckpt-path", "last"), 0)
        a, b = (json.loads((folder / "result.json").read_text()) for folder in (whole, own))
        comparison = compare_results(a, b)
        assert comparison.agree and all(stage.compared for stage in comparison.stages)
        for file in ("weights.pt", "metrics.csv"):
            assert (own / file).read_bytes() == (whole / file).read_bytes()
        count("real commands stopped and carried on")


if __name__ == "__main__":
    serve()


# Half precision, whose scaler has a state too. On the CPU, as in test_optimize.py.

HALF = {
    "plain": ('enabled=recipe.precision == "16-mixed")',
              'enabled=recipe.precision == "16-mixed", growth_interval=2)'),
    "lightning": ("        more = dict(precision=recipe.precision, plugins=[SafeIO()])\n",
                  "        from lightning.pytorch.plugins import MixedPrecision\n"
                  "        scaler = torch.amp.GradScaler('cpu', growth_interval=2)\n"
                  "        half = MixedPrecision('16-mixed', 'cpu', scaler)\n"
                  "        more = dict(plugins=[SafeIO(), half])\n"),
}  # fmt: skip
FORGOTTEN = {
    "plain": ('        self.scaler.load_state_dict(ckpt.get("MixedPrecision", {}))\n', ""),
    "lightning": (FILL_IN, f'{FILL_IN}        checkpoint.pop("MixedPrecision")\n'),
}


def test_the_scale_of_the_loss_is_carried_on(tmp_path, monkeypatch):
    """The scale doubles every second step, until a step is left out: where, the state decides."""
    monkeypatch.setattr(resume, "KEPT", 1000)
    settings = SETTINGS | dict(precision="16-mixed")
    whole = {side: train(side, tmp_path / "whole", monkeypatch, HALF[side], **settings).result()
             for side in SIDES}  # fmt: skip
    assert compare_results(*whole.values()).agree
    scale = lambda path: checkpoints.read(path)["MixedPrecision"]["scale"]  # noqa: E731
    scales = [[scale(path) for path in files(tmp_path / "whole", side)] for side in SIDES]
    assert scales[0] == scales[1] and len(scales[0]) == 7
    other = max(scales[0])
    assert other != 65536  # which is what a new scaler begins with
    place = scales[0].index(other)
    of = {side: str(files(tmp_path / "whole", side)[place]) for side in SIDES}
    for side, source in itertools.product(SIDES, SIDES):
        folder = tmp_path / f"{source}-{side}"
        run = train(side, folder, monkeypatch, HALF[side], ckpt_path=of[source], **settings)
        assert compare_results(run.result(), whole[side]).agree
        count("scalers carried on")
    for side in SIDES:
        changes = HALF[side], FORGOTTEN[side]
        run = train(side, tmp_path / "x", monkeypatch, *changes, ckpt_path=of[side], **settings)
        assert compare_results(run.result(), whole[side]).first_difference.name == "steps"
        count("negative controls")
