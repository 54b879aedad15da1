"""The lesson `callbacks`: the decisions are Lightning's, and every logger holds the same."""

from common import ROOT, checkpoints
from common import options as options_module
from common.options import Options
from common.parity import compare_results
from common.recipes import RECIPES
from common.sidebyside import cells

import csv
import io
import json
import math
import re
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers import SIDES, count, load_lesson, small_data, some, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

PLAIN, LIGHTNING = (load_lesson(side, "callbacks") for side in SIDES)

# It stops by itself after a few epochs, and the best epoch is not the last.
STOPS = dict(lesson="callbacks", lr=0.2, seed=1, optimizer="sgd", patience=2, max_epochs=12)


# The decisions.


def decided_by_lightning(val_losses, patience, min_delta):
    """Call the hooks of the lesson's own callbacks, epoch by epoch, as the Trainer does.

    Returns the epochs in which best.ckpt and last.ckpt were written, and why it stopped.
    """
    recipe = replace(RECIPES["callbacks"], patience=patience, min_delta=min_delta)
    folder = Path("nowhere")
    stopping, best, last, *_ = LIGHTNING.make_callbacks(recipe, Options(), None, folder)
    written = {"best": [], "last": []}
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, fast_dev_run=False,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision),
        should_stop=False, is_global_zero=False, check_val_every_n_epoch=1, val_check_interval=1.0,
        num_val_batches=[1],
    )  # fmt: skip
    trainer.save_checkpoint = lambda path, weights_only: written[Path(path).stem].append(epoch)
    for epoch, loss in enumerate(val_losses):
        trainer.current_epoch, trainer.global_step = epoch, 10 * (epoch + 1)
        trainer.callback_metrics = {"val_loss": torch.tensor(loss, dtype=torch.float64)}
        for callback in (stopping, best, last):
            callback.on_validation_end(trainer, None)
            callback.on_train_epoch_end(trainer, None)
        if trainer.should_stop:
            break
    return written["best"], written["last"], stopping.stopping_reason.name


def decided_by_hand(val_losses, patience, min_delta):
    best, reason = [], "not stopped"
    for epoch in range(len(val_losses)):
        seen = val_losses[: epoch + 1]
        if PLAIN.best_epoch(seen) == epoch:
            best.append(epoch)
        reason = PLAIN.stop_reason(seen, patience, min_delta)
        if reason != "not stopped":
            break
    return best, list(range(epoch + 1)), reason.upper().replace(" ", "_")


# Few different values, so that ties and gains of exactly min_delta occur; and any other number.
STEPS = st.integers(0, 8).map(lambda eighths: eighths / 8)
LOSSES = st.one_of(STEPS, st.floats(0, 10), st.sampled_from([math.nan, math.inf, 0.1 + 0.2, 0.3]))


@settings(max_examples=1000, deadline=None)
@example([1.0, 1.0, 1.0], 2, 0.0)  # ties
@example([1.0, 0.75, 0.5, 0.25], 1, 0.25)  # each gain is exactly min_delta
@example([0.3 + 0.1, 0.3], 1, 0.1)  # 0.1 in the decimal system, less in binary
@example([math.nan], 3, 0.0)
@example([1.0, 0.9, math.inf], 3, 0.0)
@given(
    st.lists(LOSSES, min_size=1, max_size=20),
    st.integers(1, 5),
    st.one_of(STEPS, st.floats(0, 1)),
)
def test_the_same_decisions_as_lightning(val_losses, patience, min_delta):
    ours = decided_by_hand(val_losses, patience, min_delta)
    assert ours == decided_by_lightning(val_losses, patience, min_delta)
    assert ours[0] and ours[0][0] == 0 and ours[1][-1] <= len(val_losses) - 1
    count("series of losses, decided as Lightning does")
    if ours[2] != "NOT_STOPPED":
        count("of these, stopped early")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("stopped")
        return folder, {side: train(side, folder, monkeypatch, **STOPS) for side in SIDES}


