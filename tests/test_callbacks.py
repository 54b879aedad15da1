"""The lesson `callbacks`: the decisions are Lightning's, and every logger holds the same."""

from common import ROOT, checkpoints, figures
from common.models import DeepNet
from common.proof.compare import compare_results
from common.proof.sidebyside import cells
from common.run import run

import csv
import importlib.util
import io
import json
import math
import re
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers import (
    SIDES,
    WITH_CHECKPOINTS,
    Noisy,
    arguments,
    assert_agree,
    count,
    give,
    load_lesson,
    small_data,
    some,
    train,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

SHOWN = figures.SHOWN  # the other tests draw fewer
# It stops by itself after a few epochs, and the best epoch is not the last.
STOPS = dict(lesson="callbacks", lr=0.2, seed=1, patience=2, max_epochs=12)


# The decisions.


class Enough(Exception):
    """What the test wanted to see was seen."""


@pytest.fixture(scope="module")
def decide(tmp_path_factory):
    """Two functions that ask the lesson's own main, on either side, what it decides.

    Each takes validation losses, patience and min_delta, and returns the epochs in which best.ckpt
    and last.ckpt were written, and whether the training was stopped.
    """
    folder, few = tmp_path_factory.mktemp("decide"), small_data(lesson="callbacks")
    modules = {side: load_lesson(side, "callbacks") for side in SIDES}
    plain, lightning = modules["plain"], modules["lightning"]
    every = {side: arguments(modules[side], side, "callbacks", folder) for side in SIDES}
    with pytest.MonkeyPatch.context() as patch:
        for module in modules.values():
            give(module, few, Noisy, "callbacks", patch)
        nothing = SimpleNamespace(log_metrics=lambda *_: 0, log_picture=lambda *_: 0,
                                  close=lambda: 0)  # fmt: skip
        patch.setattr(plain, "Logger", lambda args: nothing)
        patch.setattr(plain, "train_epoch", lambda *_: {})
        patch.setattr(plain, "figures", SimpleNamespace(predictions=lambda *_: None))
        patch.setattr(plain, "checkpoints", SimpleNamespace(load=lambda *_: None))
        patch.setattr(lightning, "LitCallbacks", lambda *_: None)

        def by_hand(val_losses, patience, min_delta):
            args, written, stopping = every["plain"], {"best": [], "last": []}, []
            args.patience, args.min_delta = patience, min_delta
            args.max_epochs, losses = len(val_losses), iter([*val_losses, math.nan])  # and the test

            class Kept(usual):
                def __init__(self, *given):
                    super().__init__(*given)
                    stopping.append(self)

            patch.setattr(plain, "EarlyStopping", Kept)
            patch.setattr(plain, "evaluate", lambda *_: {"val_loss": next(losses)})
            patch.setattr(
                plain, "save", lambda name, net, opt, epoch, *_: written[name].append(epoch)
            )
            plain.main(args)
            return written["best"], written["last"], stopping[0].stopped

        def by_lightning(val_losses, patience, min_delta):
            args, given = every["lightning"], {}
            args.patience, args.min_delta = patience, min_delta

            def trainer(**arguments):
                given.update(arguments)
                raise Enough

            patch.setattr(lightning, "L", SimpleNamespace(
                Trainer=trainer, seed_everything=lambda *_, **__: None))  # fmt: skip
            with pytest.raises(Enough):
                lightning.main(args)
            return hooks_called(given["callbacks"], val_losses)

        usual = plain.EarlyStopping
        yield by_hand, by_lightning


def hooks_called(callbacks, val_losses):
    """Call the hooks of the lesson's callbacks, epoch by epoch, as the Trainer does."""
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
        for callback in callbacks[:3]:  # EarlyStopping, and two ModelCheckpoints
            callback.on_validation_end(trainer, None)
            callback.on_train_epoch_end(trainer, None)
        if trainer.should_stop:
            break
    return written["best"], written["last"], trainer.should_stop


# Few different values, so that ties and gains of exactly min_delta occur; and any other number.
STEPS = st.integers(0, 8).map(lambda eighths: eighths / 8)
LOSSES = st.one_of(STEPS, st.floats(0, 10), st.sampled_from([math.nan, math.inf, 0.1 + 0.2, 0.3]))


SERIES = (
    st.lists(LOSSES, min_size=1, max_size=20),
    st.integers(1, 5),
    st.one_of(STEPS, st.floats(0, 1)),
)


def assert_same_decisions(decide, val_losses, patience, min_delta):
    by_hand, by_lightning = decide
    ours = by_hand(val_losses, patience, min_delta)
    assert ours == by_lightning(val_losses, patience, min_delta)
    best, last, stopped = ours
    assert best[0] == 0 and last == list(range(len(last))) and len(last) <= len(val_losses)
    count("series of losses, decided as Lightning does")
    count("of these, stopped early", stopped)


@settings(max_examples=300, deadline=None)
@example([1.0, 1.0, 1.0], 2, 0.0)  # ties
@example([1.0, 0.75, 0.5, 0.25], 1, 0.25)  # each gain is exactly min_delta
@example([0.3 + 0.1, 0.3], 1, 0.1)  # 0.1 in the decimal system, less in binary
@example([math.nan], 3, 0.0)
@example([1.0, 0.9, math.inf], 3, 0.0)
@given(*SERIES)
def test_the_same_decisions_as_lightning(decide, val_losses, patience, min_delta):
    assert_same_decisions(decide, val_losses, patience, min_delta)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(*SERIES)
def test_many_of_the_same_decisions(decide, val_losses, patience, min_delta):
    assert_same_decisions(decide, val_losses, patience, min_delta)


def trained(side, folder, monkeypatch, *changes, **settings):
    """Train one side and draw no pictures; the network is asked what they would show."""

    def predictions(net, data, epoch, folder):
        with torch.no_grad():
            net(data.val.__getitems__(list(range(figures.SHOWN)))[0])

    monkeypatch.setattr(figures, "predictions", predictions)
    return train(side, folder, monkeypatch, *changes, **{**STOPS, **settings})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("stopped")
        return folder, {side: trained(side, folder, monkeypatch) for side in SIDES}


def test_both_sides_stop_at_the_same_epoch(stopped):
    _, results = stopped
    comparison = compare_results(*results.values())
    assert_agree(comparison, WITH_CHECKPOINTS)
    losses = results["plain"]["val_loss"]
    assert 3 <= len(losses) < 12
    assert losses.index(min(losses)) == len(losses) - 1 - 2  # then two without improvement
    count("pairs of runs that stopped early")


def test_the_best_weights_are_tested(stopped):
    folder, results = stopped
    for side in SIDES:
        own, losses = folder / "callbacks" / side, results[side]["val_loss"]
        files = own / "checkpoints"
        assert sorted(path.name for path in files.iterdir()) == ["best.ckpt", "last.ckpt"]
        best, last = (checkpoints.read(files / f"{name}.ckpt") for name in ("best", "last"))
        assert best["epoch"] == losses.index(min(losses)) < last["epoch"] == len(losses) - 1
        assert best["global_step"] == 15 * (best["epoch"] + 1)
        now = checkpoints.read(own / "weights.pt")
        weights = checkpoints.weights(best, files)
        assert now.keys() == weights.keys() and len(now) > 0
        assert all(torch.equal(now[name], weights[name]) for name in now)
        others = checkpoints.weights(last, files)
        assert not all(torch.equal(now[name], others[name]) for name in now)
        said = results[side]["checkpoints"]
        assert said["best.ckpt"].startswith(f"epoch {best['epoch']}, step {best['global_step']}, ")
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
    result = trained(side, tmp_path, monkeypatch, lr=1e36)
    assert result["val_loss"] == [None]
    # There is no other: it is the best one, too.
    assert [said.split(",")[0] for said in result["checkpoints"].values()] == ["epoch 0"] * 2


NUDGE = "    weight = next(net.parameters()).data.view(-1)[:1]\n" \
        "    weight.copy_(torch.nextafter(weight, weight + 1))\n"  # fmt: skip
MADE = "    net = DeepNet().to(device)\n"
LOADED = "    test = evaluate(net, test_loader"
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "one epoch more of patience": (
        "plain", "steps", ("wait >= self.patience", "wait > self.patience"),
    ),
    "the last weights tested": ("plain", "weights", ("best.ckpt\")", "last.ckpt\")")),
    "whatever weights there are tested": ("lightning", "weights", ("ckpt_path=best, ", "")),
    "pictures in train mode": (
        "lightning", "steps",
        ("        epoch, step = trainer",
         "        module.model.train()\n        epoch, step = trainer"),
    ),
    "nll_loss of probabilities": (
        "lightning", "steps",
        ("self.loss_function(output, labels)", "self.loss_function(output.exp(), labels)"),
    ),
    "the best by accuracy": (
        "lightning", "weights",
        ("\"best\", monitor=\"val_loss\"", "\"best\", monitor=\"val_accuracy\", mode=\"max\""),
    ),
    "twice the learning rate": (
        "lightning", "steps", ("lr=self.hparams.lr", "lr=2 * self.hparams.lr"),
    ),
}  # fmt: skip
LAST_PLACE = {
    "start": (MADE, MADE + NUDGE),
    "weights": (LOADED, NUDGE + LOADED),
}


