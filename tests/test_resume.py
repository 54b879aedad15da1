"""The lesson `resume`: killed anywhere and resumed, a run ends as if it had never stopped.

The kills are real: a process of its own trains, and SIGKILL ends it at a chosen moment.
"""

from common import ROOT, checkpoints, resume
from common.data import EpochSampler, make_loaders
from common.folders import EVIDENCE, FILES
from common.messages import BadInput, clear_messages
from common.proof import evidence_file
from common.proof.compare import compare_results
from common.proof.evidence import read
from common.proof.lessons import load
from common.run import run

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
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import (
    SIDES,
    WITH_CHECKPOINTS,
    Noisy,
    assert_agree,
    count,
    load_lesson,
    small_data,
    some,
    train,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# The Trainer warns of what the lesson sees to.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("dataloader is not resumable", "logs directory", "Checkpoint directory")
]
# Three epochs of eight batches; the last batch is short. The third epoch is the best.
SETTINGS = dict(lesson="resume", lr=0.05, batch_size=16, max_epochs=3, patience=9,
                checkpoint_every_n_steps=5)  # fmt: skip
BATCHES, STEPS = 8, 24
# It stops by itself after five of eight epochs, two after the best one.
STOPS = SETTINGS | dict(lr=0.1, max_epochs=8, patience=2)
# What Trainer and loop keep of SETTINGS: the loop the last three; the Trainer's two callbacks the
# last three of the epochs, and of those within them.
KEEPS = {"plain": (16, 20, 24), "lightning": (8, 10, 15, 16, 20, 24)}
# The change that keeps every checkpoint; resume.KEPT does it on the plain side.
ALL_KEPT = {"plain": (), "lightning": (("save_top_k=3", "save_top_k=-1"),)}


# Processes that can be killed.


@dataclass
class Ended:
    """How a process ended: its exit status, what it printed, and the moments that it passed.

    Where it came to the end of the run, also the content of result.json, and of weights.pt.
    """

    status: int
    said: str
    moments: list[str]
    outcome: dict | None
    weights: bytes

    @property
    def result(self):
        assert self.outcome, self.said
        return json.loads(json.dumps(self.outcome))


