"""The networks of all lessons, so that weights alone can tell which one they are of."""

from common.checkpoints import differences, say
from common.data import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.messages import BadInput
from common.models import GAN, MLP, Airbench, DeepNet, DropoutNet, Net, NormNet, SmallNet, Transfer
from common.models_text import GPT

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network that a lesson trains: `make()` builds it, with initial weights.

    `data` is the set whose images it takes, `normalize` what is done to them once they are scaled
    to [0, 1]. `choice` tells it from the other networks of its lesson.
    """

    lesson: str
    make: Callable[[], nn.Module]
    normalize: Normalize | None
    data: str = "cifar10"
    choice: str = ""
    classifies: bool = True  # else it has losses alone: no accuracy and no confusion matrix

    @property
    def title(self) -> str:
        return f"{self.lesson} {self.choice}".strip()


TO_ONE = Normalize((0.5,) * 3, (0.5,) * 3)  # to [-1, 1]
CIFAR10 = Normalize(CIFAR10_MEAN, CIFAR10_STD)
IMAGENET = Normalize(IMAGENET_MEAN, IMAGENET_STD)
NETWORKS = (
    Network("cifar", Net, TO_ONE),
    Network("fashion", MLP, None, data="fashionmnist"),
    Network("callbacks", DeepNet, TO_ONE),
    Network("when", DropoutNet, TO_ONE),
    Network("resume", DropoutNet, TO_ONE),
    Network("optimize", NormNet, TO_ONE),
    Network("gan", GAN, TO_ONE, classifies=False),
    Network("tokens", GPT, None, data="text", classifies=False),
    Network("parallel", Net, TO_ONE),
    Network("parallel", NormNet, TO_ONE, choice="batch norm"),
    Network("fabric", DropoutNet, TO_ONE),
    Network("predict", NormNet, TO_ONE),
    Network("speed", Net, CIFAR10),
    Network("speed", SmallNet, CIFAR10, choice="small"),
    Network("speed", Airbench, CIFAR10, choice="airbench"),
    *(
        Network("finetune", partial(Transfer, backbone), IMAGENET, choice=backbone)
        for backbone in ("vgg16", "resnet18", "mobilenet_v3_small")
    ),
)


def data_of(lesson: str) -> str:
    """Return the data set whose images a lesson takes; that of most, for a script that is none."""
    return next((network.data for network in NETWORKS if network.lesson == lesson), "cifar10")


def classifies(lesson: str) -> bool:
    """Tell whether a lesson's network names a class for each image; a script that is none does."""
    return all(network.classifies for network in NETWORKS if network.lesson == lesson)


def identify(weights: Mapping[str, Tensor], lesson: str | None = None) -> Network:
    """Return the network of the lessons that has these weights, by names and shapes.

    Where several lessons have the same network, `lesson` decides, else the first one. Raises
    BadInput, with the networks that there are, where no lesson has such a network.
    """
    known = []
    for network in NETWORKS:
        with torch.device("meta"):  # shapes without numbers: VGG16 takes 10 ms and no memory
            known.append((network, network.make().state_dict()))
    shapes = _shapes(weights)
    fitting = [network for network, state in known if _shapes(state) == shapes]
    if fitting:
        return next((network for network in fitting if network.lesson == lesson), fitting[0])
    faults = {network.title: differences(state, weights) for network, state in known}
    nearest = min(faults, key=lambda title: sum(map(len, faults[title].values())))
    raise BadInput(
        f"these weights fit no network of the lessons ({', '.join(faults)}); the nearest is "
        f"{nearest}, with {say(faults[nearest])}: name a checkpoint that one of these lessons "
        "wrote."
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
