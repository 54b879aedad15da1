"""What differs between tensors of two traces, and by how much; what a cause is.

Imports nothing of the causes, which all import this.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .files import Line

# The largest difference, relative to the tensor, that another order of the same sums makes where
# all before was equal: some units in the last place. 64 of them are 8e-6 in single precision.
UNITS = 64


@dataclass(frozen=True)
class Cause:
    """A cause that fits: what it is, what speaks for it, and the page's section."""

    name: str
    evidence: str
    page: str = ""


@dataclass(frozen=True)
class Found:
    """A difference as the checks return it; see Diagnosis."""

    stage: str
    what: str
    causes: list[Cause]
    others: int = 0
    size: float | None = None
    rounding: bool = False


def bits(tensor: Any) -> str:
    return tensor if isinstance(tensor, str) else str(tensor.get("bits", tensor.get("value", "?")))


def unknown(tensor: Any) -> bool:
    """Tell whether a tensor was not seen: nobody knows whether it is equal to another."""
    return bits(tensor).startswith("?")


def differ(one: Any, other: Any) -> bool:
    """Tell whether two tensors that were seen differ."""
    return not unknown(one) and not unknown(other) and bits(one) != bits(other)


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of those that both have, and that differ."""
    return [name for name in ours if name in theirs and differ(ours[name], theirs[name])]


def stage(
    name: str, ours: Line, theirs: Line, *, find: Callable[[bool], list[Cause]],
    dtypes: Iterable[str] = ("float32",), among: Iterable[str] | None = None,
    before: list[float] | None = None,
) -> Found | None:  # fmt: skip
    """Compare the tensors of a stage by their names.

    `among` are the names that count. The size comes from the fingerprints where both have them,
    else from the sketches of all tensors together. `before` is A's sketch before a step: it makes
    the size that of the change, not of the weights.
    """
    one, other = ours["bits"], theirs["bits"]
    if among is not None:
        wanted = set(among)
        one, other = ({n: b for n, b in side.items() if n in wanted} for side in (one, other))
    names = differing(one, other)
    one_sided = sorted(one.keys() ^ other.keys())
    if one_sided and not names:
        what = f"{one_sided[0]}, which only {'A' if one_sided[0] in one else 'B'} has"
        return Found(name, what, find(False), len(one_sided) - 1)
    if not names:
        return None
    how_far = apart(ours, theirs, names)
    rounding = how_far is not None and all(how_far <= UNITS * eps(dtype) for dtype in dtypes)
    if how_far is not None and before is not None:
        moved = float(np.linalg.norm(np.subtract(ours["sketch"], before)))
        how_far *= ours["norm"] / max(moved, 1e-300)
        rounding = rounding and how_far < 1e-2
    return Found(name, names[0], find(rounding), len(names) - 1, how_far, rounding)


def apart(ours: Line, theirs: Line, names: list[str]) -> float | None:
    """Return the norm of a stage's differences relative to the norm of all its tensors."""
    full, other = ours.get("full", {}), theirs.get("full", {})
    total = max(ours["norm"], 1e-300)
    if all(n in full and n in other for n in names):
        found = [distance(full[n], other[n]) for n in names]
        return None if None in found else math.hypot(*(x or 0.0 for x in found)) / total
    if ours["bits"].keys() != theirs["bits"].keys():
        return None
    return float(np.linalg.norm(np.subtract(ours["sketch"], theirs["sketch"]))) / total


def distance(one: Line, other: Line) -> float | None:
    """Return the norm of the difference of two tensors, estimated by their sketches."""
    if one.get("shape") != other.get("shape") or "sketch" not in one or "sketch" not in other:
        return None
    return float(np.linalg.norm(np.subtract(one["sketch"], other["sketch"])))


def size(one: Line, other: Line) -> float | None:
    """Return the norm of the difference relative to the first tensor's, by their sketches."""
    how_far = distance(one, other)
    return None if how_far is None else how_far / max(one["norm"], 1e-300)


def is_rounding(how_far: float | None, one: Line, other: Line) -> bool:
    """Tell whether a relative difference is as small as another order of the same sums makes it."""
    if how_far is None or one["dtype"] != other["dtype"]:
        return False
    return how_far <= UNITS * eps(one["dtype"])


def eps(dtype: str) -> float:
    """Return the unit in the last place of a type, 0 of whole numbers."""
    kind = getattr(torch, dtype, None)
    if isinstance(kind, torch.dtype) and (kind.is_floating_point or kind.is_complex):
        return torch.finfo(kind).eps
    return 0.0


def named(tensor: Line) -> str:
    shape = "x".join(map(str, tensor.get("shape", []))) or "one number"
    return f"{shape}, {tensor.get('dtype', 'not seen')}"


def common_factor(one: Line, other: Line) -> float | None:
    """Return f where the second tensor is f times the first, by their sketches; else None."""
    if "sketch" not in one or "sketch" not in other or one.get("shape") != other.get("shape"):
        return None
    x, y = np.array(one["sketch"]), np.array(other["sketch"])
    if not x @ x or not y @ y:
        return None
    factor = float(x @ y / (x @ x))
    close = np.abs(y - factor * x).max() <= 1e-5 * np.abs(y).max()
    return factor if close and factor and abs(factor - 1) > 1e-6 else None


def near(number: float, other: float, within: float = 1e-5) -> bool:
    return math.isclose(number, other, rel_tol=within)


def is_power_of_two(number: float) -> bool:
    """Tell whether a number is one by which float16's losses are scaled."""
    return near(math.log2(number), round(math.log2(number)), 1e-6)


def shown(path: str) -> str:
    """Return how a sentence names an output: there may be only one, without a name."""
    return f"output '{path}'" if path else "the output"