def test_both_sides_stop_at_the_same_epoch(stopped):
    _, runs = stopped
    results = [runs[side].result() for side in SIDES]
    assert compare_results(*results).agree
    decisions = results[0]["decisions"]
    assert decisions["stopped by"].startswith("early stopping: no validation loss lower")
    assert decisions["epochs"] == len(results[0]["val_loss"]) < 12
    assert decisions["best epoch"] == decisions["epochs"] - 1 - 2  # then two without improvement
    assert decisions["best validation loss"] == min(results[0]["val_loss"])
    count("pairs of runs that stopped early")


def test_the_best_weights_are_tested(stopped):
    folder, runs = stopped
    for side in SIDES:
        files = folder / "callbacks" / side / "checkpoints"
        assert sorted(path.name for path in files.iterdir()) == ["best.ckpt", "last.ckpt"]
        best, last = (checkpoints.read(files / f"{name}.ckpt") for name in ("best", "last"))
        decisions = runs[side].decisions
        assert best["epoch"] == decisions["best epoch"] < last["epoch"] == decisions["epochs"] - 1
        assert best["global_step"] == 15 * (best["epoch"] + 1)
        now = runs[side].model.state_dict()
        weights = checkpoints.weights(best, files)
        assert now.keys() == weights.keys() and len(now) > 0
        assert all(torch.equal(now[name], weights[name]) for name in now)
        others = checkpoints.weights(last, files)
        assert not all(torch.equal(now[name], others[name]) for name in now)
        assert str(best["epoch"]) in decisions["tested"]
        count("checkpoints", 2)


def test_checkpoints_hold_the_same_on_both_sides(stopped):
    folder, _ = stopped
    for name in ("best", "last"):
        plain, lightning = (
            checkpoints.read(folder / "callbacks" / side / "checkpoints" / f"{name}.ckpt")
            for side in SIDES
        )
        assert plain["hyper_parameters"] == dict(lightning["hyper_parameters"])
        assert plain["hyper_parameters"]["lr"] == 0.2
        assert len(plain["hyper_parameters"]["classes"]) == 10
        for key in ("epoch", "global_step"):
            assert plain[key] == lightning[key]
        theirs = lightning["state_dict"]
        assert {f"model.{key}" for key in plain["state_dict"]} == set(theirs)
        assert all(torch.equal(v, theirs[f"model.{k}"]) for k, v in plain["state_dict"].items())
        ours, theirs = plain["optimizer_states"][0], lightning["optimizer_states"][0]
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for number, state in ours["state"].items():
            assert all(torch.equal(state[key], theirs["state"][number][key]) for key in state)


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_that_is_no_number_stops_at_once(side, tmp_path, monkeypatch):
    run = train(side, tmp_path, monkeypatch, **{**STOPS, "lr": 1e38})
    assert len(run.val) == 1 and "is not a number" in run.decisions["stopped by"]
    assert run.decisions["best epoch"] == 0  # there is no other
    assert run.result()["decisions"]["best validation loss"] is None


@pytest.mark.parametrize("side", SIDES)
def test_no_epoch_was_validated(side, tmp_path, monkeypatch):
    run = train(side, tmp_path, monkeypatch, lesson="callbacks", max_steps=7)
    assert run.val == [] and len(run.train_loss) == 7
    assert run.decisions == {
        "stopped by": "--max-steps 7",
        "tested": "the last weights, since no epoch was validated",
    }
    assert not (tmp_path / "callbacks" / side / "checkpoints").exists()


CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "one epoch more of patience": ("plain", "steps", ("wait >= patience", "wait > patience")),
    "the last weights tested": ("plain", "weights", ("best.ckpt\")", "last.ckpt\")")),
    "whatever weights there are tested": (
        "lightning", "weights", ("datamodule, best=True)", "datamodule)"),
    ),
    "pictures in train mode": (
        "lightning", "steps",
        ("        epoch, step = trainer",
         "        module.model.train()\n        epoch, step = trainer"),
    ),
    "nll_loss of probabilities": (
        "lightning", "steps",
        ("        loss = F.nll_loss(output, labels)\n        self.losses",
         "        loss = F.nll_loss(output.exp(), labels)\n        self.losses"),
    ),
    "a validation loss in float32": (
        "lightning", "decisions",
        ('else loss.double()', 'else loss'),
    ),
    "twice the learning rate": (
        "lightning", "steps",
        ("super().__init__(model, recipe, ",
         "super().__init__(model, type(recipe)(**{**vars(recipe), 'lr': 2 * recipe.lr}), "),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, stopped, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes, **STOPS).result()
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, stopped[1][other].result())
    assert comparison.first_difference, f"{name} was not found"
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")


