"""The lesson `gan`: two optimizers, each option on both sides; what manual optimization does."""

from common import SIDES, figures
from common.models import GAN
from common.proof.compare import compare_results

import lightning as L
import numpy as np
import pytest
import torch
from helpers import WITH_CHECKPOINTS, assert_agree, count, some, train
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

# 120 images in batches of 16: eight batches, the last one of eight.
FEW = dict(lesson="gan", batch_size=16, max_epochs=2, warmup_steps=5)
# Without instructions for bfloat16, as with AVX2, a step in it takes eight times as long.
SLOW = {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 1}
OPTIONS = {
    "defaults": {},
    "accumulation with a rest": {"accumulate_grad_batches": 3},
    "clipped hard": {"gradient_clip_val": 0.1},
    "not clipped": {"gradient_clip_val": 0.0},
    "bfloat16": {"precision": "bf16-mixed"} | SLOW,
    "other rates": {"generator_lr": 1e-4, "discriminator_lr": 1e-3},
    "other schedules": {"generator_decay": 0.5, "warmup_steps": 0},
    "limits": {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 2},
    "all at once": {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed",
        "seed": 4, "max_epochs": 3, **SLOW,
    },
}  # fmt: skip


def run(side, folder, monkeypatch, *changes, **settings):
    return train(side, folder, monkeypatch, *changes, **FEW | settings)


