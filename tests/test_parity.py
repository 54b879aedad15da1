"""Both sides reach the same bits, for every combination of what can change."""

from common.models import Net
from common.networks import classifies
from common.proof.compare import compare_results

import csv
import itertools

import pytest
import torch
from helpers import (
    SIDES,
    STAGES,
    WITH_CHECKPOINTS,
    Noisy,
    assert_agree,
    count,
    lessons,
    load_lesson,
    small_data,
    train,
)

# The others make other steps, and are held by tests of their own.
CLASSIFIERS = [lesson for lesson in lessons() if classifies(lesson)]
CHECKPOINTS = (
    "callbacks", "finetune", "optimize", "parallel", "predict", "resume", "when",
)  # fmt: skip
# 120 images: batches of 8 divide them, batches of 16 leave a last one of 8.
GRID = list(itertools.product((0, 1, 2), (2, 3), (8, 16), (0.02, 0.05), (1, 2)))
# Some are run by `make test`, all by `make test-slow`. Every value is among them. Two threads wait
# for each other on a busy machine: once is enough.
SOME = [GRID[0], GRID[26], GRID[38], GRID[13]]


# One optimizer step a batch, and a validation at the end of each epoch, as in the other lessons;
# their own tests try the rest.
OWN = {
    "optimize": dict(accumulate_grad_batches=1),
    "fabric": dict(accumulate_grad_batches=1),
    "when": dict(val_check_interval=1.0),
}


def both(tmp_path, monkeypatch, lesson="cifar", **settings):
    settings = OWN.get(lesson, {}) | settings
    return [train(side, tmp_path, monkeypatch, lesson=lesson, **settings) for side in SIDES]


def assert_same(plain, lightning, steps):
    comparison = compare_results(plain, lightning)
    assert_agree(comparison, WITH_CHECKPOINTS if plain["lesson"] in CHECKPOINTS else STAGES)
    assert plain["weights_sha256"] == lightning["weights_sha256"]  # weights.pt, byte for byte
    assert len(plain["train_loss"]) == len(lightning["train_loss"]) == steps
    count("pairs of runs, bit for bit")