# Why the lesson has two ModelCheckpoints, and looks after validation alone.


class Rising(L.LightningModule):
    """Its validation loss rises from epoch to epoch: the first one is the best."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, *callbacks, **changes):
    loader = torch.utils.data.DataLoader(torch.ones(4, 1))
    trainer = L.Trainer(
        **{"max_epochs": 3, **changes}, accelerator="cpu", devices=1, logger=False,
        callbacks=list(callbacks), default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Rising(), loader, loader)
    return trainer


def test_save_last_writes_the_best_one_again(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_last=True))
    assert checkpoints.read(tmp_path / "last.ckpt")["epoch"] == 0  # of epochs 0, 1 and 2


def test_early_stopping_counts_an_epoch_that_was_cut_short(tmp_path):
    """By default it looks at the end of the training epoch, at a val_loss one epoch old."""
    waited = []
    for settings_ in ({}, {"check_on_train_epoch_end": False}):
        stopping = L.pytorch.callbacks.EarlyStopping("val_loss", patience=9, **settings_)
        fit(tmp_path, stopping, max_steps=6, enable_checkpointing=False)
        waited.append(stopping.wait_count)
    assert waited == [1, 0]


# The loggers.


def of_tensorboard(folder):
    """Return {name: [(step, value)]} of all scalars, and the pictures as (step, pixels)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    assert tags["images"] == ["predictions"]
    pictures = [
        (image.step, np.array(Image.open(io.BytesIO(image.encoded_image_string))))
        for image in events.Images("predictions")
    ]
    return scalars, pictures


def records(path):
    """Read a .wandb file: records in blocks of 32 KiB, LevelDB's log format, after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768  # too little room for a head: the block is filled up
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def of_wandb(folder):
    """The same of W&B's offline file, and the settings that it holds."""
    (path,) = folder.glob("offline-run-*/*.wandb")
    # W&B writes from a process of its own, and now and then its last records come a little later.
    for _ in range(300):
        if any(record.WhichOneof("record_type") == "exit" for record in records(path)):
            break
        time.sleep(0.1)
    scalars, pictures, config = {}, [], {}
    for record in records(path):
        if record.WhichOneof("record_type") in ("run", "config"):
            changes = record.run.config if record.HasField("run") else record.config
            config |= {item.key: json.loads(item.value_json) for item in changes.update}
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        step = row.pop("trainer/global_step")
        if "predictions/filenames" in row:
            (name,) = row["predictions/filenames"]
            pictures.append((step, np.array(Image.open(path.parent / "files" / name))))
            continue
        for name, value in row.items():
            if not name.startswith("_"):
                scalars.setdefault(name, []).append((step, value))
    return scalars, pictures, config


def of_csv(folder):
    scalars = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    scalars.setdefault(name, []).append((int(row["step"]), float(value)))
    return scalars