@pytest.mark.parametrize("name", some(OPTIONS))
def test_each_option(name, tmp_path, monkeypatch):
    runs = [run(side, tmp_path, monkeypatch, **OPTIONS[name]) for side in SIDES]
    assert_agree(compare_results(*runs), WITH_CHECKPOINTS)
    settings = FEW | OPTIONS[name]
    epochs, batches = settings["max_epochs"], settings.get("limit_train_batches", 8)
    assert len(runs[0]["train_loss"]) == 2 * epochs * batches
    assert set(runs[0]["scores"]) == {
        f"{stage}_{part}_loss"
        for stage in ("val", "test") for part in ("discriminator", "generator")
    }  # fmt: skip
    # global_step counts the steps of both optimizers.
    steps = 2 * epochs * -(-batches // settings.get("accumulate_grad_batches", 1))
    assert f"step {steps}," in runs[0]["checkpoints"]["last.ckpt"]
    for epoch in range(epochs):
        pictures = [tmp_path / "gan" / s / "pictures" / f"epoch_{epoch}.png" for s in SIDES]
        ours, theirs = (np.asarray(Image.open(path)) for path in pictures)
        assert ours.shape == (512, 512, 3) and (ours == theirs).all()
    count("options of gan")


# A change on one side, and what must differ first.
AUTOCAST = "torch.autocast(device.type, torch.bfloat16, half, cache_enabled=False)"
CHANGES = {
    "the generator gets the discriminator's gradients": (
        "plain", "steps", {"accumulate_grad_batches": 2},
        ("                other.requires_grad_(False)\n", ""), (".detach())\n", ")\n"),
    ),
    "the other order": (
        "plain", "steps", {},
        ("    turns = (\n", "    turns = reversed((\n"), ("generator_loss),\n    )\n",
         "generator_loss),\n    ))\n    turns = tuple(turns)\n"),
    ),
    "one noise for both turns": (
        "lightning", "steps", {},
        ("                noise = random_numbers(images, self.model)\n",
         "                torch.manual_seed(batch_idx)\n"
         "                noise = random_numbers(images, self.model)\n"),
    ),
    "other labels for what is made": (
        "plain", "steps", {}, ("torch.zeros_like(fake)", "torch.full_like(fake, 0.1)"),
    ),
    "the loss not divided": (
        "plain", "steps", {"accumulate_grad_batches": 2},
        ("(loss / group).backward()", "loss.backward()"),
    ),
    "only one of them is clipped": (
        "plain", "steps", {"gradient_clip_val": 0.1},
        ("if args.gradient_clip_val:", "if args.gradient_clip_val and optimizer is first:"),
    ),
    "the warm-up moves once an epoch": (
        "lightning", "steps", {},
        ("        if due:\n            self.lr_schedulers()[0].step()\n", ""),
        ("self.lr_schedulers()[1].step()",
         "[schedule.step() for schedule in self.lr_schedulers()]"),
    ),
    "the generator's rate does not decay": ("plain", "steps", {}, ("        decay.step()\n", "")),
    "gradients left over": (
        "lightning", "steps", {}, ("                    optimizer.zero_grad()\n", ""),
    ),
    "autocast keeps its cache": (
        "plain", "steps", {"precision": "bf16-mixed"},
        (AUTOCAST, AUTOCAST.replace("False", "True")),
    ),
    "the steps of one optimizer counted": (
        "plain", "checkpoints", {},
        ("                    step += 1\n", "                    step += optimizer is first\n"),
    ),
    "a picture that draws": (
        "plain", "steps", {},
        ("        figures.generated(", "        torch.rand(1)\n        figures.generated("),
    ),
    "noise of each validation from the global generator": (
        "plain", "steps", {}, ("seed=number)", "seed=None)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(CHANGES, every=8))
def test_one_change_is_found(name, tmp_path, monkeypatch):
    side, stage, settings, *changes = CHANGES[name]
    changed = run(side, tmp_path / "changed", monkeypatch, *changes, **settings)
    (other,) = set(SIDES) - {side}
    first = compare_results(changed, run(other, tmp_path, monkeypatch, **settings)).first_difference
    assert first and first.name == stage, first
    count("negative controls")


def test_the_picture_draws_nothing_and_keeps_each_mode(tmp_path):
    gan = GAN()
    gan.train()
    gan.generator[1].eval()
    modes, state = [part.training for part in gan.modules()], torch.get_rng_state()
    pixels = figures.generated(gan, 0, tmp_path)
    assert [part.training for part in gan.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and len(np.unique(pixels)) > 10


# What docs/gan.md tells of manual optimization.


class Two(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)
        self.automatic_optimization, self.batches = False, 0

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.a, self.b)]

    def training_step(self, batch, batch_idx):
        self.batches += 1
        for part, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
            self.manual_backward(part(batch).sum())
            optimizer.step()
            optimizer.zero_grad()


def fit(module, batches=7, **settings):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    kept = {"enable_checkpointing": "callbacks" in settings}
    trainer = L.Trainer(accelerator="cpu", devices=1, **quiet, **kept, **settings)
    trainer.fit(module, DataLoader(torch.ones(batches, 1)))
    return trainer


def test_global_step_counts_both_optimizers(tmp_path):
    assert fit(Two(), max_epochs=1).global_step == 14
    module = Two()
    fit(module, max_steps=4)
    assert module.batches == 2


def test_every_third_step_is_looked_for_after_each_batch(tmp_path):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(Two(), max_epochs=1, callbacks=[every])
    # After the batches global_step is 2, 4, 6, ...: of 3, 6, 9, 12 it meets two.
    assert sorted(path.name for path in tmp_path.glob("*")) == ["step=12.ckpt", "step=6.ckpt"]


def test_nested_toggles_freeze_everything():
    class Nested(Two):
        def training_step(self, batch, batch_idx):
            a, b = self.optimizers()
            self.toggle_optimizer(a)
            self.toggle_optimizer(b)
            self.untoggle_optimizer(a)
            self.untoggle_optimizer(b)

    module = Nested()
    fit(module, batches=1, max_epochs=1)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("option", [dict(gradient_clip_val=1.0), dict(accumulate_grad_batches=2)])
def test_manual_optimization_refuses_what_it_cannot_do(option):
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(Two(), max_epochs=1, **option)


def test_raw_optimizers_are_not_counted():
    class Raw(Two):
        def optimizers(self, use_pl_optimizer=True):
            return super().optimizers(use_pl_optimizer=False)

    module = Raw()
    trainer = fit(module, max_steps=4, max_epochs=1)
    assert trainer.global_step == 0 and module.batches == 7