class Children:
    """Trains in processes of their own, one at a time.

    They are forked from one that has imported the lessons and trained nothing: each takes a third
    of a second, not the ten of the imports.
    """

    def __init__(self, folder):
        self.folder, self.numbers, self.ended = folder, itertools.count(), {}
        # What a kill leaves of the Trainer's temporary files shall go with the folder.
        environment = {**os.environ, "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

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

    side, runs_dir = job["side"], Path(job["runs_dir"])
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, clear_messages():
            watch(monkeypatch, happen)
            result = train(side, runs_dir, monkeypatch, *job["changes"], **job["settings"])
        shutil.copyfile(runs_dir / "resume" / side / "weights.pt", out / "weights")
        (out / "half").write_text(json.dumps(result))
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
    step after a resumed run began.
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

    def moved(usual):
        def move(path, target, **where):
            happen(f"before {Path(target).name} has its name")
            usual(path, target, **where)
            happen(f"after {Path(target).name} has its name")

        return move

    def removed(usual):
        def remove(path, **where):
            name = os.path.basename(path)
            if mine := (name.startswith("step_") or name in FILES) and os.path.exists(path):
                tell("before removal")
            usual(path, **where)
            if mine:
                tell("after removal")

        return remove

    def opened(path, mode="r", *more, open=Path.open, **named):
        file = open(path, mode, *more, **named)
        if path.name == EVIDENCE and mode == "a":
            write = file.write

            def halves(text):
                write(text[: len(text) // 2])
                file.flush()
                tell("half of a line")
                write(text[len(text) // 2 :])

            file.write = halves
        return file

    def row(writer, row, write=csv.DictWriter.writerow):
        tell("row")
        return write(writer, row)

    def rows(writer, rows, write=csv.DictWriter.writerows):
        tell("rows")
        return write(writer, rows)

    for where, name, what in (
        (torch, "save", save), (os, "fsync", fsync), (Path, "open", opened),
        (os, "replace", moved(os.replace)), (os, "rename", moved(os.rename)),
        (os, "unlink", removed(os.unlink)), (os, "remove", removed(os.remove)),
        (csv.DictWriter, "writerow", row), (csv.DictWriter, "writerows", rows),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, what)


# What is compared.


def files(runs_dir, side, pattern="step_*.ckpt"):
    return sorted((runs_dir / "resume" / side / "checkpoints").glob(pattern))


def names(runs_dir, side):
    return [path.name for path in files(runs_dir, side, "[!.]*")]


def named(*steps):
    """The names of a folder that has the checkpoints of these steps."""
    return ["best.ckpt", *(f"step_{step:08d}.ckpt" for step in steps)]


def metrics(runs_dir, side):
    return (runs_dir / "resume" / side / "metrics.csv").read_bytes()


def weights_of(runs_dir, side):
    return (runs_dir / "resume" / side / "weights.pt").read_bytes()


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
    """Compare two results of runs that may differ in what a resumed run may change."""
    theirs = theirs | {"hyperparameters": dict(theirs["hyperparameters"])}
    for name in ours["hyperparameters"].keys() & set(resume.FREE):
        theirs["hyperparameters"][name] = ours["hyperparameters"][name]
    return compare_results(ours, theirs)


def assert_same(ours, theirs):
    comparison = compared(ours, theirs)
    assert_agree(comparison, WITH_CHECKPOINTS)
    assert ours["weights_sha256"] == theirs["weights_sha256"]


def assert_as_never_stopped(children, ended, runs_dir, side, came_with=0, **settings):
    """Assert that nothing tells a resumed run from one that was never stopped.

    But for its checkpoints' names where it was stopped in order, after a step of its own, or where
    only that of step `came_with` came along into another folder.
    """
    reference, folder = children.never_stopped(side, **settings)
    assert ended.status == reference.status == 0, ended.said
    assert_same(reference.result, ended.result)
    assert reference.weights == ended.weights and len(ended.weights) > 10_000
    assert metrics(runs_dir, side) == metrics(folder, side)
    ours, theirs = (names(each, side) for each in (runs_dir, folder))
    assert ours[0] == theirs[0] == "best.ckpt" and ours[-1] == theirs[-1]
    if side == "plain":
        # One more where it was killed before the last removal: nothing has been saved since.
        assert resume.KEPT < len(theirs) + 1 <= resume.KEPT + 2
        assert len(theirs) <= len(ours) <= len(theirs) + 1
    else:  # a callback of the Trainer's removes what it wrote itself, in this process or before
        assert {name for name in theirs if name >= f"step_{came_with:08d}"} <= set(ours)
    same = [resume_file for resume_file in ours if resume_file in theirs]
    for name in same:
        both = (each / "resume" / side / "checkpoints" / name for each in (runs_dir, folder))
        assert equal(*map(content, both)), name
    assert len(same) >= 2


def steps_of(ended):
    """How many steps a process trained."""
    return sum(moment.startswith("after step ") for moment in ended.moments)


# Killed.


def killed_and_resumed(children, side, runs_dir, moments, **settings):
    """Kill a run at each of these moments, one after the other, then let it come to its end.

    Returns how it ended, and how many times it was killed: a moment by number may come too late.
    """
    for kills, moment in enumerate(moments):
        which = "last" if kills else None
        ended = children(side, runs_dir, at=[(moment, signal.SIGKILL)], ckpt_path=which, **settings)
        if ended.outcome:
            return ended, kills
        # It was really killed, within a whole run, at that moment.
        assert ended.status == -signal.SIGKILL, ended.said
        assert ended.moments[-1] == moment or len(ended.moments) == moment + 1
        # Whatever has the name of a checkpoint is a whole one, and the evidence reaches it.
        for path in files(runs_dir, side, "[!.]*"):
            step = checkpoints.read(path)["global_step"]
            lines = read(path.parent.parent / EVIDENCE, step)
            assert sum(len(line["losses"]) for line in lines) == step
        # What was being written may be left: hidden, and nothing takes it for a checkpoint.
        assert len(files(runs_dir, side, ".*")) <= kills + 1
    ended = children(side, runs_dir, ckpt_path="last", **settings)
    assert ended.outcome, ended.said
    return ended, len(moments)


@pytest.mark.parametrize("side", SIDES)
def test_killed_and_resumed(side, children, tmp_path):
    kills = 0
    # Within an epoch. At its boundary, while its checkpoint is written, then in the validation.
    for moments in (["after step 13"], ["half of checkpoint 3", "evaluation of batch 2"]):
        ended, times = killed_and_resumed(children, side, tmp_path, moments, **SETTINGS)
        assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
        kills += times
        shutil.rmtree(tmp_path / "resume")
    assert kills == 3
    count(f"kills, each resumed to the same bits, {side}", kills)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_killed_at_every_moment(side, children, tmp_path):
    """Before and after every step, in every evaluation, at each stage of every file."""
    reference, _ = children.never_stopped(side, **SETTINGS)
    kinds = {moment.rstrip(" 0123456789") for moment in reference.moments}
    expected = {"before step", "after step", "evaluation of batch", "half of checkpoint", "row",
                "rows", "half of a line", "before removal", "after removal"}  # fmt: skip
    if side == "plain":  # the Trainer does not wait for the disk
        expected.add("before the sync of checkpoint")
    assert kinds >= expected
    saved = [*(f"step_{step:08d}.ckpt" for step in (5, 8, 10, 15, 16, 20, 24)), "best.ckpt"]
    assert {f"after {name} has its name" for name in (*saved, "result.json", "weights.pt")} < kinds
    kills = 0
    for moment in range(len(reference.moments)):
        folder = tmp_path / f"{moment}"
        ended, times = killed_and_resumed(children, side, folder, [moment], **SETTINGS)
        assert_as_never_stopped(children, ended, folder, side, **SETTINGS)
        shutil.rmtree(folder)
        kills += times
    assert kills == len(reference.moments) >= 100
    count(f"kills, each resumed to the same bits, {side}", kills)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_killed_at_every_moment_of_a_resumed_run(side, children, tmp_path):
    """Also while it makes the folder ready, and while it puts its parts together."""
    first = children(side, tmp_path / "first", at=[("after step 22", signal.SIGKILL)], **SETTINGS)
    assert first.status == -signal.SIGKILL
    whole = shutil.copytree(tmp_path / "first", tmp_path / "whole")
    moments = children(side, whole, ckpt_path="last", **SETTINGS).moments
    # Its results are set aside first: metrics.csv gets another place.
    assert len(moments) >= 30 and "before metrics.csv has its name" in moments
    for moment in range(len(moments)):
        folder = shutil.copytree(tmp_path / "first", tmp_path / f"{moment}")
        killed = children(side, folder, at=[(moment, signal.SIGKILL)], ckpt_path="last", **SETTINGS)
        assert killed.status == -signal.SIGKILL
        ended = children(side, folder, ckpt_path="last", **SETTINGS)
        assert_as_never_stopped(children, ended, folder, side, **SETTINGS)
        shutil.rmtree(folder)
    count(f"kills, each resumed to the same bits, {side}", len(moments))


CHAINS = {
    "as above": SETTINGS,
    "stops early": STOPS,
    "every step saved": SETTINGS | dict(checkpoint_every_n_steps=1, log_every_n_steps=3),
    "saved at the epoch's end too": SETTINGS | dict(checkpoint_every_n_steps=4),
    "only epochs saved": SETTINGS | dict(checkpoint_every_n_steps=500, log_every_n_steps=1),
    "bfloat16": SETTINGS | dict(precision="bf16-mixed", seed=5, checkpoint_every_n_steps=3),
    "limits": SETTINGS | dict(limit_train_batches=5, limit_val_batches=1, max_epochs=4),
    "half of the images": SETTINGS | dict(limit_train_batches=0.5, max_epochs=6),
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
        ended, times = killed_and_resumed(children, side, folder, moments, **settings)
        assert_as_never_stopped(children, ended, folder, side, **settings)
        assert times >= 1
        kills += times
    assert kills >= 5
    count(f"kills, each resumed to the same bits, {side}", kills)


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
    count(f"kills, each resumed to the same bits, {side}", kills)


# Every checkpoint.


@pytest.fixture(scope="module")
def every_checkpoint(tmp_path_factory):
    """Both sides' results of runs that kept a checkpoint of every step, and their folder."""
    folder = tmp_path_factory.mktemp("every")
    settings = SETTINGS | dict(checkpoint_every_n_steps=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "KEPT", 1000)
        results = {s: train(s, folder, monkeypatch, *ALL_KEPT[s], **settings) for s in SIDES}
    for side in SIDES:
        assert names(folder, side) == named(*range(1, STEPS + 1))
    assert_same(*results.values())
    return folder, results


def resumed(side, step, every_checkpoint, tmp_path, monkeypatch, **changes):
    """Resume from one checkpoint, and hold the run against the whole one."""
    folder, results = every_checkpoint
    path = folder / "resume" / side / "checkpoints" / f"step_{step:08d}.ckpt"
    settings = SETTINGS | dict(checkpoint_every_n_steps=1, ckpt_path=path) | changes
    result = train(side, tmp_path, monkeypatch, **settings)
    assert len(result["train_loss"]) == STEPS
    assert_same(results[side], result)
    assert metrics(tmp_path, side) == metrics(folder, side)
    count(f"checkpoints of {side} resumed")


@pytest.mark.parametrize("side", SIDES)
def test_some_checkpoints_are_resumed(side, every_checkpoint, tmp_path, monkeypatch):
    # Within an epoch; at its end and after it, where processes load ahead; and at the very end.
    for step, workers in ((3, 0), (8, 2), (9, 2), (24, 0)):
        resumed(side, step, every_checkpoint, tmp_path / f"{step}", monkeypatch,
                num_workers=workers)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_every_checkpoint_is_resumed(side, every_checkpoint, tmp_path, monkeypatch):
    for step in range(1, STEPS + 1):
        for workers in (0, 2) if step in (5, 8) else (0,):
            folder = tmp_path / f"{step} {workers}"
            resumed(side, step, every_checkpoint, folder, monkeypatch, num_workers=workers)


@pytest.mark.parametrize("side", SIDES)
def test_one_unit_in_the_last_place_is_found(side, every_checkpoint, tmp_path, monkeypatch):
    """Of one weight of the checkpoint; the comparison above would not have passed."""
    folder, results = every_checkpoint
    source = shutil.copytree(folder / "resume" / side, tmp_path / "elsewhere")
    path = source / "checkpoints" / "step_00000013.ckpt"
    held = checkpoints.read(path)
    name = next(name for name in held["state_dict"] if name.endswith("head.weight"))
    weight = held["state_dict"][name]
    moved = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert 0 < moved - weight[0, 0] < 1e-7
    weight[0, 0] = moved
    checkpoints.save(path, held)
    result = train(side, tmp_path / "runs", monkeypatch, ckpt_path=path, **SETTINGS)
    first = compared(results[side], result).first_difference
    assert first.name in ("steps", "weights"), first  # of a loss, the last bit may hide it
    count("negative controls")


@pytest.mark.parametrize("side", SIDES)
def test_each_side_resumes_its_own(side, every_checkpoint, tmp_path, monkeypatch):
    (other,) = set(SIDES) - {side}
    path = every_checkpoint[0] / "resume" / other / "checkpoints" / "step_00000013.ckpt"
    with pytest.raises(BadInput) as refused:
        train(side, tmp_path, monkeypatch, ckpt_path=path, **SETTINGS)
    assert f"'{path}' is of the {other} side, and each side resumes its own" in str(refused.value)
    assert not list(tmp_path.rglob("*.*"))
    count("checkpoints refused")


# Which checkpoints there are.


def test_which_files_are_kept(children):
    for settings, best, kept in (
        (SETTINGS, 2, KEEPS),
        (STOPS, 2, {"plain": (32, 35, 40), "lightning": (24, 30, 32, 35, 40)}),
    ):
        digests = []
        for side in SIDES:
            ended, folder = children.never_stopped(side, **settings)
            assert names(folder, side) == named(*kept[side])
            assert files(folder, side, ".*") == []
            held = [checkpoints.read(path) for path in files(folder, side, "*")]
            steps = [BATCHES * (best + 1), *kept[side]]
            assert [one["global_step"] for one in held] == steps
            assert [one["epoch"] for one in held] == [(step - 1) // 8 for step in steps]
            left = ended.result["checkpoints"]
            assert list(left) == ["best.ckpt", named(*kept[side])[-1]]
            assert left["best.ckpt"].startswith(f"epoch {best}, step {steps[0]}, ")
            digests.append(left)
            count("checkpoints kept", len(held))
        assert digests[0] == digests[1]


def stopped_at(step, side, runs_dir, children, **settings):
    """Let Ctrl-C end a run in order after a step of its own."""
    ended = children(side, runs_dir, at=[(f"before step {step}", signal.SIGINT)], **settings)
    assert ended.status == 130 and f"after step {step}, which was saved" in ended.said, ended.said


@pytest.mark.parametrize("side", SIDES)
def test_a_folder_that_was_moved(side, children, tmp_path):
    """The best epoch was before the move; the Trainer notes the paths of its checkpoints."""
    settings = SETTINGS | dict(lr=0.02)
    reference, _ = children.never_stopped(side, **settings)
    assert reference.result["checkpoints"]["best.ckpt"].startswith("epoch 0, ")
    stopped_at(12, side, tmp_path / "old", children, **settings)
    shutil.copytree(tmp_path / "old", tmp_path / "elsewhere")
    (tmp_path / "old").rename(tmp_path / "new")
    ended = children(side, tmp_path / "new", ckpt_path="last", **settings)
    assert_as_never_stopped(children, ended, tmp_path / "new", side, **settings)
    assert not (tmp_path / "old").exists()
    # A single file of a folder elsewhere: what is needed beside it comes along.
    path = files(tmp_path / "elsewhere", side)[-1]
    ended = children(side, tmp_path / "newer", ckpt_path=str(path), **settings)
    shutil.rmtree(tmp_path / "elsewhere")
    assert_as_never_stopped(children, ended, tmp_path / "newer", side, 12, **settings)


@pytest.mark.parametrize("side", SIDES)
def test_the_best_checkpoint_can_be_resumed(side, children, tmp_path):
    """It is older than others that lie beside it, and of which the evidence tells already."""
    settings = SETTINGS | dict(lr=0.02)
    children(side, tmp_path, **settings)
    # A kill on the way: from then on, the evidence has lines of both.
    moment = ("after step 3", signal.SIGKILL)
    killed = children(side, tmp_path, at=[moment], ckpt_path="best", **settings)
    assert "after step 8." in killed.said
    ended = children(side, tmp_path, ckpt_path="best", **settings)
    assert "after step 8." in ended.said and steps_of(ended) == STEPS - 8
    assert_as_never_stopped(children, ended, tmp_path, side, **settings)


@pytest.mark.parametrize("side", SIDES)
def test_a_run_that_begins_anew_loses_nothing(side, children, tmp_path):
    children(side, tmp_path, at=[("after step 18", signal.SIGKILL)], **SETTINGS)
    own = tmp_path / "resume" / side
    assert not (own / "result.json").exists()
    before = {path.name: path.read_bytes() for path in files(tmp_path, side, "*")}
    kept = {"plain": (10, 15, 16), "lightning": (5, 8, 10, 15, 16)}
    assert sorted(before) == named(*kept[side])
    ended = children(side, tmp_path, **SETTINGS)
    assert steps_of(ended) == STEPS
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
    previous = own.with_name(f"{side}.previous") / "checkpoints"
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
    # Resumed, nothing is moved.
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before


@pytest.mark.parametrize("side", SIDES)
def test_what_was_saved_is_there_beside_another_run(side, children, tmp_path):
    """A run of other settings lies in the folder, and went further than the file to resume."""
    stopped_at(5, side, tmp_path / "elsewhere", children, **SETTINGS)
    stopped_at(11, side, tmp_path, children, **SETTINGS | dict(lr=0.1))
    path = files(tmp_path / "elsewhere", side)[-1]
    first = children(
        side, tmp_path, at=[("before step 2", signal.SIGINT)], ckpt_path=str(path), **SETTINGS
    )
    assert first.status == 130 and "after step 7, which was saved" in first.said
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert ended.status == 0 and steps_of(ended) == STEPS - 7
    assert_same(children.never_stopped(side, **SETTINGS)[0].result, ended.result)


@pytest.mark.parametrize("side", SIDES)
def test_a_best_checkpoint_of_an_epoch_still_to_come(side, children, tmp_path):
    """The best epoch is the third; it is killed before its own checkpoint is there."""
    moment = "before step_00000024.ckpt has its name"
    killed = children(side, tmp_path, at=[(moment, signal.SIGKILL)], **SETTINGS)
    assert killed.status == -signal.SIGKILL
    assert checkpoints.read(files(tmp_path, side, "best.ckpt")[0])["epoch"] == 2
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# Where a run ends.


@pytest.mark.parametrize("side", SIDES)
def test_a_run_that_stopped_by_itself_trains_no_step_more(side, children, tmp_path):
    reference, folder = children.never_stopped(side, **STOPS)
    assert len(reference.result["val_loss"]) == 5 and len(reference.result["train_loss"]) == 40
    assert reference.result["checkpoints"]["best.ckpt"].startswith("epoch 2, step 24, ")
    shutil.copytree(folder / "resume", tmp_path / "resume")
    ended = children(side, tmp_path, ckpt_path="last", **STOPS)
    assert_as_never_stopped(children, ended, tmp_path, side, **STOPS)
    assert steps_of(ended) == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "moment",
    some(["before step 33", "after step 20", "before step_00000040.ckpt has its name"], every=3),
)
def test_early_stopping_counts_the_epochs_before_the_kill(moment, side, children, tmp_path):
    ended, _ = killed_and_resumed(children, side, tmp_path, [moment], **STOPS)
    assert_as_never_stopped(children, ended, tmp_path, side, **STOPS)


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_that_is_no_number_ends_it_for_good(side, children, tmp_path):
    settings = SETTINGS | dict(lr=1e38)
    reference, _ = children.never_stopped(side, **settings)
    assert len(reference.result["train_loss"]) == BATCHES
    ended, kills = killed_and_resumed(
        children, side, tmp_path, ["after step_00000008.ckpt has its name"], **settings
    )
    ours, theirs = reference.result, ended.result
    assert ours["val_loss"] == theirs["val_loss"] == [None] and steps_of(ended) == 0 < kills
    assert ours["checkpoints"] == theirs["checkpoints"] and len(ours["checkpoints"]) == 2
    assert reference.weights == ended.weights


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
@pytest.mark.parametrize("name", some(STOPPED))
def test_a_signal_ends_it_in_order(name, side, children, tmp_path):
    at, steps, status = STOPPED[name]
    first = children(side, tmp_path, at=at, **SETTINGS)
    assert first.status == status, first.said
    sentence = first.said.strip().splitlines()[-1]
    why = "Ctrl-C" if status == 130 else "SIGTERM"
    assert sentence in [
        f"Stopped by {why} after step {step}, which was saved; resume with the same options and "
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
    tested = [m for m in reference.moments if m.startswith("evaluation of batch")]
    # The lesson's test has three batches, and the table's one after it.
    first = children(side, tmp_path, at=[(tested[-3], signal.SIGTERM)], **SETTINGS)
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
    assert first.status == 124, first.said
    step = checkpoints.read(files(tmp_path, side)[-1])["global_step"]
    assert 0 < step <= 7
    assert first.said.strip().splitlines()[-1] == (
        f"Stopped by --max-time 00:00:00:01 after step {step}, which was saved; resume with the "
        "same options and --ckpt-path last."
    )
    ended = children(side, tmp_path, ckpt_path="last", max_time="00:01:00:00", **SETTINGS)
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


@pytest.mark.slow
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


MODULES = {side: load_lesson(side, "resume") for side in SIDES}


@dataclass
class Half:
    """A run that was ended in its second epoch, at step 13."""

    side: str
    runs_dir: Path

    @property
    def last(self):
        return files(self.runs_dir, self.side)[-1]

    @property
    def settings(self):
        return checkpoints.read(self.last)["hyper_parameters"]

    def begin(self, ckpt_path, **changes):
        """Begin as a command does, with the settings of the run but for `changes`."""
        own = {name: value for name, value in SETTINGS.items() if name != "lesson"}
        module = MODULES[self.side]
        args = helpers.arguments(module, self.side, "resume", self.runs_dir, **own)
        for name, value in {**changes, "ckpt_path": ckpt_path}.items():
            setattr(args, name, value)
        resume.begin(args)
        return args.ckpt_path

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
def halves(tmp_path_factory, children):
    folder = tmp_path_factory.mktemp("half")
    for side in SIDES:
        stopped_at(13, side, folder, children, **SETTINGS)
        own = {"plain": (8, 10, 13), "lightning": (5, 8, 10, 13)}
        assert names(folder, side) == named(*own[side])
    return folder


@pytest.fixture(params=SIDES)
def half(request, halves, tmp_path):
    shutil.copytree(halves, tmp_path / "runs")
    return Half(request.param, tmp_path / "runs")


def test_a_good_one_is_not_refused(half):
    folder = half.runs_dir / "resume" / half.side
    assert half.begin("last") == half.last
    assert half.begin("best") == folder / "checkpoints" / "best.ckpt"
    other = files(half.runs_dir, half.side)[0]
    assert half.begin(other) == other
    others = {"limit_test_batches": 77, "accelerator": "gpu", "classes": ("one", "two")}
    assert {*others, "data"} == set(resume.FREE)
    for name, value in others.items():
        assert half.begin("last", **{name: value}) == half.last
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
    held = checkpoints.read(path)
    for tensor in (
        max(checkpoints.weights(held, path).values(), key=torch.numel),
        held["optimizer_states"][0]["state"][0]["momentum_buffer"],
        held["random"]["torch"],
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
    # Once an epoch was validated, the best checkpoint is needed, too.
    after = [path for path in files(half.runs_dir, half.side) if path.stem >= "step_00000008"]
    for ckpt_path in ("best", "last", *after):
        half.refuses(ckpt_path, f"there is no file '{path.with_name('best.ckpt')}'")
    assert len(after) == 2


def test_a_file_that_will_be_moved_away_is_refused(half):
    """Beginning a new run would put its folder in place of the one that the file is in."""
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
    content["random"]["more"] = Calls(trace)
    torch.save(content, path)
    half.refuses(path, path, "would call posix.mkdir, which is code")
    path.write_bytes(pickle.dumps(content))
    half.refuses(path, path, "nothing of it was run")
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it was real code


def without(content, name):
    return {k: v for k, v in content.items() if k != name}


LACKS = {
    # name: (what is done to the content, what the sentence says of it)
    "weights.pt": (lambda c: c["state_dict"], "holds weights alone"),
    "no settings": (lambda c: without(c, "hyper_parameters"), "holds weights alone"),
    "another lesson": (
        lambda c: c | {"hyper_parameters": c["hyper_parameters"] | {"lesson": "callbacks"}},
        "is of the lesson callbacks, not of resume",
    ),
    **{
        f"no {name}": (lambda c, name=name: without(c, name), f"lacks {name!r}")
        for name in resume.PARTS
    },
    **{
        f"another kind of {name}": (lambda c, name=name: c | {name: "text"}, f"lacks {name!r}")
        for name in ("global_step", "optimizer_states")
    },
}  # fmt: skip


def test_what_lacks_a_part_is_refused(half):
    path = half.last
    content = checkpoints.read(path)
    assert len(LACKS) == 5 + len(resume.PARTS) >= 9
    for change, expected in LACKS.values():
        checkpoints.save(path, change(dict(content)))
        for ckpt_path in (path, "last"):
            half.refuses(ckpt_path, path, expected, "or leave out --ckpt-path")
    # A step that the run has never saved: the evidence does not lead there.
    checkpoints.save(path, content | {"global_step": 12})
    half.refuses(path, EVIDENCE, "does not reach step 12", "or leave out --ckpt-path")
    checkpoints.save(path, content)
    half.begin("last")


def test_what_a_real_run_of_another_lesson_left_is_refused(half, tmp_path, monkeypatch):
    train(half.side, tmp_path, monkeypatch, lesson="callbacks", max_epochs=1)
    path = tmp_path / "callbacks" / half.side / "checkpoints" / "last.ckpt"
    half.refuses(path, path, "is of the lesson callbacks, not of resume")


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.1), ("batch_size", 8), ("seed", 1), ("max_epochs", 4), ("momentum", 0.5),
        ("patience", 1), ("limit_train_batches", 5), ("limit_val_batches", 2), ("devices", 2),
        ("log_every_n_steps", 3), ("precision", "bf16-mixed"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(name, value, half):
    then, now = half.settings[name], f"{value}" if name.startswith("limit") else value
    expected = f"was made with {name} {then!r}, and now it is {now!r}; resume with the options"
    for ckpt_path in ("last", "best", half.last):
        half.refuses(ckpt_path, expected, **{name: value})


def test_other_images_are_refused(half):
    assert half.settings["data"] == "shapes"
    for ckpt_path in ("last", "best", half.last):
        half.refuses(ckpt_path, "was made with --data shapes, not cifar10", data="cifar10")
    assert half.begin("last", data="shapes") == half.last


def test_one_batch_is_not_all_batches(half):
    """The option's 1 is one batch, its 1.0 all of them; Python takes the two for equal."""
    half.refuses("last", "was made with limit_train_batches '1.0', and now it is '1';",
                 limit_train_batches=1)  # fmt: skip


def test_what_changes_no_number_is_no_setting(half):
    free = "checkpoint_every_n_steps ckpt_path max_time runs_dir data_dir threads num_workers"
    for name in free.split():
        assert name not in half.settings


def test_the_one_before_a_damaged_one(half, children, capsys):
    """Cut short, as no kill leaves it; the run ends the same, some steps later."""
    damaged = files(half.runs_dir, half.side)[-2:]
    for path, length in zip(damaged, (0, 30_000), strict=True):
        path.write_bytes(path.read_bytes()[:length])
    assert half.begin("last").name == "step_00000008.ckpt"
    said = capsys.readouterr().err
    assert f"the checkpoint '{damaged[0]}' is empty\n" in said
    assert f"the checkpoint '{damaged[1]}' is cut short or altered\n" in said
    assert said.count("The one before it is taken.") == 2
    ended = children(half.side, half.runs_dir, ckpt_path="last", **SETTINGS)
    assert "after step 8." in ended.said and steps_of(ended) == STEPS - 8
    assert_as_never_stopped(children, ended, half.runs_dir, half.side, **SETTINGS)
    kept = files(half.runs_dir, half.side)
    for path in kept:
        path.write_bytes(b"")
    said = f"none of the {len(kept)} checkpoints in '"
    half.refuses("last", said, "can be read; leave out --ckpt-path")


def test_where_there_is_no_checkpoint_yet_it_begins_at_the_start(half, children, tmp_path, capsys):
    empty = replace(half, runs_dir=tmp_path / "empty")
    assert empty.begin("last") is None
    assert "this run begins at the start." in capsys.readouterr().err
    assert not (tmp_path / "empty" / "resume").exists()
    ended = children(half.side, tmp_path / "other", ckpt_path="last", **SETTINGS)
    assert "There is no checkpoint in " in ended.said
    assert_as_never_stopped(children, ended, tmp_path / "other", half.side, **SETTINGS)


def test_the_command_refuses_in_one_sentence(half, tmp_path, monkeypatch, capsys):
    module = load_lesson(half.side, "resume")
    helpers.give(module, small_data(lesson="resume"), Noisy, "resume", monkeypatch)
    path = tmp_path / "cut.ckpt"
    path.write_bytes(half.last.read_bytes()[:5000])
    for arguments, expected in (
        (["--ckpt-path", str(path)], f"error: the checkpoint '{path}' is cut short or altered"),
        (["--ckpt-path", "nope.ckpt"], "error: there is no file 'nope.ckpt', "),
        (["--ckpt-path", "last", "--lr", "0.3"], "was made with "),
        (["--max-time", "1h"], "--max-time 1h: expected DD:HH:MM:SS"),
        (["--checkpoint-every-n-steps", "0"], "expected a whole number from 1 on"),
    ):
        before = half.snapshot()
        arguments = ["resume.py", "--runs-dir", str(half.runs_dir), *arguments]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit_:
            run(module.main, module.Args)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit_.value.code == 2 and said.startswith("error: ") and expected in said, said
        assert half.snapshot() == before
        count("bad inputs")


class Wider(Noisy):
    """One weight has another shape."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(self.flattened, 11)


@pytest.mark.parametrize("side", SIDES)
def test_a_network_of_another_shape_loses_nothing(side, children, tmp_path, monkeypatch):
    """A run that is complete: not a byte of it is touched before all of it was loaded."""
    _, folder = children.never_stopped(side, **SETTINGS)
    shutil.copytree(folder / "resume", tmp_path / "resume")
    whole = Half(side, tmp_path)
    before = whole.snapshot()
    assert {"result.json", "weights.pt", "metrics.csv", EVIDENCE} < {path.name for path in before}
    with pytest.raises(BadInput) as refused:
        train(side, tmp_path, monkeypatch, model=Wider, ckpt_path="last", **SETTINGS)
    sentence = str(refused.value)
    assert f"'{whole.last}' does not fit Wider: 2 of another shape" in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert whole.snapshot() == before
    # With the network that it is of, the very same call is not refused.
    train(side, tmp_path, monkeypatch, ckpt_path="last", **SETTINGS)
    count("checkpoints refused")


@pytest.mark.parametrize("side", SIDES)
def test_a_full_disk(side, children, tmp_path):
    """From step 12 on: the next checkpoint cannot be written, and those before it are whole."""
    first = children(side, tmp_path, at=[("after step 12", "full")], **SETTINGS)
    path = tmp_path / "resume" / side / "checkpoints" / "step_00000015.ckpt"
    assert first.status == 2 and "Traceback" not in first.said, first.said
    expected = (
        f"error: the checkpoint '{path}' could not be written (File too large); those before "
        "it are whole: make room for it, or name another folder by --runs-dir."
    )
    assert first.said.strip().splitlines()[-1] == expected
    assert names(tmp_path, side) == named(5, 8, 10)
    assert files(tmp_path, side, ".*") == []
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert steps_of(ended) == STEPS - 10
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


# The evidence, without which a checkpoint can be resumed but nothing be proved of it.


@pytest.mark.parametrize("side", SIDES)
def test_a_line_that_a_kill_cut_short(side, children, tmp_path):
    """It has no checkpoint, and the next line begins anew."""
    moment = "half of a line 3"
    killed = children(side, tmp_path, at=[(moment, signal.SIGKILL)], **SETTINGS)
    assert killed.moments[-1] == moment
    file = tmp_path / "resume" / side / EVIDENCE
    assert files(tmp_path, side)[-1].stem == "step_00000008"
    torn = file.read_text().splitlines()[-1]
    with pytest.raises(ValueError):
        json.loads(torn)
    # Killed once more, so that lines follow after the torn one.
    killed = children(
        side, tmp_path, at=[("before step 12", signal.SIGKILL)], ckpt_path="last", **SETTINGS
    )
    assert killed.status == -signal.SIGKILL
    lines = [line for line in file.read_text().splitlines() if line]
    assert lines[2] == torn and len(lines) == 6
    assert [json.loads(line)["global_step"] for line in (*lines[:2], *lines[3:])] == [
        5, 8, 10, 15, 16
    ]  # fmt: skip
    ended = children(side, tmp_path, ckpt_path="last", **SETTINGS)
    assert steps_of(ended) == STEPS - 16
    assert_as_never_stopped(children, ended, tmp_path, side, **SETTINGS)


def test_evidence_that_does_not_reach_the_checkpoint_is_refused(half):
    file = half.last.parent.parent / EVIDENCE
    lines = file.read_text().splitlines(keepends=True)
    for text, step in (("".join(lines[:-1]), 13), ("".join(lines[2:]), 13), ("not a line", 13)):
        file.write_text(text)
        half.refuses("last", file, f"does not reach step {step}; keep it beside the checkpoints")
    file.write_text("".join(lines[:-1]) + lines[-1][:100])
    half.refuses("last", file, "does not reach step 13")
    half.begin(files(half.runs_dir, half.side)[-2])  # the step before it is reached
    file.unlink()
    half.refuses("last", file, "does not reach step 13", "or leave out --ckpt-path")


# What is left out is missed.


LOADS = "        if self.trainer.training:  # not where it is loaded to be tested\n"


def at_load(code):
    """A change of lightning/resume.py: what is done to a checkpoint before it is resumed."""
    return LOADS, f"{LOADS}            {code}\n"


CONTROLS = {
    # what is lost: (side, checkpoint, stage that must differ first, (old text, new text), ...)
    "random states, by hand": (
        "plain", 13, "steps", ("        resume.set_random_states(ckpt[\"random\"])\n", ""),
    ),
    "weights, by hand": (
        "plain", 13, "steps",
        ("ckpt = checkpoints.load(self.net, path)", "ckpt = checkpoints.read(path)"),
    ),
    "the place in the order, by hand": (
        "plain", 13, "steps", ("sampler.skip(epoch, done * self.args.batch_size)", "pass"),
    ),
    "the schedule, by hand": (
        "plain", 13, "steps",
        ("        self.schedule.load_state_dict(ckpt[\"lr_schedulers\"][0])\n", ""),
    ),
    "the optimizer's state, by hand": (
        "plain", 13, "steps",
        ("        self.optimizer.load_state_dict(ckpt[\"optimizer_states\"][0])\n", ""),
    ),
    "early stopping's count, by hand": (
        "plain", 29, "steps", ("        vars(self.stopping).update(ckpt[\"stopping\"])\n", ""),
    ),
    "the best loss, by hand": (
        "plain", 29, "weights",
        ("self.step, self.best = ckpt[\"global_step\"], ckpt[\"best\"]",
         "self.step = ckpt[\"global_step\"]"),
    ),
    "that it has stopped, by hand": (
        "plain", 40, "steps",
        ("vars(self.stopping).update(ckpt[\"stopping\"])",
         "vars(self.stopping).update(ckpt[\"stopping\"] | {\"stopped\": False, \"wait\": 0})"),
    ),
    "one of the random states": (
        "plain", 13, "random",
        ("resume.set_random_states(ckpt[\"random\"])",
         "resume.set_random_states(ckpt[\"random\"] | {\"python\": __import__('random')"
         ".Random(1).getstate()})"),
    ),
    "random states": (
        "lightning", 13, "steps",
        ("            resume.set_random_states(checkpoint[\"random\"])\n", "            pass\n"),
    ),
    "weights": (
        "lightning", 13, "steps",
        ("checkpoints.load(model, path)", "checkpoints.read(path)"),
        at_load("checkpoint[\"state_dict\"] = self.state_dict()"),
    ),
    "the place in the order": (
        "lightning", 13, "data", ("    loader.sampler.skip(epoch, done * batch_size)\n", ""),
    ),
    "the schedule": ("lightning", 13, "steps", at_load("checkpoint[\"lr_schedulers\"] = []")),
    "the optimizer's state": (
        "lightning", 13, "steps", at_load("checkpoint[\"optimizer_states\"] = []"),
    ),
    "the Trainer's counters": (
        "lightning", 13, "steps",
        at_load("checkpoint[\"loops\"] = {\"fit_loop\": self.trainer.fit_loop.state_dict()}"),
    ),
    "early stopping's count": (
        "lightning", 29, "steps",
        at_load("checkpoint[\"callbacks\"].pop(self.trainer.early_stopping_callback.state_key)"),
    ),
    "that it has stopped": (
        "lightning", 40, "steps",
        ("self.trainer.should_stop = stopping.stopping_reason.value > 0", "pass"),
    ),
    "the best loss": (
        "lightning", 29, "weights",
        at_load("checkpoint[\"callbacks\"] = {k: v for k, v in checkpoint[\"callbacks\"].items() "
                "if \"ModelCheckpoint\" not in k}"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """Both sides' run that stops by itself, with a checkpoint of every step, and their folder."""
    folder = tmp_path_factory.mktemp("stopping")
    settings = STOPS | dict(checkpoint_every_n_steps=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "KEPT", 1000)
        results = {s: train(s, folder, monkeypatch, *ALL_KEPT[s], **settings) for s in SIDES}
    return folder, results


def test_there_are_enough():
    for side in SIDES:
        assert sum(own == side for own, *_ in CONTROLS.values()) >= 9
    stages = {stage for _, _, stage, *_ in CONTROLS.values()}
    assert stages == {"data", "steps", "weights", "random"}
    # Most of them run with the slow tests alone: here, that each finds what it changes.
    for own, _, _, *changes in CONTROLS.values():
        load(own, "resume", *changes)


@pytest.fixture(scope="module")
def as_it_is(stopping, tmp_path_factory):
    """Assert, once for each checkpoint, that the unchanged script ends the same."""
    seen = set()

    def check(side, step, path, monkeypatch):
        if (side, step) not in seen:
            folder = tmp_path_factory.mktemp("same")
            same = train(side, folder, monkeypatch, ckpt_path=path, **STOPS)
            assert_same(stopping[1][side], same)
            seen.add((side, step))

    return check


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", some(CONTROLS))
def test_what_is_left_out_is_missed(name, stopping, as_it_is, tmp_path, monkeypatch):
    side, step, stage, *changes = CONTROLS[name]
    folder, results = stopping
    path = folder / "resume" / side / "checkpoints" / f"step_{step:08d}.ckpt"
    # As it is, it ends the same; changed, it does not.
    as_it_is(side, step, path, monkeypatch)
    other = train(side, tmp_path / "other", monkeypatch, *changes, ckpt_path=path, **STOPS)
    comparison = compared(results[side], other)
    assert comparison.first_difference, f"{name} was not missed"
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")


def test_rows_and_losses_of_the_part_before_are_missed(half, children, monkeypatch):
    """A line of the evidence that lacks them is refused; and the comparison would find it, too."""
    reference, _ = children.never_stopped(half.side, **SETTINGS)
    file = half.last.parent.parent / EVIDENCE
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    for part, stage in (("losses", "steps"), ("order", "data"), ("rows", "metrics")):
        less = [line | {part: type(line[part])()} for line in lines[:1]] + lines[1:]
        if part == "rows":
            less = [line | {part: []} for line in lines]
        folder = half.runs_dir.with_name(part)
        shutil.copytree(half.runs_dir, folder)
        text = "".join(f"{json.dumps(line)}\n" for line in less)
        (folder / "resume" / half.side / EVIDENCE).write_text(text)
        Half(half.side, folder).refuses("last", EVIDENCE, f"lacks {part!r} of steps up to ")
        with monkeypatch.context() as patch:
            for check in ("check", "check_rows"):
                patch.setattr(evidence_file, check, lambda *_: None)
            result = train(half.side, folder, patch, ckpt_path="last", **SETTINGS)
        assert compared(reference.result, result).first_difference.name == stage
        count("negative controls")


# Half precision, whose scaler has a state too. On the CPU, as in test_optimize.py.

HALF = {
    "plain": ("GradScaler(device.type,", "GradScaler(device.type, growth_interval=2,"),
    "lightning": ("            precision=args.precision,\n            plugins=[SafeIO()],\n",
                  "            plugins=[SafeIO(), L.pytorch.plugins.MixedPrecision('16-mixed', "
                  "'cpu', __import__('torch').amp.GradScaler('cpu', growth_interval=2))],\n"),
}  # fmt: skip
FORGOTTEN = {
    "plain": ('        self.scaler.load_state_dict(ckpt["MixedPrecision"])\n', ""),
    "lightning": at_load('checkpoint.pop("MixedPrecision")'),
}


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory):
    """Both sides' run in half precision, and of each the checkpoint whose scale is the largest."""
    folder = tmp_path_factory.mktemp("scaled")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "KEPT", 1000)
        monkeypatch.setattr("common.run._check_precision", lambda *_: None)  # refused on a CPU
        results = {
            side: train(side, folder, monkeypatch, HALF[side], *ALL_KEPT[side],
                        precision="16-mixed", **SETTINGS)
            for side in SIDES
        }  # fmt: skip
    comparison = compare_results(*results.values())
    assert comparison.agree, comparison.first_difference
    scales = [
        [checkpoints.read(path)["MixedPrecision"]["scale"] for path in files(folder, side)]
        for side in SIDES
    ]
    assert scales[0] == scales[1] and len(scales[0]) == 7
    assert max(scales[0]) != 65536  # which is what a new scaler begins with
    place = scales[0].index(max(scales[0]))
    return results, {side: files(folder, side)[place] for side in SIDES}


@pytest.mark.parametrize("side", SIDES)
def test_the_scale_of_the_loss_is_resumed(side, half_precision, tmp_path, monkeypatch):
    """The scale doubles every second step, until a step is left out: where, the state decides."""
    results, paths = half_precision
    monkeypatch.setattr("common.run._check_precision", lambda *_: None)
    settings = SETTINGS | dict(precision="16-mixed", ckpt_path=paths[side])
    result = train(side, tmp_path / "same", monkeypatch, HALF[side], **settings)
    comparison = compare_results(result, results[side])
    assert comparison.agree, comparison.first_difference
    count("scalers resumed")
    changes = HALF[side], FORGOTTEN[side]
    result = train(side, tmp_path / "other", monkeypatch, *changes, **settings)
    assert compare_results(result, results[side]).first_difference.name == "steps"
    count("negative controls")


# Why the lesson does not do it as one would with the Trainer.


def test_a_checkpoint_before_the_validation_skips_it(children, tmp_path, monkeypatch):
    """A ModelCheckpoint that monitors nothing saves at an epoch's last batch, before validation.

    Where this fails, Lightning has learned to validate then, and the lesson need not monitor.
    """
    settings = SETTINGS | dict(checkpoint_every_n_steps=8, lr=0.02)
    old = "steps = ModelCheckpoint(folder, **then, **every)"
    new = """for name in ("monitor", "mode"):
        del then[name]
    then |= dict(save_top_k=-1, filename="step_{step:08d}_early")
    steps = ModelCheckpoint(folder, **then, **every)"""
    whole = train("lightning", tmp_path / "whole", monkeypatch, (old, new), **settings)
    early = tmp_path / "whole/resume/lightning/checkpoints/step_00000016_early.ckpt"
    held = checkpoints.read(early)
    assert len(whole["val_loss"]) == 3 and held["global_step"] == 2 * BATCHES
    result = train("lightning", tmp_path / "skipped", monkeypatch, ckpt_path=early, **settings)
    assert len(result["train_loss"]) == STEPS
    # And the epoch between was never validated: it went on without its loss.
    assert result["val_loss"] == [whole["val_loss"][0], whole["val_loss"][2]]
    # The lesson's own file of that step, which was saved after the validation.
    settings = SETTINGS | dict(lr=0.02)
    reference, folder = children.never_stopped("lightning", **settings)
    path = folder / "resume/lightning/checkpoints/step_00000016.ckpt"
    result = train("lightning", tmp_path / "right", monkeypatch, ckpt_path=path, **settings)
    assert result["val_loss"] == reference.result["val_loss"] == whole["val_loss"]


def test_what_self_log_writes_comes_after_the_checkpoint(children, tmp_path):
    """The row of a step after which a checkpoint is saved is not yet in metrics.csv then.

    So the loss of that step is taken from the evidence.
    """
    moment = "after step_00000010.ckpt has its name"
    children("lightning", tmp_path, at=[(moment, signal.SIGKILL)], **SETTINGS)

    def logged():
        table = metrics(tmp_path, "lightning").decode()
        return [int(r["step"]) for r in csv.DictReader(io.StringIO(table)) if r["train_loss"]]

    assert logged() == [4]
    ended = children("lightning", tmp_path, ckpt_path="last", **SETTINGS)
    assert logged() == [4, 9, 14, 19]
    assert_as_never_stopped(children, ended, tmp_path, "lightning", **SETTINGS)


# The parts.


def orders(sampler, epochs=3):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_the_sampler_skips_what_was_trained_on():
    expected = orders(EpochSampler(50, seed=3))
    assert sorted(expected[1]) == list(range(50)) and expected[0] != expected[1]
    for done in (0, 1, 16, 49, 50):
        sampler = EpochSampler(50, seed=3)
        sampler.skip(1, done)
        assert sampler.epoch == 1  # where processes that load ahead begin
        assert list(sampler) == expected[1][done:]
        sampler.set_epoch(2)
        assert list(sampler) == expected[2]
        sampler.set_epoch(1)
        assert list(sampler) == expected[1][done:]  # the second time as the first
    limited = EpochSampler(50, seed=3, first=20)
    limited.skip(0, 8)
    assert orders(limited) == [expected[0][8:20], expected[1][:20], expected[2][:20]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_skips_what_was_trained_on(workers):
    args = SimpleNamespace(batch_size=16, num_workers=workers, seed=0)
    for split in ("train", "val", "test"):
        setattr(args, f"limit_{split}_batches", 1.0)
    data = small_data(lesson="resume")
    whole, *_ = make_loaders(data, args)
    whole.sampler.set_epoch(1)
    expected = [images for images, _ in whole]
    assert len(expected) == BATCHES
    loader, val, _ = make_loaders(data, args)
    loader.sampler.skip(1, 48)
    # As the Trainer does it: processes fetch the first batches before set_epoch is called.
    batches = iter(loader)
    loader.sampler.set_epoch(1)
    got = [images for images, _ in batches]
    assert len(got) == BATCHES - 3
    assert all(map(torch.equal, got, expected[3:]))
    # Each evaluation loader comes whole, whatever was skipped.
    assert sum(len(labels) for _, labels in val) == 130


def test_the_last_ones_the_best_one_and_the_newest_are_kept(tmp_path):
    others = ["best.ckpt", ".tmp1234.ckpt", "note.txt"]
    steps = [f"step_{step:08d}.ckpt" for step in (9, 10, 99, 100, 12_345_678)]
    for name in others + steps[:3]:
        (tmp_path / name).touch()
    resume.prune(tmp_path / steps[2])
    assert {path.name for path in tmp_path.iterdir()} == {*others, *steps[:3]}
    for name in steps[3:]:
        (tmp_path / name).touch()
    # Of a run that resumes from an older checkpoint than the last: the one just written.
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
    count("generators resumed", 3)


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
            assert f" after step {int(step)}, which was saved; resume" in said.splitlines()[-1]
        assert not (own / "result.json").exists()
        assert f", after step {int(step)}." in end(command(name, "--ckpt-path", "last"), 0)
        a, b = (json.loads((folder / "result.json").read_text()) for folder in (whole, own))
        comparison = compare_results(a, b)
        assert comparison.agree and all(stage.compared for stage in comparison.stages)
        for file in ("weights.pt", "metrics.csv"):
            assert (own / file).read_bytes() == (whole / file).read_bytes()
        count("real commands stopped and resumed")


if __name__ == "__main__":
    serve()
