"""Nothing is lost: a run that is refused, or fails before its first step, leaves all as it was."""

from common import checkpoints, folders
from common.folders import EVIDENCE, put_back, settle, start_folder
from common.messages import BadInput

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import serving
from helpers import SIDES, Noisy, count, small_data, train
from test_command_line import typed

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("dataloader is not resumable", "logs directory", "Checkpoint directory")
]
RESUME = dict(lesson="resume", batch_size=16, max_epochs=2, checkpoint_every_n_steps=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("forked")) as server:
        yield server


def snapshot(folder):
    """Every file below a folder with what it holds, hidden ones too, and every folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# What fails before the first step of the optimizer.


class FailsAtOnce(Noisy):
    def forward(self, x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")


class FailsInTheStep(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyboardInterrupt


class Wider(Noisy):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(self.flattened, 11)


@contextlib.contextmanager
def no_data(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("common.data._check_limits", lambda *_: exec("raise BadInput('no data.')"))
        yield


BREAKS = {
    "the network": dict(model=FailsAtOnce),
    "Ctrl-C in the first step": dict(optimizer=FailsInTheStep),
    "a share below one batch": dict(limit_val_batches=0.0001),
}


def breaks(name, side, runs_dir, monkeypatch, **settings):
    """Run a lesson that breaks off before its first step."""
    more = dict(BREAKS[name])
    with monkeypatch.context() as patch:
        if optimizer := more.pop("optimizer", None):
            patch.setattr(torch.optim, "SGD", optimizer)
        with pytest.raises((BadInput, RuntimeError, KeyboardInterrupt, SystemExit)):
            train(side, runs_dir, patch, **more, **settings)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", BREAKS)
def test_a_new_run_that_makes_no_step_moves_nothing(name, side, tmp_path, monkeypatch):
    """Neither the complete run nor the one before it; nor one that was stopped, nor notes."""
    for seed in (1, 2):
        train(side, tmp_path, monkeypatch, seed=seed)
    (tmp_path / "cifar" / side / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert Path("cifar", f"{side}.previous", "result.json") in before
    breaks(name, side, tmp_path, monkeypatch, seed=3)
    assert snapshot(tmp_path) == before
    # One that was stopped, without a checkpoint: its rows are still there.
    (tmp_path / "cifar" / side / "result.json").unlink()
    before = snapshot(tmp_path)
    breaks(name, side, tmp_path, monkeypatch, seed=3)
    assert snapshot(tmp_path) == before
    # Where there was nothing, nothing is left.
    breaks(name, side, tmp_path / "empty", monkeypatch)
    assert not [path for path in (tmp_path / "empty").rglob("*") if path.is_file()]
    assert not (tmp_path / "empty" / "cifar" / side).exists()
    # The run itself is a good one.
    train(side, tmp_path, monkeypatch, seed=3)
    assert (tmp_path / "cifar" / side / "notes.txt").read_text() == "mine"
    count("runs without a step that lost nothing", 3)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run of the lesson resume on each side."""
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for side in SIDES:
            train(side, folder, monkeypatch, **RESUME)
    return folder


def other_momentum(content):
    state = content["optimizer_states"][0]["state"]
    state[0]["momentum_buffer"] = torch.zeros(3)


def one_group_more(content):
    content["optimizer_states"][0]["param_groups"] *= 2


def one_parameter_less(content):
    content["optimizer_states"][0]["param_groups"][0]["params"].pop()
    content["optimizer_states"][0]["state"].popitem()


def generators_of_another_kind(content):
    content["random"]["python"] = "text"


SPOILT = [other_momentum, one_group_more, one_parameter_less, generators_of_another_kind]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_refused_resume_leaves_a_complete_run(spoil, side, complete, tmp_path, monkeypatch):
    runs = shutil.copytree(complete, tmp_path / "runs")
    path = sorted((runs / "resume" / side / "checkpoints").glob("step_*.ckpt"))[-1]
    content = checkpoints.read(path)
    spoil(content)
    checkpoints.save(path, content)
    before = snapshot(runs)
    with pytest.raises(BadInput) as refused:
        train(side, runs, monkeypatch, ckpt_path=path, **RESUME)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert snapshot(runs) == before
    count("refused checkpoints that lost nothing")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*BREAKS, "another network"])
def test_a_resume_that_makes_no_step_leaves_a_complete_run(
    name, side, complete, tmp_path, monkeypatch
):
    """From the best checkpoint, after which steps follow, and from the last, after which none."""
    monkeypatch.setitem(BREAKS, "another network", dict(model=Wider))
    for which in ("best", "last"):
        runs = shutil.copytree(complete, tmp_path / which)
        if which == "best":  # of the first epoch
            own = runs / "resume" / side / "checkpoints"
            first = "step_00000008.ckpt" if side == "lightning" else "step_00000010.ckpt"
            shutil.copy(own / first, own / "best.ckpt")
        before = snapshot(runs)
        assert {"result.json", EVIDENCE, "weights.pt"} < {path.name for path in before}
        if name == "Ctrl-C in the first step" and which == "last":
            continue  # there is none
        breaks(name, side, runs, monkeypatch, ckpt_path=which, **RESUME)
        assert snapshot(runs) == before
        count("resumed runs without a step that lost nothing")


