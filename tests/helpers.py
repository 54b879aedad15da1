"""What the tests share: loading a lesson, changed or not, and training it on a few images."""

from common import ROOT, SIDES, THIRD, resume, small
from common.data import Data, Images
from common.download import is_here, read_real
from common.proof import watch
from common.proof.lessons import load as load_lesson
from common.small import (  # noqa: F401
    ALONE,
    NOISY,
    OWN_NETWORK,
    GreyNoisy,
    Noisy,
    arguments,
    data_of,
    free_port,
    network_of,
    small_text,
    split,
)

import functools
import os
from pathlib import Path

import pytest
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
    if not (folder := real_data(name)):
        return small.drawn(name, 2000)
    classes, _, test = read_real(name, folder)
    return Images(test[0][:2000], test[1][:2000], name=name, classes=tuple(classes))


def small_data(train: int = 120, val: int = 130, test: int = 140, lesson: str = "cifar") -> Data:
    return split(some_images(data_of(lesson)), lesson, (train, val, test))


def train(
    side, runs_dir, monkeypatch, *changes, images=None, lesson="cifar", model=None, **settings
):
    """Train one side on a few images; return what result.json holds.

    `images` are a Data in place of the few; `model` is a class in place of the lesson's network;
    `changes` are made to the lesson's text; `settings` go to its Args.
    """
    few = images or (small_text() if lesson == "tokens" else small_data(lesson=lesson))
    module = load_lesson(side, lesson, *changes)
    network = model or network_of(lesson)
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


def give(module, images, model, lesson, monkeypatch):
    """Let a loaded lesson find these images and this network; in a process that is alone."""
    small.give(module, images, model, lesson, monkeypatch.setattr)
    if small.is_to_be_alone(lesson):
        be_alone(monkeypatch)


def be_alone(monkeypatch):
    small.be_alone(monkeypatch.setenv)
