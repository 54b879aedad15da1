"""What differs between tensors of two traces, and by how much; what a cause is.

Imports nothing of the causes, which all import this.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    """A difference as the checks below return it; see Diagnosis."""

    stage: str
    what: str
    causes: list[Cause]
    others: int = 0
    size: float | None = None
    rounding: bool = False


def tensors(
    stage: str, ours: Line, theirs: Line, find: Callable[[bool], list[Cause]],
    before: Line | None = None,
) -> Found | None:  # fmt: skip
    """Compare tensors by name; `before`, A's, makes the size that of the change, not of them."""
    if ours.keys() != theirs.keys():
        one_sided = sorted(ours.keys() ^ theirs.keys())
        what = f"{one_sided[0]}, which only {'A' if one_sided[0] in ours else 'B'} has"
        return Found(stage, what, find(False), len(one_sided) - 1)
    names = [name for name in ours if differ(ours[name], theirs[name])]
    if not names:
        return None
    pairs = [(ours[name], theirs[name]) for name in names]
    # All together: a gradient that is 0 but for rounding, as of a bias before BatchNorm, differs
    # by as much as it has.
    apart = math.hypot(*(_apart(*pair) for pair in pairs))
    how_far = apart / max(total(ours), 1e-300)
    rounding = all(is_rounding(how_far, *pair) for pair in pairs)
    if before and before.keys() == ours.keys():
        how_far = apart / max(math.hypot(*(_apart(before[n], ours[n]) for n in ours)), 1e-300)
        rounding = rounding and how_far < 1e-2
    return Found(stage, names[0], find(rounding), len(names) - 1, how_far, rounding)


def differ(one: Line, other: Line) -> bool:
    return any(one.get(key) != other.get(key) for key in ("bits", "shape", "dtype"))


def size(one: Line, other: Line) -> float | None:
    """Return the norm of the difference relative to the first tensor's, by their sketches."""
    if not one or not other or one["shape"] != other["shape"]:
        return None
    return _apart(one, other) / max(one["norm"], 1e-300)


def _apart(one: Line, other: Line) -> float:
    """Return the norm of the difference of two tensors, estimated by their sketches."""
    if one["shape"] != other["shape"]:
        return math.inf
    return float(np.linalg.norm(np.subtract(one["sketch"], other["sketch"])))


def is_rounding(how_far: float | None, one: Line, other: Line) -> bool:
    """Tell whether a relative difference is as small as another order of the same sums makes it."""
    if how_far is None or one["dtype"] != other["dtype"]:
        return False
    dtype = getattr(torch, one["dtype"])
    return dtype.is_floating_point and how_far <= UNITS * torch.finfo(dtype).eps


def total(tensors: Line) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(t["norm"] ** 2 for t in tensors.values()))


def named(tensor: Line) -> str:
    return f"{'x'.join(map(str, tensor['shape']))}, {tensor['dtype']}"


def common_factor(one: Line, other: Line) -> float | None:
    """Return f where the second tensor is f times the first, by their sketches; else None."""
    if one["shape"] != other["shape"] or not one["norm"] or not other["norm"]:
        return None
    x, y = np.array(one["sketch"]), np.array(other["sketch"])
    if not x @ x:
        return None
    factor = float(x @ y / (x @ x))
    close = np.abs(y - factor * x).max() <= 1e-5 * np.abs(y).max()
    return factor if close and factor and abs(factor - 1) > 1e-6 else None


def near(number: float, other: float) -> bool:
    return math.isclose(number, other, rel_tol=1e-4)
