"""What both sides of the lesson `optimize` need: PyTorch's optimizers and schedules."""

from common.messages import Stopped
from common.recipes import OptimizeRecipe

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler


def make_optimizer(net: nn.Module, recipe: OptimizeRecipe) -> Optimizer:
    """Return the optimizer, with two groups of parameters.

    Weight decay pulls towards 0. Biases and the scales of norms, which are the parameters with one
    dimension, have no reason to be small, and get none.
    """
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors},
    ]
    if recipe.optimizer == "adam":
        return Adam(groups, lr=recipe.lr)
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def make_scheduler(
    optimizer: Optimizer, recipe: OptimizeRecipe, steps: int
) -> lr_scheduler.LRScheduler | None:
    """Return the schedule of the learning rate, None where it stays as it is.

    `steps` counts the optimizer steps of the whole training. A schedule is told how often it will
    be moved on: told of epochs and moved on by steps, or the other way round, it does nearly
    nothing, or ends far too early.
    """
    total = steps if recipe.interval == "step" else recipe.max_epochs
    warmup = max(1, total // 10)
    if recipe.schedule == "cosine":
        up = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
        down = lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup))
        return lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    if recipe.schedule == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, recipe.lr, total)
    if recipe.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return None


def group_weight(batch: int, size: int, images: int, recipe: OptimizeRecipe) -> float:
    """Return what the mean loss of a batch is multiplied by when gradients are accumulated.

    1.0 is what the Trainer does: each loss is divided by the number of batches in a full group,
    also where the epoch's last group has fewer, whose gradient is then too small by that factor.
    With `exact_accumulation`, a weight that makes the gradient that of the mean over all images of
    the group, whatever the sizes of its batches.

    `batch` counts from 0 in the epoch, `size` is its number of images, `images` that of an epoch.
    """
    if not recipe.exact_accumulation:
        return 1.0
    full = recipe.accumulate_grad_batches * recipe.batch_size
    before = batch * recipe.batch_size // full * full
    return recipe.accumulate_grad_batches * size / min(full, images - before)


def diverged(what: str, step: int, loss: float, folder: Path) -> Stopped:
    """Return what ends a run whose loss, that of a step or of a validation, is no number."""
    kept = folder / "checkpoints" / "last.ckpt"
    last = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written"
    return Stopped(
        f"The {what} step {step:,} is {loss}: the training ends here, and {last}; try a smaller "
        "--lr, or a --gradient-clip-val.",
        status=1,
    )
