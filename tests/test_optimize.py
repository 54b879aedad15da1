"""The lesson `optimize`: each option and all together, against Lightning and against arithmetic."""

from common import ROOT, checkpoints, figures
from common.data import EpochSampler
from common.folders import read_rows
from common.messages import BadInput, Stopped
from common.models import NormNet
from common.networks import identify
from common.proof.compare import compare_results
from common.run import parse, run

import functools
import itertools
import math
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SIDES,
    WITH_CHECKPOINTS,
    Noisy,
    assert_agree,
    count,
    give,
    load_lesson,
    small_data,
    some,
    train,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

MODULES = {side: load_lesson(side, "optimize") for side in SIDES}
DRAW = figures.draw  # the other tests draw no pictures
OFF = dict(
    schedule="none", accumulate_grad_batches=1, gradient_clip_val=0.0, weight_decay=0.0,
    label_smoothing=0.0, ema_decay=0.0,
)  # fmt: skip
IMAGES = 120  # batches of 16 leave a last one of 8


class Logits(Noisy):
    """BatchNorm and dropout, and no softmax, whose autocast would hide that of the loss."""

    def forward(self, x):
        return self.head(self.backbone(x))


class Calm(nn.Module):
    """No BatchNorm and no dropout: each image's loss depends on that image and the weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 10)
        )

    def forward(self, x):
        return self.layers(x)


def data_of(size=IMAGES):
    return small_data(train=size, lesson="optimize")


def run_side(side, folder, monkeypatch, *changes, **options):
    if options.get("precision") == "16-mixed":  # refused on a CPU
        monkeypatch.setattr("common.run._check_precision", lambda *_: None)
    own = dict(batch_size=16, model=Logits, log_every_n_steps=1, lesson="optimize")
    return train(side, folder, monkeypatch, *changes, **{**own, **OFF, **options})


def expected_batches(size=IMAGES, batch_size=16, max_epochs=2, **options):
    """How many batches are trained on, by arithmetic of our own."""
    batches, limit = -(-size // batch_size), options.get("limit_train_batches", 1.0)
    return max_epochs * (min(batches, limit) if isinstance(limit, int) else int(batches * limit))


def assert_same(plain, lightning):
    comparison = compare_results(plain, lightning)
    assert_agree(comparison, WITH_CHECKPOINTS)
    assert plain["weights_sha256"] == lightning["weights_sha256"]
    count("pairs of runs, bit for bit")


def pair(folder, monkeypatch, changes=None, size=IMAGES, images=None, **options):
    """Train both sides, demand the same of them, and return both results."""
    images = images or data_of(size)
    both = [
        run_side(s, folder, monkeypatch, *(changes or {}).get(s, ()), images=images, **options)
        for s in SIDES
    ]
    assert_same(*both)
    assert len(both[0]["train_loss"]) == expected_batches(size, **options)
    assert_same_rows(folder)
    return both


def rows_of(folder, side, name):
    """The rows of metrics.csv that have a value of this name."""
    return [row for row in read_rows(folder / "optimize" / side) if name in row]


def assert_same_rows(folder):
    ours, theirs = (read_rows(folder / "optimize" / side) for side in SIDES)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            # Where gradients overflow, their norm is infinite.
            assert value == pytest.approx(b[name], 1e-6, nan_ok=True), (name, a, b)
    count("rows of metrics.csv", len(ours))


def sha(result):
    return result["weights_sha256"]


@functools.cache
def trained_with(names, values):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        options = dict(zip(names, values, strict=True))
        return sha(run_side("plain", Path(folder), monkeypatch, **options))


def without(**options):
    """The weights that plain reaches with these options and no others; trained but once."""
    return trained_with(tuple(options), tuple(options.values()))


@functools.cache
def contrary():
    """Validation on the images that are trained on, with other labels: what is learned is wrong."""
    data = data_of()
    labels = (data.train.labels + 1) % 10
    return data._replace(val=replace(data.train, labels=labels, split="val"))


# Each option alone.

ALL = dict(
    schedule="cosine", accumulate_grad_batches=3, gradient_clip_val=0.5, weight_decay=0.05,
    label_smoothing=0.1, ema_decay=0.8,
)  # fmt: skip
EPOCHS = dict(max_epochs=3)
ALONE = {
    # name: (settings that the run to differ from has, too; the option)
    "cosine by step": ({}, dict(schedule="cosine")),
    "cosine by epoch": (EPOCHS, dict(schedule="cosine", interval="epoch")),
    "onecycle by step": ({}, dict(schedule="onecycle")),
    "onecycle by epoch": (EPOCHS, dict(schedule="onecycle", interval="epoch")),
    "plateau": (dict(max_epochs=4, images=contrary()), dict(schedule="plateau")),
    "accumulate 2": ({}, dict(accumulate_grad_batches=2)),
    "accumulate 4": ({}, dict(accumulate_grad_batches=4)),
    "accumulate more than an epoch": ({}, dict(accumulate_grad_batches=100)),
    "exact": (dict(accumulate_grad_batches=3), dict(exact_accumulation=True)),
    "exact, short last batch alone": ({}, dict(exact_accumulation=True)),
    "exact, more than an epoch": (
        dict(accumulate_grad_batches=100), dict(exact_accumulation=True),
    ),
    "exact, incomplete last group of whole batches": (
        dict(accumulate_grad_batches=3, limit_train_batches=4), dict(exact_accumulation=True),
    ),
    "incomplete last group": (dict(accumulate_grad_batches=3), dict(limit_train_batches=4)),
    "clip by norm": ({}, dict(gradient_clip_val=0.1)),
    "clip by value": ({}, dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    "bfloat16": ({}, dict(precision="bf16-mixed")),
    "weight decay": ({}, dict(weight_decay=0.1)),
    "label smoothing": ({}, dict(label_smoothing=0.1)),
    "moving average": ({}, dict(ema_decay=0.9)),
    "all": ({}, ALL),
    "all others": (
        {},
        ALL | dict(schedule="onecycle", precision="bf16-mixed", exact_accumulation=True,
                   gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(ALONE))
def test_each_option_alone_and_all_together(name, tmp_path, monkeypatch):
    common, option = ALONE[name]
    results = pair(tmp_path, monkeypatch, **{**common, **option})
    if name == "exact, short last batch alone":
        # In a group of one batch there is nothing to weigh.
        assert sha(results[0]) == without(**common)
    else:
        assert sha(results[0]) != without(**common)
        count("options that change the weights")
    for side in SIDES:
        rates = {row["train_lr"] for row in rows_of(tmp_path, side, "train_lr")}
        # The options really do what they are there for.
        if "schedule" in option:
            assert len(rates) >= 2 and max(rates) <= common.get("lr", 0.02) * (1 + 1e-6)
        else:
            assert len(rates) == 1
        if "gradient_clip_val" in option:
            norms = [row["train_grad_norm"] for row in rows_of(tmp_path, side, "train_grad_norm")]
            clipped = [norm > option["gradient_clip_val"] for norm in norms]
            assert sum(clipped) >= len(clipped) / 2 and len(clipped) > 0
            count("steps that clip", sum(clipped))
    assert len(results[0]["val_loss"]) == common.get("max_epochs", 2)


def test_there_are_enough_options():
    """Each option of the lesson that changes the training is among them."""
    every = {name for _, option in ALONE.values() for name in option}
    assert every >= {*OFF, "interval", "exact_accumulation", "precision", "limit_train_batches",
                     "gradient_clip_algorithm"}  # fmt: skip
    assert len(ALONE) >= 21


def test_nothing_on_is_the_plain_training(tmp_path, monkeypatch):
    """With every option off, the lesson does what `cifar` does."""
    off, _ = pair(tmp_path, monkeypatch)
    usual = train("plain", tmp_path, monkeypatch, model=Logits, batch_size=16)
    assert sha(off) == sha(usual) and off["train_loss"] == usual["train_loss"]


# One unit in the last place, of one weight of one side. Of the largest: a small one that grows
# past a power of two loses its last place again, and on some processors it does.

NUDGE = "{0}with torch.no_grad():\n{0}    weight = next(net.parameters()).view(-1)\n" \
        "{0}    largest = weight[weight.abs().argmax()]\n" \
        "{0}    largest.copy_(torch.nextafter(largest, largest + 1))\n"  # fmt: skip
TWO = dict(accumulate_grad_batches=2, gradient_clip_val=0.5, schedule="cosine")
MADE, COUNTED = "    net = NormNet().to(device)\n", "            step += 1\n"
NUDGED = {
    "start": (MADE, MADE + NUDGE.format("    ")),
    "later": (COUNTED, COUNTED + "            if step == 3:\n" + NUDGE.format(" " * 16)),
}


@pytest.mark.parametrize("when", NUDGED)
def test_one_unit_in_the_last_place_is_found(when, tmp_path, monkeypatch):
    _, lightning = pair(tmp_path, monkeypatch, **TWO)
    changed = run_side("plain", tmp_path, monkeypatch, NUDGED[when], **TWO)
    first = compare_results(changed, lightning).first_difference
    assert first.name in (["start"] if when == "start" else ["steps", "weights"]), first
    count("negative controls")


# A weight that is used twice in a step.


class Twice(nn.Module):
    """Its middle layer answers twice, and so is turned into half precision twice, or once."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(3072, 24), nn.Tanh())
        self.middle, self.last = nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(self.middle(x))
        return self.last(x)


