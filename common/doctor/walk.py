"""Find the tensors in what a module gets and gives: arguments by their names, outputs by a path."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEEPEST, MOST = 8, 1000  # how deep, and how many leaves


class Unseen:
    """A value that may hold tensors, but nobody knows how to look into it."""

    def __init__(self, value: Any) -> None:
        self.why = f"?{type(value).__name__}"


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return tensors, numbers, texts and what could not be looked into, by their path.

    The path of a tensor alone is ''; 'logits' is a key or field of that name, '1.0' the first of
    the second. None is nothing: an argument that is None is one that is not given.
    """
    found: dict[str, Any] = {}
    for name, leaf in _walk(value, path, ()):
        found[name] = leaf
        if len(found) >= MOST:
            break
    return found


def _walk(value: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if value is None or isinstance(value, type | nn.Module) or id(value) in above:
        return
    if isinstance(value, Tensor | bool | int | float | complex | str):
        yield path, value
        return
    if isinstance(value, np.ndarray | np.generic):
        is_number = value.dtype.kind in "bifc"
        yield path, torch.as_tensor(value) if is_number else Unseen(value)
        return
    parts = _parts(value)
    if parts is None or len(above) >= DEEPEST:
        if not callable(value):
            yield path, Unseen(value)
        return
    for name, part in parts:
        yield from _walk(part, f"{path}.{name}" if path else str(name), (*above, id(value)))


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of a container with their names, None where it is none."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name, None))
                for field in dataclasses.fields(value)]  # fmt: skip
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    parts = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    parts |= getattr(value, "__dict__", {})
    return [(name, part) for name, part in parts.items() if not callable(part)] or None


def positional(module: nn.Module, args: tuple) -> dict[str, Any]:
    """Return positional arguments of a forward pass by the names that `forward` gives them."""
    named: dict[str, Any] = {}
    names = _names(type(module).forward)
    for number, value in enumerate(args):
        named[names[number] if number < len(names) else str(number)] = value
    return named


@functools.lru_cache(1024)
def _names(forward: Any) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)
