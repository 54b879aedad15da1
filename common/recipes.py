"""What each lesson trains. Both sides of a pair read the same recipe."""

from common.models import Net

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Recipe:
    """One lesson's training, in full.

    The command line can replace optimizer, lr, batch_size, max_epochs and seed. `lr` is the
    learning rate, `batch_size` the number of images in one optimizer step over all devices
    together, `momentum` belongs to SGD alone, `seed` draws the validation set, the initial weights
    and the order of the batches.
    """

    lesson: str
    data: str
    model: type[nn.Module]
    optimizer: str
    lr: float
    momentum: float
    batch_size: int
    max_epochs: int
    seed: int


RECIPES = {
    # https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    "cifar": Recipe(
        lesson="cifar",
        data="cifar10",
        model=Net,
        optimizer="sgd",
        lr=1e-3,
        momentum=0.9,
        batch_size=4,
        max_epochs=2,
        seed=0,
    ),
}