def test_autocast_keeps_no_weights(tmp_path, monkeypatch):
    """The Trainer has no cache of weights in half precision; with one, gradients add up there."""
    options = dict(model=Twice, precision="bf16-mixed")
    _, lightning = pair(tmp_path, monkeypatch, **options)
    cached = ("cache_enabled=False", "cache_enabled=True")
    changed = run_side("plain", tmp_path, monkeypatch, cached, **options)
    assert compare_results(changed, lightning).first_difference.name == "steps"
    count("negative controls")
    # Used once, it makes no difference.
    options["model"] = Calm
    changed = run_side("plain", tmp_path, monkeypatch, cached, **options)
    assert sha(changed) == without(**options)


# Random combinations.

COMBINATIONS = st.fixed_dictionaries(
    dict(
        schedule=st.sampled_from(["none", "cosine", "onecycle", "plateau"]),
        interval=st.sampled_from(["step", "epoch"]),
        accumulate_grad_batches=st.sampled_from([1, 2, 2, 3, 3, 4, 100]),
        exact_accumulation=st.booleans(),
        gradient_clip_val=st.sampled_from([0.0, 0.01, 0.3, 100.0]),
        gradient_clip_algorithm=st.sampled_from(["norm", "value"]),
        precision=st.sampled_from(["32-true", "bf16-mixed"]),
        weight_decay=st.sampled_from([0.0, 1e-3, 0.2]),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        ema_decay=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        lr=st.sampled_from([0.02, 0.1]),
        seed=st.integers(0, 1000),
        batch_size=st.sampled_from([8, 8, 8, 16, 16, 50]),
        max_epochs=st.sampled_from([3, 2, 2, 1]),
        limit_train_batches=st.sampled_from([1.0, 1.0, 1.0, 0.5, 2, 7]),
        size=st.sampled_from([96, 117, 120]),  # none leaves a batch of one image
    )
)


def run_random_combinations(how_many):
    """Each is drawn the same way every time; what agrees is counted, what differs is shown."""
    done = []

    @settings(
        max_examples=how_many,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(COMBINATIONS)
    def run(options):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
            plain, _ = pair(Path(folder), monkeypatch, **options)
            count("batches of random combinations", len(plain["train_loss"]))
        done.append(tuple(options.values()))

    run()
    count("random combinations of all options", len(set(done)))
    return done


def test_some_random_combinations():
    assert len(set(run_random_combinations(5))) >= 5


@pytest.mark.slow
def test_many_random_combinations():
    done = set(run_random_combinations(60))
    assert len(done) >= 50
    # Of every option, at least two values are among them; of all values, nearly all.
    values = [len(set(column)) for column in zip(*done, strict=True)]
    assert min(values) >= 2 and sum(min(value, 5) for value in values) >= 45


# What happened in each step, recorded from outside.


class Step(NamedTuple):
    weights: dict  # with the buffers, after the step
    gradients: dict  # which the optimizer got
    rates: list  # one for each group


class Record:
    """The steps of one run, and the weights with which each training batch was answered."""

    def __init__(self):
        self.net, self.optimizer, self.steps, self.forwards = None, None, [], []

    def state(self):
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def watched(self, kind):
        record = self

        class Watched(kind):
            def __init__(self):
                super().__init__()
                record.net, record.forwards = self, []

            def forward(self, x):
                if self is record.net and self.training and torch.is_grad_enabled():
                    record.forwards.append(record.state())
                return super().forward(x)

        return Watched

    def after_step(self, optimizer, args, kwargs):
        # After, not before: Lightning's forward and backward run inside optimizer.step.
        self.optimizer = optimizer
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters()}
        rates = [group["lr"] for group in optimizer.param_groups]
        self.steps.append(Step(self.state(), gradients, rates))

    @property
    def before(self):
        """The weights before each step."""
        return [self.forwards[0], *(step.weights for step in self.steps[:-1])]