# A kill in the midst of it: what the next run finds.


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own comes after it."""


def killed_at(number, do, monkeypatch):
    """Call `do`, and end it before the operation of that number on the file system."""
    done = []

    def counted(usual):
        def call(*args, **kwargs):
            done.append(args[0])
            if len(done) == number:
                raise Killed
            if len(done) < number:
                return usual(*args, **kwargs)
            raise Killed  # what is cleaned up after the kill is not

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Killed):
            do()
            return False
    return True


def run_of(folder, name):
    folder.mkdir(parents=True)
    for file in ("result.json", "weights.pt", "metrics.csv"):
        (folder / file).write_text(name)


def whole_runs(folder):
    """The names of the runs that are whole, wherever they are."""
    found = set()
    for path in folder.rglob("result.json"):
        others = [path.parent / file for file in ("weights.pt", "metrics.csv")]
        if all(other.exists() and other.read_text() == path.read_text() for other in others):
            found.add(path.read_text())
    return found


def test_a_kill_at_any_operation_loses_no_complete_run(tmp_path, monkeypatch):
    """While a new run makes its folder ready, and at its first step; then the next one starts."""
    kills = 0
    for number in range(1, 200):
        folder = tmp_path / f"{number}" / "plain"
        run_of(folder, "newer")
        run_of(folder.with_name("plain.previous"), "older")

        def begin(folder=folder):
            start_folder(folder)
            (folder / "metrics.csv").write_text("rows")
            settle(folder)

        if not killed_at(number, begin, monkeypatch):
            break
        kills += 1
        assert "newer" in whole_runs(folder.parent), number
        put_back(folder)
        where = {path.parent.name for path in folder.parent.rglob("result.json")}
        # Either it is where it was, or it made way for the run that has made a step.
        assert where <= {"plain", "plain.previous"} and "newer" in whole_runs(folder.parent)
        if (folder / "result.json").exists():
            assert (folder / "result.json").read_text() == "newer"
        else:
            assert (folder.with_name("plain.previous") / "result.json").read_text() == "newer"
    assert kills >= 8
    count("kills while folders are moved", kills)


def test_a_kill_at_any_operation_of_a_resumed_run(tmp_path, monkeypatch):
    """What is moved aside in the folder is put back, whole or not at all."""
    kills = 0
    for number in range(1, 200):
        folder = tmp_path / f"{number}" / "plain"
        run_of(folder, "newer")

        if not killed_at(number, lambda folder=folder: start_folder(folder, True), monkeypatch):
            break
        kills += 1
        put_back(folder)
        assert whole_runs(folder.parent) == {"newer"}, number
        assert {path.name for path in folder.iterdir()} == {
            "result.json", "weights.pt", "metrics.csv"
        }  # fmt: skip
    assert kills >= 4
    count("kills while folders are moved", kills)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_killed_before_its_first_step(side, server, tmp_path):
    """By SIGKILL: the next run, and not before, finds what the killed one had moved aside."""
    for seed in (1, 2):
        assert server.lesson(side, "cifar", tmp_path, "--seed", seed).status == 0
    before = snapshot(tmp_path)
    # Before the hook that settles it: the step is made, and nobody has heard of it.
    killed = server.lesson(side, "cifar", tmp_path, at=dict(step=1))
    killed.until((killed.out / "there").exists)
    killed.signal(signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    # A run that is refused puts it back, too.
    refused = server.lesson(side, "cifar", tmp_path, "--limit-val-batches", "0.001")
    refused.sentence(2)
    assert snapshot(tmp_path) == before


# One run in a folder.


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lesson", ["resume", pytest.param("cifar", marks=pytest.mark.slow)])
def test_a_second_run_in_the_folder_is_refused(lesson, side, server, tmp_path):
    """And the first one ends as if there had been no second."""
    first = server.lesson(side, lesson, tmp_path, at=dict(step=3))
    first.until((first.out / "there").exists)
    before = snapshot(tmp_path)
    for more in ([], ["--seed", "5"], ["--ckpt-path", "last"] if lesson == "resume" else []):
        second = server.lesson(side, lesson, tmp_path, *more)
        said = second.sentence(2)
        assert f"another run is in '{tmp_path / lesson / side}'" in said and f"{first.pid}" in said
        assert snapshot(tmp_path) == before
        count("second runs refused")
    # The other side has a folder of its own, and so has another --runs-dir.
    (other,) = set(SIDES) - {side}
    for where, whose in ((tmp_path, other), (tmp_path / "elsewhere", side)):
        assert server.lesson(whose, lesson, where, "--max-epochs", "1").status == 0
    # The system releases what a killed process held.
    first.signal(signal.SIGKILL)
    assert first.status == -signal.SIGKILL
    assert server.lesson(side, lesson, tmp_path, "--max-epochs", "1").status == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_many_runs_at_once(server, tmp_path):
    """One is in the folder; all others are refused, and leave no trace."""
    commands = [server.lesson("plain", "cifar", tmp_path, "--seed", n) for n in range(6)]
    ended = [command.status for command in commands]
    assert set(ended) <= {0, 2} and 0 in ended
    for command, status in zip(commands, ended, strict=True):
        assert status == 0 or "another run is in" in command.sentence(2)
    for folder in (tmp_path / "cifar").glob("plain*"):
        steps = [row["step"] for row in folders.read_rows(folder) if "train_loss" in row]
        assert steps == list(range(30)), folder  # rows of one run alone
    count("second runs refused", ended.count(2))


def test_a_lock_that_nobody_holds_is_no_obstacle(tmp_path):
    """Its file stays where a process was killed; and where no file can be locked, it is said."""
    folder = tmp_path / "cifar" / "plain"
    with folders.locked(folder):
        (path,) = tmp_path.rglob("*.lock")
        assert path.read_text().strip() == f"{os.getpid()}"
    assert not path.exists()
    path.write_text("99999999")
    with folders.locked(folder):
        assert path.exists()
    assert not path.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "lockf", refuse)
    with folders.locked(tmp_path / "cifar" / "plain"):
        pass
    assert "cannot be locked" in capsys.readouterr().err


# Refused before anything moves.

REFUSED = {
    "cifar": [["--lr", "1e39"], ["--lr", "1.7e308"], ["--lr", "-1"], ["--momentum", "1e39"],
              ["--momentum", "inf"], ["--seed", "4294967296"]],
    "optimize": [["--weight-decay", "1e39"], ["--lr", "1e300"], ["--gradient-clip-val", "nan"],
                 ["--label-smoothing", "1.1"]],
    "speed": [["--translate", "32"], ["--translate", "1000000"], ["--lr", "1e39"]],
    "finetune": [["--start-from", "nope.ckpt"], ["--lr", "1e39"]],
    "callbacks": [["--min-delta", "nan"], ["--lr", "1e39"]],
}  # fmt: skip


@pytest.mark.parametrize("lesson", REFUSED)
def test_what_a_later_step_would_refuse_is_refused_first(lesson, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for side in SIDES:
        run_of(tmp_path / "runs" / lesson / side, "newer")
        run_of(tmp_path / "runs" / lesson / f"{side}.previous", "older")
        before = snapshot(tmp_path)
        for words in REFUSED[lesson]:
            with pytest.raises(SystemExit) as exit_:
                typed(side, lesson, "--data", "shapes", "--accelerator", "cpu", *words)
            said = capsys.readouterr().err
            assert exit_.value.code == 2 and "Traceback" not in said, said
            assert said.startswith("error: ") and said.count("\n") == 1, said
            assert snapshot(tmp_path) == before, words
            count("refused before anything moved")


EXTREMES = {
    "cifar": [dict(lr=1e38), dict(momentum=1e9), dict(seed=2**32 - 1), dict(batch_size=10**9),
              dict(lr=1e-300), dict(log_every_n_steps=10**9)],
    "optimize": [dict(lr=1e38, weight_decay=1e9), dict(gradient_clip_val=1e9), dict(ema_decay=1.0),
                 dict(label_smoothing=1.0), dict(accumulate_grad_batches=10**9),
                 dict(schedule="onecycle", lr=1e38), dict(schedule="plateau", lr=1e38)],
    "callbacks": [dict(min_delta=1e9), dict(patience=10**9), dict(lr=1e37)],
    "finetune": [dict(lr=1e38), dict(unfreeze_at_epoch=10**9)],
    "resume": [dict(lr=1e38), dict(checkpoint_every_n_steps=10**9, max_time="99:99:99:99")],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("lesson", EXTREMES)
def test_what_is_not_refused_comes_to_its_end(lesson, tmp_path, monkeypatch):
    """The ends of the ranges: each gives a result, or one sentence that the loss is no number."""
    for side in SIDES:
        for settings in EXTREMES[lesson]:
            with contextlib.suppress(BadInput):
                from common.messages import Stopped

                with contextlib.suppress(Stopped):
                    train(side, tmp_path, monkeypatch, lesson=lesson,
                          images=small_data(40, 20, 20, lesson=lesson),
                          **{"max_epochs": 1, **settings})  # fmt: skip
            count("extreme settings")
