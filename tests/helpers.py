"""What the tests share: loading a lesson, changed or not, and training it on a few images."""

from common import ROOT, SIDES, figures
from common import data as data_module
from common.data import PIXELS, Data, Images
from common.options import Options
from common.recipes import RECIPES

import functools
import importlib.util
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

# What the tests compared, printed at the end of the session by conftest.py.
COMPARED: dict[str, int] = {}


def count(what: str, how_many: int = 1) -> None:
    COMPARED[what] = COMPARED.get(what, 0) + how_many


def some(names, every: int = 4) -> list:
    """Parameters of a test: each fourth is run by `make test`, the others by `make test-slow`."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (number % every > 0))
        for number, name in enumerate(names)
    ]


def lessons() -> list[str]:
    """The names of all pairs; a script without its twin is an error."""
    names = [{path.stem for path in (ROOT / side).glob("*.py")} for side in SIDES]
    assert names[0] == names[1], f"without a twin: {names[0] ^ names[1]}"
    assert names[0], "no pair was found"
    return sorted(names[0])


def load_lesson(side: str, name: str, *changes: tuple[str, str]):
    """Import SIDE/NAME.py as a module of its own, after replacing each old text by a new one.

    Both sides have modules of the same names: while one is loaded, its folder is first on the
    path, as when Python runs the script, and its siblings are forgotten afterwards.
    """
    path = ROOT / side / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{path} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    siblings = [sibling.stem for sibling in path.parent.glob("*.py")]
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_file_location(f"{side}_{name}", path)
        )
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module
    finally:
        sys.path.remove(str(path.parent))
        for sibling in siblings:
            sys.modules.pop(sibling, None)


def real_data(name: str = "cifar10") -> Path | None:
    """The folder with the real images of that name, where DATA_DIR names one."""
    folder = os.environ.get("DATA_DIR")
    return Path(folder) if folder and data_module.is_here(Path(folder), name) else None


@functools.cache
def some_images(name: str = "cifar10") -> tuple[str, tuple[str, ...], Images]:
    """2,000 images in that set's format: real ones where DATA_DIR has them, else shapes."""
    if folder := real_data(name):
        classes, _, test = data_module._real(name, folder)
    else:
        with pytest.MonkeyPatch.context() as patch:
            few = lambda draw: lambda count, seed: draw(2000, seed)  # noqa: E731
            for draw in ("draw_shapes", "draw_grey_shapes"):
                patch.setattr(data_module.shapes, draw, few(getattr(data_module.shapes, draw)))
            classes, _, test = data_module._shapes_like(name)
    return name if folder else "shapes", classes, Images(test.images[:2000], test.labels[:2000])


def small_data(train: int = 120, val: int = 130, test: int = 140, lesson: str = "cifar") -> Data:
    recipe = RECIPES[lesson]
    name, classes, all_images = some_images(recipe.data)
    splits, start = [], 0
    for length in (train, val, test):
        part = slice(start, start + length)
        images, labels = all_images.images[part], all_images.labels[part]
        splits.append(Images(images, labels, PIXELS[recipe.pixels]))
        start += length
    return Data(name, classes, *splits)


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


def train(side, runs_dir, monkeypatch, *changes, data=None, lesson="cifar", model=None, **settings):
    """Train one side on a few images; return the Run. `settings` go to the recipe or the options.

    A learning rate of 0.02 on so few steps: the weights must move far enough to show differences.
    """
    recipe = RECIPES[lesson]
    # Before the lesson imports it, directly or through an earlier lesson.
    data = data or small_data(lesson=lesson)
    monkeypatch.setattr(data_module, "load_data", lambda recipe, options: data)
    module = load_lesson(side, lesson, *changes)
    # Not a divisor of the 130 validation images: averages over batches and samples differ.
    monkeypatch.setattr(data_module, "EVAL_BATCH_SIZE", 50)
    monkeypatch.setattr(figures, "SHOWN", 8)  # the drawing of more takes longer than the training
    settings = {"lr": 0.02, "batch_size": 8, "max_epochs": 2, "weights": "random"} | settings
    recipe = replace(recipe, model=model or NOISY[recipe.data])
    of_recipe = {name: settings.pop(name) for name in list(settings) if hasattr(recipe, name)}
    settings.pop("weights", None)  # only finetune has such a setting
    if lesson == "parallel" and os.environ.get("WORLD_SIZE", "1") == "1":
        be_alone(monkeypatch)
    options = Options(accelerator="cpu", runs_dir=runs_dir, log_every_n_steps=5)
    return module.run(replace(recipe, **of_recipe), replace(options, **settings))