@pytest.mark.parametrize("stage", LAST_PLACE)
def test_one_unit_in_the_last_place_is_found(stage, stopped, tmp_path, monkeypatch):
    """Of one weight, before the training or after it."""
    changed = trained("plain", tmp_path, monkeypatch, LAST_PLACE[stage])
    first = compare_results(changed, stopped[1]["lightning"]).first_difference
    assert first.name == stage, first
    count("negative controls")


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, stopped, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = trained(side, tmp_path, monkeypatch, *changes)
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, stopped[1][other])
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


def test_the_same_32_images_after_each_epoch(tmp_path):
    """The pictures show the first validation images, which no shuffling moves."""
    assert SHOWN == 32
    data = small_data()
    net = DeepNet().eval()
    before = torch.get_rng_state()
    pixels = figures.predictions(net, data, 3, tmp_path)
    assert np.array_equal(np.array(Image.open(tmp_path / "pictures" / "epoch_3.png")), pixels)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(side, logger, tmp_path, monkeypatch, capsys):
    usual = importlib.util.find_spec
    missing = lambda name: None if name == logger else usual(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    said = refused(side, ["--logger", logger], tmp_path, monkeypatch, capsys)
    assert f"needs the package {logger}" in said and "extra `loggers`" in said


def refused(side, arguments, tmp_path, monkeypatch, capsys):
    """Let the command refuse some options; return what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["callbacks.py", "--data", "shapes", *arguments])
    module = load_lesson(side, "callbacks")
    with pytest.raises(SystemExit) as ended:
        run(module.main, module.Args)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "Traceback" not in said, said
    count("bad inputs")
    return said


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--logger", "mlflow"], ["csv", "tensorboard", "wandb"]),
        (["--patience", "0"], ["error: --patience 0: expected a whole number from 1 on."]),
        (["--patience", "2.5"], ["2.5"]),
        (["--min-delta", "-1"], ["error: --min-delta -1.0: expected a number from 0 on."]),
        (["--min-delta", "nan"], ["error: --min-delta nan: expected a number from 0 on."]),
    ],
)
def test_bad_input(arguments, expected, tmp_path, monkeypatch, capsys):
    for side in SIDES:
        said = refused(side, arguments, tmp_path, monkeypatch, capsys)
        assert all(words in said for words in expected), said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("side", SIDES)
def test_wandb_goes_online_only_when_told_to(side, tmp_path, monkeypatch, capsys):
    """Told to, but without an account: it ends with one sentence."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
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
