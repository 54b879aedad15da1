"""The right answer of each question among the exercises is computed, and each answer explained."""

from common.exercises import check
from common.exercises.catalog import exercises, find

import lightning as L
import pytest
import torch
from helpers import count
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUESTIONS = [e.number for e in exercises().values() if e.kind == "predict"]


def fitted(module, batches, **options):
    """Fit a module on so many batches of one number, without anything around it."""
    loader = DataLoader(TensorDataset(torch.ones(batches, 1)), batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader if hasattr(module, "val_loss") else None)
    return trainer


class One(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(One):
    """Logs the losses that it is given, one for each validation."""

    def __init__(self, losses):
        super().__init__()
        self.val_loss, self.validations, self.norm = iter(losses), 0, nn.BatchNorm1d(1)
        self.modes = []

    def on_train_batch_start(self, *_):
        self.modes.append(self.norm.training)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validations += 1
            self.loss = next(self.val_loss)
        if not self.trainer.sanity_checking:
            self.log("val_loss", torch.tensor(self.loss))


class Two(One):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.manual_backward(self.layer(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


def how_many_steps():
    loader = DataLoader(TensorDataset(torch.ones(1000, 1)), batch_size=32)
    return f"{3 * sum(1 for _ in loader)}"


def who_calls_train():
    module = Validated([1.0] * 9)
    module.norm.eval()
    fitted(module, 4, max_epochs=2)
    return "In eval mode" if module.modes == [False] * 8 else "In train mode"


def when_does_it_stop():
    losses = [0.9, 0.7, 0.7, 0.6, 0.65, 0.62, 0.5, 0.5, 0.5]
    stop = L.pytorch.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = fitted(Validated(losses), 2, max_epochs=9, callbacks=[stop])
    return f"epoch {trainer.current_epoch - 1}"


def one_or_one():
    module = Validated([1.0] * 99)
    fitted(module, 10, max_epochs=4, val_check_interval=1)
    return f"{module.validations}"


def patience_of_what():
    losses = [1 - 0.01 * n for n in range(20)] + [9.0] * 99
    module = Validated(losses)
    stop = L.pytorch.callbacks.EarlyStopping("val_loss", patience=3, check_on_train_epoch_end=False)
    trainer = fitted(module, 8, max_epochs=20, val_check_interval=0.25, callbacks=[stop])
    inside = module.validations == 23 and trainer.global_step == 5 * 8 + 3 * 2
    return "within epoch 5, after its third validation" if inside else "later"


def what_is_left_out(tmp_path):
    stop = L.pytorch.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = fitted(Validated([1.0] * 9), 2, max_epochs=1, callbacks=[stop])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=False)
    there = {"optimizer_states", "lr_schedulers", "callbacks"} <= content.keys()
    state = torch.get_rng_state()
    held = [v for v in content.values() if torch.is_tensor(v) and v.shape == state.shape]
    names = [name for name in content if "rng" in name or "random" in name]
    return "the states of the random generators" if there and not held and not names else "?"


def steps_with_groups():
    trainer = fitted(One(), 10, max_epochs=3, accumulate_grad_batches=4)
    return f"{trainer.global_step}"


def who_counts_what():
    return f"{fitted(Two(), 10, max_epochs=1).global_step}"


def padded_samples():
    from torch.utils.data import DistributedSampler

    shares = [DistributedSampler(range(101), 2, rank, shuffle=False) for rank in range(2)]
    return f"{sum(len(list(share)) for share in shares)}"


def test_every_question_is_computed():
    assert {find(f"{n}").name for n in QUESTIONS} <= globals().keys()
    assert len(QUESTIONS) >= 9


@pytest.mark.parametrize("number", QUESTIONS)
def test_the_right_answer_is_right(number, workspace, tmp_path):
    exercise = find(f"{number}")
    compute = globals()[exercise.name]
    computed = compute(tmp_path) if exercise.name == "what_is_left_out" else compute()
    right = [letter for letter, (text, _) in exercise.answers.items() if text.startswith(computed)]
    assert right == [exercise.right], (computed, exercise.answers)
    for letter, (_, why) in exercise.answers.items():
        workspace.begin(exercise)
        text = exercise.given().replace('answer = ""', f'answer = "{letter}"')
        workspace.path(exercise).write_text(text)
        outcome = check.check(exercise, workspace)
        assert outcome.solved == (letter == exercise.right) and outcome.said == why
        assert why.startswith("Right") == outcome.solved
        count("answers explained")