def recorded(side, folder, monkeypatch, *changes, model=Calm, into=None, **options):
    """Train one side; return its result and Record. A run that ends early leaves it in `into`."""
    record = into or Record()
    hook = register_optimizer_step_post_hook(record.after_step)
    try:
        result = run_side(
            side, folder, monkeypatch, *changes, model=record.watched(model), **options
        )
    finally:
        hook.remove()
    return result, record


def recorded_pair(folder, monkeypatch, changes=None, **options):
    """Record both sides, and demand the same gradients and weights after each step."""
    both = [
        recorded(side, folder, monkeypatch, *(changes or {}).get(side, ()), **options)
        for side in SIDES
    ]
    (plain, ours), (lightning, theirs) = both
    assert_same(plain, lightning)
    assert_same_rows(folder)
    assert len(ours.steps) == len(theirs.steps) > 0
    for a, b in zip(ours.steps, theirs.steps, strict=True):
        assert equal(a.weights, b.weights) and equal(a.gradients, b.gradients)
        assert a.rates == b.rates
    count("steps, gradients and weights", len(ours.steps))
    return both


def equal(a, b):
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


def flat(gradients):
    return torch.cat([gradient.double().flatten() for gradient in gradients.values()])


def gradient_of_mean(weights, images, labels, smoothing=0.0, kind=Calm):
    """The gradient of the mean loss over these images, in float64, as one vector."""
    net = kind().double()
    net.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    loss = F.cross_entropy(net(images.double()), labels, label_smoothing=smoothing)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def groups_of(images, batch_size=16, accumulate_grad_batches=1, max_epochs=2, **options):
    """For each optimizer step, the batches that it was made of, by arithmetic of our own."""
    groups, limit, step = [], options.get("limit_train_batches", 1.0), accumulate_grad_batches
    for epoch in range(max_epochs):
        sampler = EpochSampler(len(images), seed=0)
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches = batches[:limit] if isinstance(limit, int) else batches
        groups += [batches[start : start + step] for start in range(0, len(batches), step)]
    return [[images.__getitems__(batch) for batch in group] for group in groups]


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# Accumulation.