def run_combinations(lesson, combinations, tmp_path, monkeypatch):
    last = {}
    for seed, epochs, batch_size, lr, threads in combinations:
        runs = both(tmp_path, monkeypatch, lesson=lesson, seed=seed, max_epochs=epochs,
                    batch_size=batch_size, lr=lr, threads=threads)  # fmt: skip
        assert_same(*runs, steps=epochs * -(-120 // batch_size))
        last[seed, epochs, batch_size, lr, threads] = tuple(runs[0]["train_loss"])
    # The settings reach the training: but for the threads, no two give the same losses. (The
    # weights can be equal: callbacks returns the best ones, which may be an earlier epoch's.)
    with_one_thread = [losses for key, losses in last.items() if key[-1] == 1]
    assert len(set(with_one_thread)) == len(with_one_thread) >= 3


@pytest.mark.parametrize("lesson", CLASSIFIERS)
def test_combinations(lesson, tmp_path, monkeypatch):
    assert len(GRID) == 48 and len(SOME) == 4
    assert all(len(set(values)) >= 2 for values in zip(*SOME, strict=True))
    run_combinations(lesson, SOME, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", CLASSIFIERS)
def test_every_combination(lesson, tmp_path, monkeypatch):
    run_combinations(lesson, GRID, tmp_path, monkeypatch)


def test_the_lessons_own_network_learns(tmp_path, monkeypatch):
    settings = dict(images=small_data(train=800), model=Net, max_epochs=8, batch_size=8, lr=1e-2)
    plain, lightning = both(tmp_path, monkeypatch, **settings)
    assert_same(plain, lightning, steps=800)
    first, last = sum(plain["train_loss"][:100]), sum(plain["train_loss"][-100:])
    assert last < 0.9 * first
    assert len(plain["val_loss"]) == 8


LIMITS = [
    (dict(limit_train_batches=4), 8, 2),
    (dict(limit_train_batches=0.5), 14, 2),
    (dict(limit_train_batches=99), 30, 2),
    (dict(limit_val_batches=2, limit_test_batches=0.5), 30, 2),
    (dict(batch_size=1000), 2, 2),
    (dict(num_workers=2), 30, 2),
    (dict(num_workers=1, limit_train_batches=7), 14, 2),
]


@pytest.mark.parametrize(
    "lesson, settings, steps, validations",
    [
        # All of them for cifar; of the other lessons a quarter, the others by `make test-slow`.
        pytest.param(
            lesson, *case, marks=[pytest.mark.slow] * (lesson != "cifar" and (a + b) % 4 > 0)
        )
        for a, lesson in enumerate(CLASSIFIERS)
        for b, case in enumerate(LIMITS)
    ],
)
def test_limits_and_workers(lesson, tmp_path, monkeypatch, settings, steps, validations):
    plain, lightning = both(tmp_path, monkeypatch, lesson=lesson, **settings)
    assert_same(plain, lightning, steps)
    assert len(plain["val_loss"]) == len(lightning["val_loss"]) == validations


@pytest.mark.parametrize("limit", [1.0, 7, 2])
@pytest.mark.parametrize("lesson", CLASSIFIERS)
def test_metrics_csv_is_the_same_file(lesson, limit, tmp_path, monkeypatch):
    both(tmp_path, monkeypatch, lesson=lesson, limit_train_batches=limit)
    tables = []
    for side in SIDES:
        with (tmp_path / lesson / side / "metrics.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    # Training losses, validations, test; `callbacks` also logs the mean of each epoch.
    losses = {1.0: 6, 7: 2, 2: 0}[limit]  # in each fifth of 30, 14 or 4 steps
    rows = losses + 2 + 1 + 2 * (lesson == "callbacks")
    assert len(tables[0]) == len(tables[1]) == rows
    for ours, theirs in zip(*tables, strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            assert (ours[name] == "") == (theirs[name] == "")
            assert not ours[name] or float(ours[name]) == pytest.approx(float(theirs[name]), 1e-6)


@pytest.mark.parametrize("lesson", CLASSIFIERS)
def test_every_step_leaves_the_same_gradients_and_weights(lesson, tmp_path, monkeypatch):
    """What the results do not hold: each batch, gradient and weight, after every single step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    traces = []
    for side in SIDES:
        trace, inputs = [], []

        def after_step(optimizer, args, kwargs, trace=trace):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            # A layer that rests has no gradient any more: zeros stand for it.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            both = zip(parameters, grads, strict=True)
            trace.append([(p.detach().clone(), g.clone()) for p, g in both])

        def before_forward(module, args, inputs=inputs):
            if isinstance(module, Noisy) and module.training and torch.is_grad_enabled():
                inputs.append(args[0].clone())

        hooks = [
            register_optimizer_step_post_hook(after_step),
            torch.nn.modules.module.register_module_forward_pre_hook(before_forward),
        ]
        try:
            own = OWN.get(lesson, {})
            train(side, tmp_path, monkeypatch, lesson=lesson, **own)
        finally:
            for hook in hooks:
                hook.remove()
        # The forward pass of torchsummary, on two images, comes first.
        steps = [batch for batch in inputs if len(batch) == 8]
        assert len(trace) == len(steps) == 30
        traces.append((trace, steps))
    for ours, theirs in zip(traces[0][1], traces[1][1], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(traces[0][0], traces[1][0], strict=True):
        for (weight, gradient), (weight2, gradient2) in zip(ours, theirs, strict=True):
            assert torch.equal(weight, weight2) and torch.equal(gradient, gradient2)
    count("steps, gradients and weights", 30)


def test_every_lesson_has_args_and_a_main():
    for name in lessons():
        for side in SIDES:
            module = load_lesson(side, name)
            assert callable(module.main) and module.Args().max_epochs >= 1
            count("scripts loaded")


@pytest.mark.parametrize("lesson", ["cifar", "when"])
def test_each_pass_has_the_same_mode_and_gradients_on_both_sides(lesson, tmp_path, monkeypatch):
    passes = []
    for side in SIDES:
        seen = []

        def before_forward(module, args, seen=seen):
            if isinstance(module, Noisy):
                seen.append((module.training, torch.is_grad_enabled(), len(args[0])))

        hook = torch.nn.modules.module.register_module_forward_pre_hook(before_forward)
        try:
            train(side, tmp_path, monkeypatch, lesson=lesson, limit_train_batches=5)
        finally:
            hook.remove()
        # The summary and the sanity check come before the first training pass.
        begin = next(n for n, (training, _, size) in enumerate(seen) if training and size == 8)
        passes.append(seen[begin:])
    assert passes[0] == passes[1] and {mode[:2] for mode in passes[0]} == {
        (True, True), (False, False),
    }  # fmt: skip
    count("passes in the same mode", len(passes[0]))
