"""What the tests share: loading a lesson, changed or not, and training it on a few images."""

from common import ROOT, SIDES, THIRD, data, figures, resume, run, script_of, text
from common.data import Data, Images
from common.download import is_here, read_real
from common.environment import WITH_PROCESSES
from common.models import GAN
from common.models import NETWORKS as NETWORKS_OF_SPEED
from common.models_text import GPT
from common.networks import NETWORKS
from common.proof import watch
from common.proof.lessons import load as load_lesson

import functools
import os
import socket
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# What the tests compared, printed at the end of the session by conftest.py.
COMPARED: dict[str, int] = {}


def count(what: str, how_many: int = 1) -> None:
    COMPARED[what] = COMPARED.get(what, 0) + how_many


# What parity compares, in this order; the last where a lesson leaves checkpoints.
STAGES = ["data", "start", "steps", "weights", "optimizer", "random", "metrics"]
WITH_CHECKPOINTS = [*STAGES, "checkpoints"]


def assert_agree(comparison, stages) -> None:
    """Assert that just these stages were compared, none of them empty, and that all agree."""
    assert comparison.agree, comparison.first_difference
    assert [stage.name for stage in comparison.stages] == stages
    assert all(stage.compared > 0 for stage in comparison.stages)


def some(names, every: int = 4) -> list:
    """Parameters of a test: each fourth is run by `make test`, the others by `make test-slow`."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (number % every > 0))
        for number, name in enumerate(names)
    ]


def lessons() -> list[str]:
    """The names of all pairs; a script without its twin is an error."""
    third = {(ROOT / path).stem for path in THIRD.values()}  # a lesson's other side, not another
    names = [{path.stem for path in (ROOT / side).glob("*.py")} - third for side in SIDES]
    assert names[0] == names[1], f"without a twin: {names[0] ^ names[1]}"
    assert names[0], "no pair was found"
    return sorted(names[0])


def real_data(name: str = "cifar10") -> Path | None:
    """The folder with the real images of that name, where DATA_DIR names one."""
    folder = os.environ.get("DATA_DIR")
    return Path(folder) if folder and is_here(Path(folder), name) else None


@functools.cache
def some_images(name: str = "cifar10") -> Images:
    """2,000 images in that set's format: real ones where DATA_DIR has them, else shapes."""
    if folder := real_data(name):
        classes, _, test = read_real(name, folder)
    else:
        draw = {"cifar10": data.shapes.draw_shapes, "fashionmnist": data.shapes.draw_grey_shapes}
        classes, test = data.shapes.CLASSES, draw[name](2000, 2)
    used = name if folder else "shapes"
    return Images(test[0][:2000], test[1][:2000], name=used, classes=tuple(classes))


def small_data(train: int = 120, val: int = 130, test: int = 140, lesson: str = "cifar") -> Data:
    network = next(network for network in NETWORKS if network.lesson == lesson)
    all_images = some_images(network.data)
    splits, start = [], 0
    for split, length in (("train", train), ("val", val), ("test", test)):
        part = slice(start, start + length)
        images, labels = all_images.images[part], all_images.labels[part]
        splits.append(
            replace(all_images, images=images, labels=labels, transform=network.normalize,
                    split=split)
        )  # fmt: skip
        start += length
    return Data(*splits)


def small_text() -> text.Text:
    """The first 4,000 letters: 45 pieces to train on, two to evaluate on."""
    return text.read_text(text.MANUAL.read_text()[:4000])


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)).log_softmax(1)


class GreyNoisy(Noisy):
    channels, flattened = 1, 256  # images of 28 by 28


