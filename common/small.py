"""A lesson in small: few images and a small network, so that a training takes a second.

The network has BatchNorm and dropout, and the sets do not divide evenly: what a training forgets
shows. The exercises and the tests train so.
"""

from common import data, figures, run, script_of, text
from common.data import Data, Images
from common.environment import WITH_PROCESSES
from common.models import GAN
from common.models import NETWORKS as NETWORKS_OF_SPEED
from common.models_text import GPT
from common.networks import NETWORKS, data_of

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import samebits
import torch
from torch import Tensor, nn


class Noisy(nn.Module):
    """A small network that shows whether it trains or evaluates: BatchNorm and dropout.

    It serves every lesson: it ends with log_softmax, and has a backbone and a head.
    """

    channels, flattened = 3, 400

    def __init__(self, backbone: str = "") -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(self.channels, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.5),
        )  # fmt: skip
        self.head = nn.Linear(self.flattened, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).log_softmax(1)


class GreyNoisy(Noisy):
    channels, flattened = 1, 256  # images of 28 by 28


NOISY: dict[str, type[nn.Module]] = {"cifar10": Noisy, "fashionmnist": GreyNoisy}
# A lesson whose network is no classifier is tried with its own, which is small.
OWN_NETWORK: dict[str, Callable[..., nn.Module]] = {
    "gan": GAN,
    "tokens": lambda letters: GPT(letters, width=16, heads=2, blocks=1, context=128),
}
# By what name a lesson calls the network that it trains.
NETWORK_NAMES = {
    "cifar": "Net", "fashion": "MLP", "callbacks": "DeepNet", "when": "DropoutNet",
    "resume": "DropoutNet", "optimize": "NormNet", "parallel": "Net", "fabric": "DropoutNet",
    "gan": "GAN", "tokens": "GPT", "predict": "NormNet", "speed": "NETWORKS",
    "finetune": "Transfer",
}  # fmt: skip


def network_of(lesson: str) -> Callable[..., nn.Module]:
    """Return what builds the small network of a lesson."""
    return OWN_NETWORK.get(lesson) or NOISY[data_of(lesson)]


def split(images: Images, lesson: str, sizes: tuple[int, ...] = (120, 130, 140)) -> Data:
    """Return images to train, validate and test on: the first ones of `images`, in this order."""
    network = next(network for network in NETWORKS if network.lesson == lesson)
    splits, start = [], 0
    for name, size in zip(("train", "val", "test"), sizes, strict=True):
        part = slice(start, start + size)
        chosen, labels = images.images[part], images.labels[part]
        splits.append(
            replace(images, images=chosen, labels=labels, transform=network.normalize, split=name)
        )
        start += size
    return Data(*splits)


def drawn(name: str, count: int) -> Images:
    """Return drawn images in the format of a data set, the same ones each time."""
    draw = {"cifar10": data.shapes.draw_shapes, "fashionmnist": data.shapes.draw_grey_shapes}
    return Images(*draw[name](count, 2), name="shapes", classes=data.shapes.CLASSES)


def small_text() -> text.Text:
    """The first 4,000 letters: 45 pieces to train on, two to evaluate on."""
    return text.read_text(text.MANUAL.read_text()[:4000])


def few(lesson: str) -> Any:
    """Return what a lesson trains on, in small: images or text."""
    return small_text() if lesson == "tokens" else split(drawn(data_of(lesson), 390), lesson)


def give(
    module: ModuleType,
    images: Any,
    network: Callable[..., nn.Module],
    lesson: str,
    patch: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Let a loaded lesson find these images, or this text, and this network.

    `patch` sets an attribute: of the module, and of what it uses, for the whole process.
    """

    def load_text(args: Any) -> Any:
        args.used_data = "text"
        return images

    def load_images(name: str, args: Any, transform: Any = None) -> Any:
        data._check_limits(images, args)
        args.used_data, args.classes = images.name, images.classes
        return images

    load = load_text if lesson == "tokens" else load_images
    patch(module, load.__name__, load)
    name = NETWORK_NAMES[lesson]
    by_name = dict.fromkeys(NETWORKS_OF_SPEED, network)
    patch(module, name, by_name if name == "NETWORKS" else network)
    # Not a divisor of the 130 validation images: averages over batches and samples differ.
    patch(data, "EVAL_BATCH_SIZE", 50)
    # The drawing of pictures takes longer than the training of so few steps.
    patch(figures, "draw", lambda *_: {})
    patch(figures, "SHOWN", 8)  # of the pictures that `callbacks` draws itself


@contextlib.contextmanager
def traced(network: Callable[..., nn.Module], path: Path) -> Iterator[Callable[..., nn.Module]]:
    """Give what builds the network with a trace around it, until the block's end.

    A lesson builds its network within `main`, so the trace begins there. The trace of one that is
    built before the training, for a summary, is overwritten; one that is built after it, to be
    returned, is not traced.
    """
    traces: list[samebits.Trace] = []

    def close() -> None:
        while traces:
            traces.pop().__exit__(None, None, None)

    @functools.wraps(network, updated=())
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        if traces and traces[0].steps:
            return network(*args, **kwargs)
        close()
        traces.append(samebits.Trace(network(*args, **kwargs), path=path).__enter__())
        return traces[0].model

    try:
        yield build
    finally:
        close()


# What torchrun would tell a process that is alone.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
         "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def be_alone(setenv: Callable[[str, str], None] = os.environ.__setitem__) -> None:
    """Let this process be all that torchrun started."""
    if torch.distributed.is_initialized():  # by the run before
        torch.distributed.destroy_process_group()
    for name, value in (ALONE | {"MASTER_PORT": free_port()}).items():
        setenv(name, value)


def is_to_be_alone(lesson: str) -> bool:
    """Tell whether a lesson expects torchrun, and nobody has started several processes."""
    return lesson in WITH_PROCESSES and os.environ.get("WORLD_SIZE", "1") == "1"


def arguments(module: ModuleType, side: str, lesson: str, runs_dir: Path, **settings: Any) -> Any:
    """Return the lesson's Args, checked as on the command line, with settings for few images.

    A learning rate of 0.02 on so few steps: the weights must move far enough to show differences.
    """
    usual = {"lr": 0.02, "batch_size": 8, "max_epochs": 2, "weights": "random", "threads": 1}
    usual |= {"accelerator": "cpu", "log_every_n_steps": 5, "refresh_rate": 0}
    known = {own.name for own in fields(module.Args) if own.init}
    given = {name: value for name, value in usual.items() if name in known} | settings
    return run.ready(module.Args(**given, runs_dir=runs_dir), script_of(side, lesson))