@pytest.mark.parametrize(
    "images, limit, sizes",
    [
        (120, 1.0, [16, 8]),  # the last group: two batches of three, one of them shorter
        (120, 7, [16]),
        (117, 1.0, [16, 5]),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_of_an_incomplete_group(exact, images, limit, sizes, tmp_path, monkeypatch):
    options = dict(accumulate_grad_batches=3, exact_accumulation=exact, limit_train_batches=limit)
    data = data_of(images)
    both = recorded_pair(tmp_path, monkeypatch, images=data, **options)
    for _, record in both:
        groups = groups_of(data.train, **options)
        assert [len(labels) for _, labels in groups[-1]] == sizes and len(groups) == 6
        for group, weights, step in zip(groups, record.before, record.steps, strict=True):
            every = [torch.cat(parts) for parts in zip(*group, strict=True)]
            of_mean = gradient_of_mean(weights, *every)
            if exact:
                assert apart(flat(step.gradients), of_mean) < 1e-6
            else:
                means = torch.stack([gradient_of_mean(weights, *batch) for batch in group])
                expected = len(group) / 3 * means.mean(0)
                assert apart(flat(step.gradients), expected) < 1e-6
                if len(group) < 3:  # too short a step
                    assert apart(flat(step.gradients), of_mean) > 0.3
                    ratio = flat(step.gradients).norm() / of_mean.norm()
                    assert ratio == pytest.approx(len(group) / 3, rel=0.25)
            count("gradients of groups, compared with float64")


@pytest.mark.parametrize("side", SIDES)
def test_small_batches_add_up_to_a_large_one(side, tmp_path, monkeypatch):
    """100 images: groups of four batches of 8, and at last a group of one batch of 4."""
    options = dict(images=data_of(100), label_smoothing=0.1, weight_decay=0.01, max_epochs=3)
    few = dict(batch_size=8, accumulate_grad_batches=4)
    _, whole = recorded(side, tmp_path, monkeypatch, batch_size=32, **options)
    _, parts = recorded(side, tmp_path, monkeypatch, exact_accumulation=True, **few, **options)
    _, usual = recorded(side, tmp_path, monkeypatch, **few, **options)
    assert len(whole.steps) == len(parts.steps) == len(usual.steps) == 12
    for a, b in zip(whole.steps, parts.steps, strict=True):
        assert apart(flat(b.gradients), flat(a.gradients)) < 1e-5
        assert apart(flat(b.weights), flat(a.weights)) < 1e-6
        count("steps of a large batch and of its parts")
    # Without: the last group's gradient is a quarter.
    ratio = flat(usual.steps[3].gradients).norm() / flat(whole.steps[3].gradients).norm()
    assert ratio == pytest.approx(0.25, rel=1e-4)


# Clipping.


@pytest.mark.parametrize("algorithm, limit", [("norm", 0.5), ("norm", 1e6), ("value", 0.02)])
def test_what_clipping_does_to_the_gradients(algorithm, limit, tmp_path, monkeypatch):
    options = dict(gradient_clip_val=limit, gradient_clip_algorithm=algorithm, label_smoothing=0.1)
    options["accumulate_grad_batches"] = 2
    both = recorded_pair(tmp_path, monkeypatch, **options)
    for side, (_, record) in zip(SIDES, both, strict=True):
        rows = rows_of(tmp_path, side, "train_grad_norm")
        groups, clipped = groups_of(data_of().train, accumulate_grad_batches=2), 0
        for row, group, weights, step in zip(
            rows, groups, record.before, record.steps, strict=True
        ):
            means = [gradient_of_mean(weights, *batch, smoothing=0.1) for batch in group]
            raw, got = torch.stack(means).sum(0) / 2, flat(step.gradients)
            if algorithm == "norm":
                assert got.norm() <= limit * (1 + 1e-6)
                assert F.cosine_similarity(got, raw, dim=0) > 1 - 1e-10  # the direction is kept
                expected = raw * min(1, limit / raw.norm())
            else:
                assert got.abs().max() <= limit
                expected = raw.clamp(-limit, limit)
            clipped += not torch.equal(expected, raw)
            assert apart(got, expected) < 1e-5
            assert row["train_grad_norm"] == pytest.approx(raw.norm().item(), 1e-5)
            count("clipped gradients")
        assert clipped == (0 if limit == 1e6 else len(rows)) and len(rows) == 8


# Schedules.


def cosine(rate, step, total):
    warmup = max(1, total // 10)
    if step < warmup:
        return rate * (0.01 + 0.99 * step / warmup)
    return rate * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def onecycle(rate, step, total):
    """Up along half a cosine in the first 30 %, then down: from 1/25 to 1 to 1/250,000."""
    top = 0.3 * total - 1
    ends, share = (1 / 25, 1), step / top if step <= top else (step - top) / (total - 1 - top)
    ends = ends if step <= top else (1, 1 / 250_000)
    return rate * (ends[1] + (ends[0] - ends[1]) / 2 * (1 + math.cos(math.pi * share)))


@pytest.mark.parametrize("formula", [cosine, onecycle])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("group", [1, 3])
def test_the_learning_rate_of_each_step(formula, interval, group, tmp_path, monkeypatch):
    epochs, per_epoch = 5, -(-8 // group)
    options = dict(schedule=formula.__name__, interval=interval, accumulate_grad_batches=group)
    pair(tmp_path, monkeypatch, max_epochs=epochs, limit_val_batches=1, **options)
    total = epochs * per_epoch if interval == "step" else epochs
    for side in SIDES:
        rows = rows_of(tmp_path, side, "train_lr")
        assert [row["step"] for row in rows] == list(range(epochs * per_epoch))
        for row in rows:
            moved = row["step"] if interval == "step" else row["epoch"]
            assert row["epoch"] == row["step"] // per_epoch
            assert row["train_lr"] == pytest.approx(formula(0.02, moved, total), 1e-5, 1e-12)
            count("learning rates, compared with a formula")
        rates = [row["train_lr"] for row in rows]
        assert len(set(rates)) == (epochs * per_epoch if interval == "step" else epochs)
        if formula is onecycle and interval == "step":
            assert rates[0] == pytest.approx(0.02 / 25) and rates[-1] < 0.02 / 1e5
            assert max(rates) == pytest.approx(0.02, rel=0.05)
        if formula is cosine and interval == "step":
            assert rates[0] == pytest.approx(0.02 / 100) and max(rates) == pytest.approx(0.02)


def test_a_plateau_makes_it_a_tenth(tmp_path, monkeypatch):
    pair(tmp_path, monkeypatch, schedule="plateau", max_epochs=6, images=contrary())
    for side in SIDES:
        losses = [row["val_loss"] for row in rows_of(tmp_path, side, "val_loss")]
        rate, best, expected = 0.02, math.inf, []
        for loss in losses:
            expected += [rate] * 8
            rate = rate if loss < best * (1 - 1e-4) else rate / 10
            best = min(best, loss)
        rates = [row["train_lr"] for row in rows_of(tmp_path, side, "train_lr")]
        assert rates == pytest.approx(expected, 1e-5)
        # It drops after the first validation without improvement, for the epoch after it.
        assert len(losses) == 6 and len(set(rates)) >= 2 and rates[0] == rates[8]
        count("learning rates, compared with a formula", len(rates))


BESIDE = (
    ('"interval": interval, "monitor"', '"monitor"'),
    ('"lr_scheduler": config}', '"lr_scheduler": config, "interval": interval}'),
)


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
def test_told_of_steps_and_moved_on_by_epochs_it_hardly_moves(tmp_path, monkeypatch):
    options = dict(schedule="onecycle", max_epochs=3, batch_size=8)
    by_epoch = ('interval = "epoch" if plateau', 'interval = "epoch" if True')
    wrong = run_side("lightning", tmp_path, monkeypatch, by_epoch, **options)
    rates = [row["train_lr"] for row in rows_of(tmp_path, "lightning", "train_lr")]
    assert len(rates) == 45 and len(set(rates)) == 3
    assert max(rates) < 0.02 / 8 and rates[0] == pytest.approx(0.02 / 25)
    # An interval beside the lr_scheduler's dict is ignored, with a warning: the very same run.
    with pytest.warns(RuntimeWarning, match="unsupported keys in the optimizer configuration"):
        beside = run_side("lightning", tmp_path, monkeypatch, *BESIDE, **options)
    assert sha(beside) == sha(wrong)
    right = run_side("plain", tmp_path, monkeypatch, **options)
    assert compare_results(right, beside).first_difference.name == "steps"
    rates = [row["train_lr"] for row in rows_of(tmp_path, "plain", "train_lr")]
    assert max(rates) == pytest.approx(0.02, rel=0.02) and rates[-1] < 0.02 / 1e5
    count("negative controls", 2)


# Weight decay.


@pytest.mark.parametrize("model", [Logits, NormNet])
def test_which_parameters_decay(model, tmp_path, monkeypatch):
    options = dict(weight_decay=0.3, limit_train_batches=1, max_epochs=1, lr=1e-3)
    found = []
    for _, record in recorded_pair(tmp_path, monkeypatch, model=model, **options):
        parameters = dict(record.net.named_parameters())
        names = {id(p): name for name, p in parameters.items()}
        groups = record.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        found.append([[names[id(p)] for p in group["params"]] for group in groups])
        decay, rest = found[-1]
        assert decay == [name for name, p in parameters.items() if p.ndim > 1]
        assert rest == [name for name, p in parameters.items() if p.ndim <= 1]
        assert sorted(decay + rest) == sorted(names.values()) and len(set(decay + rest)) >= 6
        assert all("bias" in name or ".1." in name for name in rest)  # BatchNorm is number 1
        count("parameters in their group", len(names))
    assert found[0] == found[1]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_what_weight_decay_does(decay, tmp_path, monkeypatch):
    """The first step, by hand: its momentum is the gradient itself."""
    options = dict(weight_decay=decay, model=Logits, lr=0.1)
    options |= dict(limit_train_batches=1, max_epochs=1)
    for _, record in recorded_pair(tmp_path, monkeypatch, **options):
        (step,) = record.steps
        for name, gradient in step.gradients.items():
            before = record.before[0][name]
            pull = decay * before if before.ndim > 1 else 0
            after = before - 0.1 * (gradient + pull)
            assert torch.allclose(step.weights[name], after, rtol=1e-6, atol=1e-8)
            count("parameters after a step, by hand")


# Moving average.


def averages_of(record, decay):
    """The moving average after each step; whole numbers, such as BatchNorm's count, are cut off."""
    averages = [record.steps[0].weights]
    for step in record.steps[1:]:
        averages.append(
            {
                name: (decay * averages[-1][name] + (1 - decay) * new).to(new.dtype)
                for name, new in step.weights.items()
            }
        )
    return averages


@pytest.mark.parametrize("group, epochs", [(1, 2), (3, 3)])
@pytest.mark.parametrize("decay", [0.7, 0.99])
def test_the_moving_average(decay, group, epochs, tmp_path, monkeypatch):
    options = dict(model=Logits, accumulate_grad_batches=group, max_epochs=epochs)
    options["label_smoothing"] = 0.1  # for the training alone
    both = recorded_pair(tmp_path, monkeypatch, ema_decay=decay, **options)
    per_epoch = -(-8 // group)
    for side, (result, record) in zip(SIDES, both, strict=True):
        averages = averages_of(record, decay)
        assert len(averages) == epochs * per_epoch
        assert equal(dict(record.net.state_dict()), averages[-1])
        assert not equal(averages[-1], record.steps[-1].weights)
        # The last checkpoint holds it, and so does each validation.
        net = Logits()
        kept = checkpoints.load(net, tmp_path / "optimize" / side / "checkpoints" / "last.ckpt")
        assert equal(dict(net.state_dict()), averages[-1])
        assert (kept["epoch"], kept["global_step"]) == (epochs - 1, epochs * per_epoch)
        images, labels = data_of().val.__getitems__(list(range(130)))
        for epoch, val_loss in enumerate(result["val_loss"]):
            net.load_state_dict(averages[(epoch + 1) * per_epoch - 1])
            with torch.no_grad():
                loss = F.cross_entropy(net.eval()(images), labels).item()
                net.load_state_dict(record.steps[(epoch + 1) * per_epoch - 1].weights)
                unaveraged = F.cross_entropy(net(images), labels).item()
            assert val_loss == pytest.approx(loss, 1e-6)
            assert val_loss != pytest.approx(unaveraged, 1e-6)
            count("validations of the moving average")
    # The training goes on with the weights themselves.
    for side, (result, record) in zip(SIDES, both, strict=True):
        unaveraged, record_without = recorded(side, tmp_path, monkeypatch, **options)
        assert result["train_loss"] == unaveraged["train_loss"]
        for a, b in zip(record.steps, record_without.steps, strict=True):
            assert equal(a.weights, b.weights)
        assert sha(result) != sha(unaveraged)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999, 1.0])
@torch.no_grad()
def test_update_average_is_that_of_pytorch(decay):
    torch.manual_seed(3)
    net = Logits()
    ours = Logits()
    theirs = AveragedModel(net, avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    for step in range(30):
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * 10.0 ** (step % 7 - 3))
            else:
                tensor.add_(step)
        MODULES["plain"].update_average(ours, net, decay, first=step == 0)
        theirs.update_parameters(net)
        assert equal(dict(ours.state_dict()), dict(theirs.module.state_dict()))
        count("updates of an average, as PyTorch makes them")


# Half precision with a scaler: its code, on the CPU, which the command line refuses.

PRECISION = "precision=args.precision,"
NAMED = "plugins=[L.pytorch.plugins.MixedPrecision("
HALF = {"lightning": [(PRECISION, NAMED + '"16-mixed", "cpu")],')], "plain": []}


def scaled_by(start, interval):
    """Changes to both sides: another scale at first, doubled after `interval` good steps."""
    scaler = f"{start}, growth_interval={interval}"
    theirs = f'"16-mixed", "cpu", torch.amp.GradScaler("cpu", {scaler}))],'
    return {
        "plain": [("GradScaler(device.type, en", f"GradScaler(device.type, {scaler}, en")],
        "lightning": [(PRECISION, NAMED + theirs)],
    }


@pytest.fixture
def scales(monkeypatch):
    """The scale of the loss in each step, of all runs one after the other."""
    seen = []

    def update(scaler, *args, usual=torch.amp.GradScaler.update):
        seen.append(scaler.get_scale())
        usual(scaler, *args)

    monkeypatch.setattr(torch.amp.GradScaler, "update", update)
    return seen


HALF_ON = dict(precision="16-mixed", gradient_clip_val=0.5)


@pytest.mark.parametrize(
    "options",
    [
        dict(precision="16-mixed"),
        HALF_ON,
        dict(precision="16-mixed", gradient_clip_val=0.01, gradient_clip_algorithm="value"),
        {**ALL, **HALF_ON, "exact_accumulation": True},
    ],
)
def test_half_precision(options, scales, tmp_path, monkeypatch):
    results = pair(tmp_path, monkeypatch, HALF, **options)
    own, theirs = scales[: len(scales) // 2], scales[len(scales) // 2 :]
    # The first scale is PyTorch's; a gradient may overflow, and it is halved.
    assert own == theirs and own[0] == 65536 and min(own) >= 8192
    for side in SIDES:
        rows = rows_of(tmp_path, side, "train_grad_norm")
        assert len(rows) == len(own)
        # After the gradients are scaled down: otherwise they would be 65,536 times longer.
        finite = [row["train_grad_norm"] for row in rows if math.isfinite(row["train_grad_norm"])]
        assert 0.3 < max(finite) < 100
    assert sha(results[0]) != without(**{**options, "precision": "32-true"})
    count("pairs of runs with a scaler")


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_that_overflow_are_left_out(clip, scales, tmp_path, monkeypatch):
    options = dict(precision="16-mixed", gradient_clip_val=clip, model=Logits, max_epochs=3)
    both = [
        recorded(side, tmp_path, monkeypatch, *scaled_by("2.0**26", 4)[side], **options)
        for side in SIDES
    ]
    assert_same(*(result for result, _ in both))
    assert_same_rows(tmp_path)
    assert scales[:24] == scales[24:] and len(scales) == 48
    left_out = []
    for side, (_, record) in zip(SIDES, both, strict=True):
        rows = rows_of(tmp_path, side, "train_grad_norm")
        bad = [not math.isfinite(row["train_grad_norm"]) for row in rows]
        assert scales[0] == 2.0**26 and bad[0] and len(rows) == 24
        good = 0
        for (now, after), is_bad in zip(itertools.pairwise(scales[:24]), bad[:-1], strict=True):
            good = 0 if is_bad else good + 1
            assert after == now * (0.5 if is_bad else 2 if good == 4 else 1)
            good %= 4
        assert 3 <= sum(bad) < 20 and len(record.steps) == 24 - sum(bad)
        names = [name for name, _ in record.net.named_parameters()]
        for (now, after), is_bad in zip(itertools.pairwise(record.forwards), bad, strict=False):
            assert is_bad == all(torch.equal(now[name], after[name]) for name in names)
            count("steps with a scaler, left out or made")
        assert all(tensor.isfinite().all() for tensor in record.steps[-1].weights.values())
        left_out.append(bad)
    assert left_out[0] == left_out[1]
    if clip:  # such a run is drawn like any other
        result, record = both[0]
        rows = read_rows(tmp_path / "optimize" / "plain")
        drawn = DRAW(record.net.eval(), data_of(), result, rows)["optimizer.png"]
        drawn.savefig(tmp_path / "optimizer.png")
        assert (tmp_path / "optimizer.png").stat().st_size > 1000


UNSCALE = "            scaler.unscale_(optimizer)\n"
STEP = "            scaler.step(optimizer)\n"
BACK = "            scaler.scale(loss * weight / group).backward()\n"
CLIPPED = (
    "            if args.gradient_clip_val:\n"
    "                clips[args.gradient_clip_algorithm](parameters, args.gradient_clip_val)\n"
)
WITH_SCALER = {
    "clipping before unscaling": (
        "plain", "steps", (UNSCALE, ""), (CLIPPED, CLIPPED + UNSCALE),
    ),
    "no unscaling of its own": ("plain", "steps", (UNSCALE, "")),
    "no scaler": ("plain", "steps", ("enabled=float16)", "enabled=False)")),
    "the loss not scaled": (
        "plain", "steps",
        (BACK, "            scaler.scale(loss * weight / group)\n"
         "            (loss * weight / group).backward()\n"),
    ),
    "bfloat16 instead": ("plain", "steps", ("torch.float16 if", "torch.bfloat16 if")),
    "the Trainer's way on a CPU: bfloat16": ("lightning", "steps"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_scaler(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("scaled")
        return dict(zip(SIDES, pair(folder, monkeypatch, HALF, **HALF_ON), strict=True))


@pytest.mark.filterwarnings("ignore:You passed `Trainer")
@pytest.mark.parametrize("name", some(WITH_SCALER))
def test_one_change_around_the_scaler_is_found(name, with_scaler, tmp_path, monkeypatch):
    side, stage, *changes = WITH_SCALER[name]
    changed = run_side(side, tmp_path, monkeypatch, *changes, **HALF_ON)
    (other,) = set(SIDES) - {side}
    first = compare_results(changed, with_scaler[other]).first_difference
    assert first.name == stage, first
    count("negative controls")


def test_a_scaler_that_is_not_updated_ends_in_the_second_step(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="being called after step"):
        run_side("plain", tmp_path, monkeypatch, ("            scaler.update()\n", ""), **HALF_ON)
    assert len(rows_of(tmp_path, "plain", "train_loss")) == 1
    count("negative controls")


def test_the_trainer_takes_another_precision_on_a_cpu(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="precision='16-mixed'.*not supported on CPU.*bf16-mixed"):
        trainer = L.Trainer(precision="16-mixed", accelerator="cpu", logger=False)
    assert trainer.precision_plugin.precision == "bf16-mixed"
    with pytest.warns(UserWarning, match="not supported on CPU"):
        half = run_side("lightning", tmp_path, monkeypatch, precision="16-mixed")
    bfloat = run_side("lightning", tmp_path, monkeypatch, precision="bf16-mixed")
    assert sha(half) == sha(bfloat)


@pytest.mark.parametrize("side", SIDES)
def test_half_precision_is_refused_on_a_cpu(side, tmp_path):
    arguments = ["--precision", "16-mixed", "--accelerator", "cpu", "--runs-dir", str(tmp_path)]
    with pytest.raises(BadInput, match=r"^--precision 16-mixed needs a GPU, .* bf16-mixed"):
        parse(MODULES[side].Args, ROOT / side / "optimize.py", arguments)
    count("bad inputs")


# Bad input.


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--label-smoothing 1.5", "--label-smoothing 1.5: expected a number from 0 to 1."),
        ("--label-smoothing nan", "--label-smoothing nan: expected a number from 0 to 1."),
        ("--ema-decay -1", "--ema-decay -1.0: expected a number from 0 to 1."),
        ("--ema-decay 1.01", "--ema-decay 1.01: expected a number from 0 to 1."),
        ("--accumulate-grad-batches 0", "expected a whole number from 1 on."),
        ("--gradient-clip-val -0.5", "--gradient-clip-val -0.5: expected a number from 0 on."),
        ("--weight-decay=-1e-4", "--weight-decay -0.0001: expected a number from 0 on."),
    ],
)
def test_a_number_out_of_range(arguments, expected, tmp_path):
    for side in SIDES:
        with pytest.raises(BadInput) as refused:
            own = ["--runs-dir", str(tmp_path), *arguments.split()]
            parse(MODULES[side].Args, ROOT / side / "optimize.py", own)
        assert expected in str(refused.value)
        count("bad inputs")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--accumulate-grad-batches 1.5", ["1.5"]),
        ("--schedule linear", ["none", "cosine", "onecycle", "plateau"]),
        ("--interval batch", ["step", "epoch"]),
        ("--precision 16", ["32-true", "bf16-mixed", "16-mixed"]),
        ("--gradient-clip-algorithm l1", ["norm", "value"]),
        ("--exact-accumulation yes", ["yes"]),
    ],
)
def test_a_word_that_it_does_not_know(arguments, expected, capsys):
    for side in SIDES:
        with pytest.raises(SystemExit) as ended:
            parse(MODULES[side].Args, ROOT / side / "optimize.py", arguments.split())
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said
        assert all(word in said for word in expected), said
        count("bad inputs")


# A loss that is no number.


def ends(side, folder, monkeypatch, *changes, record=None, **options):
    """Train until it ends by itself; return the sentence without the folder."""
    with pytest.raises(Stopped) as stopped:
        recorded(side, folder, monkeypatch, *changes, into=record, **options)
    assert stopped.value.status == 1
    sentence = str(stopped.value)
    assert "\n" not in sentence and "try a smaller --lr" in sentence
    count("runs that end at a loss that is no number")
    return sentence.replace(str(folder / "optimize" / side), "FOLDER")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(accumulate_grad_batches=3),
        dict(accumulate_grad_batches=100),  # found in the validation after the step
        dict(ema_decay=0.9, precision="bf16-mixed", schedule="onecycle"),
        dict(gradient_clip_val=1.0),
    ],
)
def test_a_loss_that_is_no_number_ends_it(options, tmp_path, monkeypatch):
    """A rate at which the first steps leave nothing to compute with.

    1e6 and even 1e30 are not enough here: BatchNorm and dead ReLUs keep the loss finite.
    """
    said = []
    for side in SIDES:
        record, folder = Record(), tmp_path / "optimize" / side
        said.append(
            ends(side, tmp_path, monkeypatch, record=record, lr=1e38, model=Logits, **options)
        )
        look = r"The (validation loss after|loss of) step (\d) is (nan|inf): the training ends"
        stage, step = re.match(look, said[-1]).group(1, 2)
        # No step was made with it.
        in_validation = options.get("accumulate_grad_batches") == 100
        assert in_validation == stage.startswith("validation")
        assert len(record.steps) == int(step) - (not in_validation) >= 1
        assert "no checkpoint was written" in said[-1]
        assert not (folder / "checkpoints" / "last.ckpt").exists()
        assert not (folder / "result.json").exists()
        assert len(rows_of(tmp_path, side, "train_loss")) == len(record.steps)
    assert said[0] == said[1]


def poisoned(after, stage):
    """Data whose images of one stage are no numbers once `after` training batches were handed out.

    Only the training counts: Lightning's sanity check validates once more than the loop by hand.
    """
    data, seen = data_of(), []

    def of_training(images):
        seen.append(len(images))
        images = data.train.transform(images)
        return images * math.nan if stage == "train" and len(seen) > after else images

    def of_validation(images):
        images = data.val.transform(images)
        return images * math.nan if stage == "val" and len(seen) > after else images

    return data._replace(
        train=replace(data.train, transform=of_training),
        val=replace(data.val, transform=of_validation),
    )


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize(
    "stage, after, group, step, rows",
    [
        ("train", 8, 1, 9, 8),  # the second epoch's first batch
        ("train", 12, 1, 13, 12),
        ("train", 13, 3, 5, 4),  # in the middle of a group
        ("val", 8, 1, 16, 16),  # the second epoch's validation
        ("val", 15, 3, 6, 6),
    ],
)
def test_the_last_good_checkpoint_is_kept(
    stage, after, group, step, rows, decay, tmp_path, monkeypatch
):
    said, tables = [], []
    for side in SIDES:
        record, options = Record(), dict(accumulate_grad_batches=group, ema_decay=decay)
        options |= dict(images=poisoned(after, stage), model=Logits, max_epochs=3)
        said.append(ends(side, tmp_path, monkeypatch, record=record, **options))
        what = "validation loss after" if stage == "val" else "loss of"
        assert said[-1].startswith(f"The {what} step {step} is nan: the training ends here, and ")
        assert "the last good checkpoint is FOLDER/checkpoints/last.ckpt;" in said[-1]
        assert len(record.steps) == (step if stage == "val" else step - 1)
        folder = tmp_path / "optimize" / side
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
        net, per_epoch = Logits(), -(-8 // group)
        kept = checkpoints.load(net, folder / "checkpoints" / "last.ckpt")
        assert (kept["epoch"], kept["global_step"]) == (0, per_epoch)
        good = averages_of(record, decay) if decay else [step.weights for step in record.steps]
        assert equal(dict(net.state_dict()), good[per_epoch - 1])
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        assert not (folder / "result.json").exists()
        assert len(rows_of(tmp_path, side, "train_loss")) == rows
        assert len(rows_of(tmp_path, side, "val_loss")) == 1
        tables.append(kept["hyper_parameters"])
    assert said[0] == said[1] and tables[0] == dict(tables[1])
    assert_same_rows(tmp_path)


@pytest.mark.parametrize("side", SIDES)
def test_the_command_says_it_in_one_sentence(side, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = load_lesson(side, "optimize")
    give(module, data_of(), NormNet, "optimize", monkeypatch)
    arguments = "--lr 1e30 --schedule none --gradient-clip-val 0 --accelerator cpu --threads 1"
    monkeypatch.setattr(sys, "argv", ["optimize.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        run(module.main, module.Args)
    err = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in err
    said = [line for line in err.splitlines() if "The loss of step" in line]
    assert len(said) == 1 and err.rstrip().endswith(said[0])
    assert said[0].startswith("The loss of step 2 is ") and "no checkpoint was written" in said[0]
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("*.ckpt"))


# Checkpoints.


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_last_checkpoint_is_read_into_the_lessons_network(decay, tmp_path, monkeypatch):
    both = recorded_pair(tmp_path, monkeypatch, model=NormNet, ema_decay=decay)
    for side, (_, record) in zip(SIDES, both, strict=True):
        folder = tmp_path / "optimize" / side / "checkpoints"
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        net = NormNet()
        kept = checkpoints.load(net, folder / "last.ckpt")
        assert equal(dict(net.state_dict()), dict(record.net.state_dict()))
        assert kept["hyper_parameters"]["ema_decay"] == decay
        assert kept["hyper_parameters"]["lesson"] == "optimize" and kept["global_step"] == 16
        assert identify(checkpoints.weights(kept, folder), "optimize").lesson == "optimize"
        count("checkpoints")


# Negative controls: one change on one side, and the comparison names the stage.

BY_STEP = (
    '            if args.interval == "step" and args.schedule != "plateau":\n',
    "            if False:\n",
)
AVERAGED = "            if args.ema_decay:\n                update"
NO_CLIPPING = "    def configure_gradient_clipping(self, *_, **__):\n        pass\n\n"
BEFORE_STEP = "    #: Gradients are scaled down again, and not yet clipped.\n"
CONTINUE = "                continue\n"
LOGGED = '        self.log("train_loss", loss)\n'
EVERY = {**ALL, "precision": "bf16-mixed", "exact_accumulation": True, "lr": 0.05}
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "clip after the step": (
        "plain", "steps", (CLIPPED, ""), (STEP, STEP + CLIPPED),
    ),
    "no clipping": ("plain", "steps", (CLIPPED, "")),
    "clip the value instead of the norm": (
        "plain", "steps", ("clips[args.gradient_clip_algorithm]", 'clips["value"]'),
    ),
    "clip in each batch": ("plain", "steps", (CLIPPED, ""), (BACK, BACK + CLIPPED)),
    "gradients never cleared": (
        "plain", "steps",
        ("            if batch % group == 0:\n                optimizer.zero_grad()\n", ""),
    ),
    "gradients cleared in each batch": ("plain", "steps", ("if batch % group == 0:", "if True:")),
    "not divided by the group": (
        "plain", "steps", ("scaler.scale(loss * weight / group)", "scaler.scale(loss * weight)"),
    ),
    "exact weights left out": (
        "plain", "steps", ("scaler.scale(loss * weight / group)", "scaler.scale(loss / group)"),
    ),
    "the last group makes no step": (
        "plain", "steps",
        ("(batch + 1) % group and batch + 1 < len(train_loader)", "(batch + 1) % group"),
        ("math.ceil(len(train_loader) / group)", "(len(train_loader) // group)"),
    ),
    "schedule told of epochs": (
        "plain", "steps",
        ("(optimizer, args, steps)", "(optimizer, args, args.max_epochs)"),
    ),
    "schedule moved on before the step": (
        "plain", "steps", BY_STEP, (STEP, "            schedule.step()\n" + STEP),
    ),
    "schedule moved on in each batch": (
        "plain", "steps",
        (CONTINUE, "                schedule.step()\n" + CONTINUE),
    ),
    "schedule not moved on": ("plain", "steps", BY_STEP),
    "decay for all": (
        "plain", "steps",
        ("    optimizer = make_optimizer(net, args)\n",
         "    optimizer = make_optimizer(net, args)\n"
         "    optimizer.param_groups[1]['weight_decay'] = args.weight_decay\n"),
    ),
    "no label smoothing": (
        "plain", "steps", ("(label_smoothing=args.label_smoothing)", "()"),
    ),
    "no autocast": (
        "plain", "steps", ('float16 = args.precision != "32-true",', "float16 = False,"),
    ),
    "autocast around the model alone": (
        "plain", "steps",
        ("                loss = loss_function(net(images), labels)",
         "                logits = net(images)\n            loss = loss_function(logits, labels)"),
    ),
    "validation without autocast": (
        "plain", "metrics",
        ("with autocast:\n            val", "if True:\n            val"),
    ),
    "the weights validated, not their average": (
        "plain", "metrics", ("evaluate(average, val_l", "evaluate(net, val_l"),
    ),
    "the weights tested, not their average": (
        "plain", "weights", ("    net.load_state_dict(average.state_dict())\n", ""),
    ),
    "average begun with the random weights": (
        "plain", "weights", ("first=step == 0", "first=False"),
    ),
    "average updated before the step": (
        "plain", "weights",
        (STEP, "            update_average(average, net, args.ema_decay, step == 0)\n" + STEP),
        (AVERAGED, AVERAGED.replace("args.ema_decay", "False")),
    ),
    "average updated in each batch": (
        "plain", "weights",
        (CONTINUE,
         "                update_average(average, net, args.ema_decay, step == 0)\n" + CONTINUE),
    ),
    "batches counted as steps": (
        "plain", "checkpoints", ('"global_step": step}', '"global_step": step * group}'),
    ),
    "Trainer without clipping": (
        "lightning", "steps", ("gradient_clip_val=args.gradient_clip_val,", ""),
    ),
    "Trainer clips the value": (
        "lightning", "steps",
        ("_clip_algorithm=args.gradient_clip_algorithm", "_clip_algorithm='value'"),
    ),
    "a hook that forgets to clip": (
        "lightning", "steps", (BEFORE_STEP, NO_CLIPPING + BEFORE_STEP),
    ),
    "clipping within training_step": (  # the gradients of the step before
        "lightning", "steps",
        (BEFORE_STEP, NO_CLIPPING + BEFORE_STEP),
        (LOGGED,
         LOGGED + "        self.clip_gradients(self.optimizers().optimizer, 0.5, 'norm')\n"),
    ),
    "Trainer accumulates nothing": (
        "lightning", "steps", ("accumulate_grad_batches=args.accumulate_grad_batches,", ""),
    ),
    "Trainer's weights of an incomplete group": (
        "lightning", "steps",
        ("return loss * group_weight(batch_idx, len(labels), samples, self.hparams)",
         "return loss"),
    ),
    "images of the last group miscounted": (
        "lightning", "steps", ("len(self.trainer.train_dataloader.sampler)", "128"),
    ),
    "batches counted as the schedule's steps": (
        "lightning", "steps", ("self.trainer.estimated_stepping_batches", "16"),
    ),
    "interval beside lr_scheduler": ("lightning", "steps", *BESIDE),
    "schedule not handed over": (
        "lightning", "steps",
        ('return {"optimizer": optimizer, "lr_scheduler": config}', "return optimizer"),
    ),
    "schedule moved on by hand as well": (
        "lightning", "steps", (LOGGED, LOGGED + "        self.lr_schedulers().step()\n"),
    ),
    "Trainer with 32 bits": (
        "lightning", "steps", ("precision=args.precision", "precision='32-true'"),
    ),
    "bfloat16 for the weights, too": (
        "lightning", "start", ("precision=args.precision", "precision='bf16-true'"),
    ),
    "one group of parameters": (
        "lightning", "steps",
        ("optimizer = make_optimizer(self.model, self.hparams)",
         "optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, self.hparams.momentum, "
         "weight_decay=self.hparams.weight_decay)"),
    ),
    "label smoothing in validation, too": (
        "lightning", "metrics",
        ("        super().__init__(model, args)\n",
         "        smooth = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)\n"
         "        super().__init__(model, args, smooth)\n"),
    ),
    "no average": ("lightning", "weights", ("if args.ema_decay:", "if False:")),
    "another decay": ("lightning", "weights", ("decay=args.ema_decay", "decay=0.81")),
    "buffers not averaged": (
        "lightning", "weights",
        ("decay=args.ema_decay", "decay=args.ema_decay, use_buffers=False"),
    ),
    "every second step averaged": (
        "lightning", "weights",
        ("decay=args.ema_decay", "decay=args.ema_decay, update_every_n_steps=2"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        return dict(zip(SIDES, pair(folder, monkeypatch, **EVERY), strict=True))


def test_there_are_enough():
    by_side = {side: [c for c in CHANGES.values() if c[0] == side] for side in SIDES}
    assert len(CHANGES) == sum(map(len, by_side.values())) >= 40
    assert min(map(len, by_side.values())) >= 18
    stages = {c[1] for c in CHANGES.values()}
    assert stages == {"start", "steps", "weights", "metrics", "checkpoints"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Found unsupported keys")
@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = run_side(side, tmp_path, monkeypatch, *changes, **EVERY)
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, unchanged[other])
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")