NOISY = {"cifar10": Noisy, "fashionmnist": GreyNoisy}
# A lesson whose network is no classifier is tried with its own, which is small.
OWN_NETWORK = {
    "gan": GAN,
    "tokens": lambda letters: GPT(letters, width=16, heads=2, blocks=1, context=128),
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# What torchrun would tell a process that is alone.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
         "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip


def be_alone(monkeypatch):
    """Let this process be all that torchrun started."""
    if torch.distributed.is_initialized():  # by the run before
        torch.distributed.destroy_process_group()
    for name, value in (ALONE | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)


# By what name a lesson calls the network that it trains.
NETWORK_NAMES = {
    "cifar": "Net", "fashion": "MLP", "callbacks": "DeepNet", "when": "DropoutNet",
    "resume": "DropoutNet", "optimize": "NormNet", "parallel": "Net", "fabric": "DropoutNet",
    "gan": "GAN", "tokens": "GPT", "predict": "NormNet", "speed": "NETWORKS",
    "finetune": "Transfer",
}  # fmt: skip


def arguments(module, side, lesson, runs_dir, **settings):
    """The lesson's Args, checked as on the command line, with settings that suit few images.

    A learning rate of 0.02 on so few steps: the weights must move far enough to show differences.
    """
    usual = {"lr": 0.02, "batch_size": 8, "max_epochs": 2, "weights": "random", "threads": 1}
    usual |= {"accelerator": "cpu", "log_every_n_steps": 5, "refresh_rate": 0}
    known = {own.name for own in fields(module.Args) if own.init}
    given = {name: value for name, value in usual.items() if name in known} | settings
    return run.ready(module.Args(**given, runs_dir=runs_dir), script_of(side, lesson))


def train(
    side, runs_dir, monkeypatch, *changes, images=None, lesson="cifar", model=None, **settings
):
    """Train one side on a few images; return what result.json holds.

    `images` are a Data in place of the few; `model` is a class in place of the lesson's network;
    `changes` are made to the lesson's text; `settings` go to its Args.
    """
    few = images or (small_text() if lesson == "tokens" else small_data(lesson=lesson))
    module = load_lesson(side, lesson, *changes)
    network = model or OWN_NETWORK.get(lesson) or NOISY[few_like(lesson)]
    give(module, few, network, lesson, monkeypatch)
    nets, optimizers = [], {}

    def main(args):
        nets.append(module.main(args))
        return nets[0]

    note = lambda optimizer, *_: optimizers.setdefault(optimizer)  # noqa: E731
    hook = register_optimizer_step_pre_hook(note)
    try:
        args = arguments(module, side, lesson, runs_dir, **settings)
        if getattr(args, "ckpt_path", None):
            resume.begin(args)  # as `run` does
        result = Result(watch.watch(main, args))
    finally:
        hook.remove()
    result.net, result.optimizer = nets[0], next(iter(optimizers), None)
    return result


class Result(dict):
    """What result.json holds; and the network that was returned, and the optimizer of it."""

    net = optimizer = None


def few_like(lesson):
    return next(network.data for network in NETWORKS if network.lesson == lesson)


def give(module, images, model, lesson, monkeypatch):
    """Let a loaded lesson find these images and this network."""

    def load_text(args):
        args.used_data = "text"
        return images

    def load_images(name, args, transform=None):
        data._check_limits(images, args)
        args.used_data, args.classes = images.name, images.classes
        return images

    load = load_text if lesson == "tokens" else load_images
    monkeypatch.setattr(module, load.__name__, load)
    name = NETWORK_NAMES[lesson]
    by_name = dict.fromkeys(NETWORKS_OF_SPEED, model)
    monkeypatch.setattr(module, name, by_name if name == "NETWORKS" else model)
    # Not a divisor of the 130 validation images: averages over batches and samples differ.
    monkeypatch.setattr(data, "EVAL_BATCH_SIZE", 50)
    # The drawing of pictures takes longer than the training of so few steps.
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    monkeypatch.setattr(figures, "SHOWN", 8)  # of the pictures that `callbacks` draws itself
    if lesson in WITH_PROCESSES and os.environ.get("WORLD_SIZE", "1") == "1":
        be_alone(monkeypatch)