NAMES = {
    "train_loss_step", "train_loss_epoch", "train_accuracy_step", "train_accuracy_epoch",
    "val_loss", "val_accuracy", "val_f1", "test_loss", "test_accuracy", "test_f1",
}  # fmt: skip


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_each_logger_holds_the_same_of_both_sides(logger, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = {}
    for side in SIDES:
        train(side, tmp_path, monkeypatch, lesson="callbacks", logger=logger)
        folder = tmp_path / "callbacks" / side
        if logger == "wandb":
            scalars, pictures, config = of_wandb(folder / "wandb")
            assert config["lr"] == 0.02 and config["lesson"] == "callbacks"
        else:
            scalars, pictures = of_tensorboard(folder / "tensorboard")
        assert set(scalars) == NAMES | {"epoch"}
        # What metrics.csv has; TensorBoard keeps float32.
        for name, values in of_csv(folder).items():
            assert [step for step, _ in scalars[name]] == [step for step, _ in values]
            for (_, theirs), (_, value) in zip(scalars[name], values, strict=True):
                assert theirs == pytest.approx(value, rel=1e-6)
        # Two epochs of 15 steps: pictures after each, the same as the files.
        assert [step for step, _ in pictures] == [14, 29]
        for epoch, (_, pixels) in enumerate(pictures):
            file = np.array(Image.open(folder / "pictures" / f"epoch_{epoch}.png"))
            assert np.array_equal(pixels, file) and len(np.unique(file)) > 50
        found[side] = scalars, pictures
    (ours, our_pictures), (theirs, their_pictures) = found["plain"], found["lightning"]
    compared = 0
    for name in NAMES:
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]]
        for (_, a), (_, b) in zip(ours[name], theirs[name], strict=True):
            assert a == pytest.approx(b, rel=1e-6), name
            compared += 1
    assert compared == 2 * 6 + 2 * 2 + 3 * 2 + 3
    count(f"values in {logger}", compared)
    for (_, a), (_, b) in zip(our_pictures, their_pictures, strict=True):
        assert np.array_equal(a, b)
        count("pictures in loggers")


def test_the_same_32_images_after_each_epoch():
    """The pictures show the first validation images, which no shuffling moves."""
    from common import figures

    assert figures.SHOWN == 32
    data = small_data()
    net = RECIPES["callbacks"].model().eval()
    before = torch.get_rng_state()
    folder = Path("pictures")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Image.Image, "save", lambda self, path: None)
        monkeypatch.setattr(Path, "mkdir", lambda self, **kwargs: None)
        pixels = figures.predictions(net, data, 3, folder)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(side, logger, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options_module.importlib.util, "find_spec", lambda name: None)
    said = refused(side, ["--logger", logger], tmp_path, monkeypatch, capsys)
    assert f"needs the package {logger}" in said and "extra `loggers`" in said


def refused(side, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["callbacks.py", "--data", "shapes", *arguments])
    with pytest.raises(SystemExit) as exit_:
        load_lesson(side, "callbacks").main()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and said.startswith("error: "), said
    count("bad inputs")
    return said


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--logger", "mlflow"], "'csv', 'tensorboard', 'wandb'"),
        (["--patience", "0"], "--patience: expected a whole number from 1 on, got '0'"),
        (["--patience", "2.5"], "got '2.5'"),
        (["--min-delta", "-1"], "--min-delta: expected a number from 0.0 on, got '-1'"),
        (["--min-delta", "nan"], "got 'nan'"),
    ],
)
def test_bad_input(arguments, expected, tmp_path, monkeypatch, capsys):
    for side in SIDES:
        assert expected in refused(side, arguments, tmp_path, monkeypatch, capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("side", SIDES)
def test_wandb_goes_online_only_when_told_to(side, tmp_path, monkeypatch, capsys):
    """Told to, but without an account: it ends with one sentence."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Small splits: it gets as far as the logger.
    data = small_data(lesson="callbacks")
    monkeypatch.setattr("common.data.load_data", lambda recipe, options: data)
    said = refused(side, ["--logger", "wandb"], tmp_path, monkeypatch, capsys)
    assert "there is no account to log in to; type .venv/bin/wandb login" in said
    monkeypatch.setenv("WANDB_MODE", "sideways")
    said = refused(side, ["--logger", "wandb"], tmp_path, monkeypatch, capsys)
    assert "WANDB_MODE is 'sideways'" in said and "offline, online, disabled" in said


def test_the_exercises_are_tested_changes():
    page = (ROOT / "docs" / "callbacks.md").read_text()
    rows = re.findall(r"^\| (.+) \| (plain|lightning) \| (\w+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == list(CHANGES) and len(rows) >= 7
    for name, side, stage in rows:
        assert CHANGES[name][:2] == (side, stage), name
        count("exercises")
    titles = re.findall(r"^\| ([A-Z][^|]+?) \|", page, re.MULTILINE)
    source = (ROOT / "plain" / "callbacks.py").read_text()
    assert titles == [title for title in cells(source) if title]
