"""What the tests share: loading a lesson, changed or not, and training it on a few images."""

from common import ROOT, SIDES
from common import data as data_module
from common.data import Data, Images
from common.options import Options
from common.recipes import RECIPES
from common.shapes import CLASSES, draw_shapes

import functools
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

# What the tests compared, printed at the end of the session by conftest.py.
COMPARED: dict[str, int] = {}


def count(what: str, how_many: int = 1) -> None:
    COMPARED[what] = COMPARED.get(what, 0) + how_many


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


def real_data() -> Path | None:
    """The folder with the real CIFAR-10, where DATA_DIR names one."""
    folder = os.environ.get("DATA_DIR")
    return Path(folder) if folder and data_module.is_here(Path(folder)) else None


@functools.cache
def some_images() -> tuple[str, tuple[str, ...], Images]:
    """2,000 images: real ones where DATA_DIR has them, else shapes."""
    if folder := real_data():
        test = data_module.CIFAR10(str(folder), train=False)
        images = torch.from_numpy(test.data[:2000]).permute(0, 3, 1, 2).contiguous()
        return "cifar10", tuple(test.classes), Images(images, torch.tensor(test.targets[:2000]))
    return "shapes", CLASSES, Images(*draw_shapes(2000, seed=3))


def small_data(train: int = 120, val: int = 130, test: int = 140) -> Data:
    name, classes, all_images = some_images()
    splits, start = [], 0
    for length in (train, val, test):
        part = slice(start, start + length)
        splits.append(Images(all_images.images[part], all_images.labels[part]))
        start += length
    return Data(name, classes, *splits)


class Noisy(nn.Module):
    """A small network that shows whether it trains or evaluates: BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(400, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def train(side, runs_dir, monkeypatch, *changes, data=None, lesson="cifar", model=None, **settings):
    """Train one side on a few images; return the Run. `settings` go to the recipe or the options.

    A learning rate of 0.02 on so few steps: the weights must move far enough to show differences.
    """
    module = load_lesson(side, lesson, *changes)
    # Not a divisor of the 130 validation images: averages over batches and samples differ.
    monkeypatch.setattr(data_module, "EVAL_BATCH_SIZE", 50)
    monkeypatch.setattr(module, "load_data", lambda recipe, options: data or small_data())
    recipe = replace(RECIPES[lesson], **{"lr": 0.02, "batch_size": 8, "model": model or Noisy})
    of_recipe = {name: settings.pop(name) for name in list(settings) if hasattr(recipe, name)}
    options = Options(accelerator="cpu", runs_dir=runs_dir, log_every_n_steps=5)
    return module.run(replace(recipe, **of_recipe), replace(options, **settings))
