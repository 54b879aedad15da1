"""Finds the lessons, and loads one without running it."""

from common import ROOT, script_of
from common.networks import NETWORKS

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def lessons() -> list[str]:
    """Return the names of all lessons, in the order in which they are learned."""
    return list(dict.fromkeys(network.lesson for network in NETWORKS))


def load(side: str, name: str, *changes: tuple[str, str]) -> ModuleType:
    """Import SIDE/NAME.py as a module of its own, after replacing each old text by a new one.

    Both sides have modules of the same names: while one is loaded, its folder is first on the
    path, as when Python runs the script, and its siblings are forgotten afterwards. Raises
    ValueError where an old text does not stand there just once.
    """
    path = script_of(side, name)
    source = path.read_text(encoding="utf-8")
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{path} has {source.count(old)} times: {old}")
        source = source.replace(old, new)
    return as_module(source, path, side, name)


def as_module(source: str, path: Path, side: str, name: str, **given: Any) -> ModuleType:
    """Run a text, of the file `path`, as the module of a lesson's side; it finds `given`."""
    module = ModuleType(f"{side}_{name}")
    module.__file__ = str(path)
    module.__dict__.update(given)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    with on_the_path(script_of(side, name).parent.name):
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def on_the_path(side: str) -> Iterator[None]:
    """Let `from cifar import ...` find the file of this side, and forget it afterwards."""
    folder = ROOT / side
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for sibling in folder.glob("*.py"):
            sys.modules.pop(sibling.stem, None)
