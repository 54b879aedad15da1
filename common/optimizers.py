"""What both sides of `optimize` and `speed` need: schedules, and Muon."""

from common.messages import Stopped

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler


def make_schedule(optimizer: Optimizer, args: Any, steps: int) -> lr_scheduler.LRScheduler:
    """Return the schedule of the learning rate that args.schedule names.

    `steps` counts the optimizer steps of the whole training. A schedule is told how often it will
    be moved on: told of epochs and moved on by steps, or the other way round, it does nearly
    nothing, or ends far too early.
    """
    total = steps if args.interval == "step" else args.max_epochs
    warmup = max(1, total // 10)
    if args.schedule == "cosine":
        up = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
        down = lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup))
        return lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    if args.schedule == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, args.lr, total)
    if args.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # none


def group_weight(batch: int, size: int, images: int, args: Any) -> float:
    """Return what the mean loss of a batch is multiplied by when gradients are accumulated.

    1.0 is what the Trainer does: each loss is divided by the number of batches in a full group,
    also where the epoch's last group has fewer, whose gradient is then too small by that factor.
    With args.exact_accumulation, a weight that makes the gradient that of the mean over all images
    of the group, whatever the sizes of its batches.

    `batch` counts from 0 in the epoch, `size` is its number of images, `images` that of an epoch.
    """
    if not args.exact_accumulation:
        return 1.0
    full = args.accumulate_grad_batches * args.batch_size
    before = batch * args.batch_size // full * full
    return args.accumulate_grad_batches * size / min(full, images - before)


def diverged(what: str, step: int, loss: float, folder: Path) -> Stopped:
    """Return what ends a run whose loss, that of a step or of a validation, is no number."""
    kept = folder / "checkpoints" / "last.ckpt"
    last = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written"
    return Stopped(
        f"The {what} step {step:,} is {loss}: the training ends here, and {last}; try a smaller "
        "--lr, or a --gradient-clip-val.",
        status=1,
    )


class Muon(Optimizer):
    """Step the weights of hidden layers by Muon, and all else (biases, the last layer) by AdamW.

    Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) takes the
    momentum of a weight matrix and brings all its singular values near 1: directions in which the
    gradients are small count as much as the others. PyTorch's own torch.optim.Muon takes matrices
    alone; here the weights of a convolution are one, [out, in * height * width].

    `lr` is that of the matrices, the others have `lr` / 10. Weight decay is decoupled.
    """

    def __init__(
        self, net: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        hidden = [p for p in net.parameters() if p.ndim > 1 and p.requires_grad][:-1]
        known = {id(p) for p in hidden}
        others = [p for p in net.parameters() if id(p) not in known and p.requires_grad]
        groups = [
            {"params": hidden, "lr": lr, "muon": True},
            {"params": others, "lr": lr / 10, "muon": False},
        ]
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": (0.9, 0.99),
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        # The Trainer hands forward and backward pass over as a closure.
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            step = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    step(p, p.grad, group, self.state[p])
        return loss

    def _muon(self, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = orthogonalized(grad.lerp(mean, group["momentum"]).flatten(1))  # Nesterov's
        rows, columns = update.shape
        p.add_(update.view_as(p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - first)
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - second)
        size = (square / (1 - second ** state["step"])).sqrt_().add_(1e-8)
        p.addcdiv_(mean, size, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix [rows, columns] with the same singular vectors, and singular values near 1.

    Three steps of Newton and Schulz's iteration, with Muon's coefficients, which climb fast and end
    between 0.7 and 1.2, except for singular values that were next to nothing.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(3):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a @ a
        x = torch.addmm(x, b, x, beta=3.4445)  # 3.4445 x + b @ x
    return x.T if tall else x


def up_and_down(steps: int) -> Callable[[int], float]:
    """Return by what the learning rate is multiplied in each step: up for a tenth, then down."""
    up = max(1, steps // 10)
    return lambda step: min((step + 1) / (up + 1), max(0, steps - step) / max(1, steps - up))
