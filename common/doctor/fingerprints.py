"""What is written of a tensor, and of its samples: digests, norms and sketches."""

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUCKETS, COLUMNS = 16, 1024  # of a sketch, see below

EXCERPT = 48  # values of the first sample that are written out


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Return what identifies a tensor and what tells how far two of them are apart.

    `bits` is a digest of its bytes: equal bits, equal tensors. `norm` is the Euclidean norm, `sum`
    the sum, `max` the largest magnitude, `zeros` how many values are 0. `sketch` are 16 sums of
    the values with random signs, the same for all tensors of that size; the norm of the difference
    of two sketches is, but for a third of it, that of the tensors' difference (a count sketch:
    Charikar, Chen and Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59).
    """
    tensor = tensor.detach()
    values = tensor.to("cpu", torch.float64).flatten().numpy()
    with np.errstate(all="ignore"):  # a training that diverges is recorded, too
        return {
            "bits": digest(raw_bytes(tensor)),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": _short(float(np.linalg.norm(values))),
            "sum": _short(float(values.sum())),
            "max": _short(float(np.abs(values).max(initial=0))),
            "zeros": len(values) - int(np.count_nonzero(values)),
            "sketch": [_short(x) for x in _sketch(values).tolist()],
        }


def _sketch(values: np.ndarray) -> np.ndarray:
    """Add up the values with signs, in 16 buckets [16].

    The sign of a value is the product of those of its row and of its column in a table of 1,024
    columns: two values have independent signs, and few numbers make them all.
    """
    rows = -(-len(values) // COLUMNS)
    if len(values) < COLUMNS:
        signed = values * _signs(0, COLUMNS)[: len(values)]
    else:
        table = np.zeros(rows * COLUMNS)
        table[: len(values)] = values
        signed = _signs(1, rows) @ table.reshape(rows, COLUMNS) * _signs(0, COLUMNS)
    padded = np.zeros(COLUMNS)
    padded[: len(signed)] = signed
    return padded.reshape(-1, BUCKETS).sum(0)


@functools.cache
def _signs(seed: int, count: int) -> np.ndarray:
    """Return `count` signs; from a generator of their own, so that the training draws its own."""
    return np.random.default_rng(seed).integers(0, 2, count) * 2.0 - 1


def between(
    fresh: dict[str, Tensor], used: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, Any]:
    """Say what became of the gradients between the backward passes and the step.

    `same` tells whether they are those that the backward passes gave. If not, `cosine` is that of
    the angle between both (1: only their length changed) and `ratio` of their lengths; and
    `left_over` the cosine between what was added and the gradients of the step before.
    """
    names = [name for name in used if name in fresh]
    if not names or all(torch.equal(used[name], fresh[name]) for name in names):
        return {"same": True}
    ours, theirs = _flat(used, names), _flat(fresh, names)
    said = {"same": False, "cosine": _cosine(ours, theirs)}
    said["ratio"] = _short(float(ours.norm() / theirs.norm()))
    if all(name in before for name in names):
        said["left_over"] = _cosine(ours - theirs, _flat(before, names))
    return said


def _flat(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].to("cpu", torch.float64).flatten() for name in names])


def _cosine(a: Tensor, b: Tensor) -> float:
    return _short(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300)))


def rows(tensors: list[Tensor]) -> list[str]:
    """Return a digest for each sample of a batch, the first dimension of the first tensor."""
    if not tensors or tensors[0].dim() == 0:
        return []
    return [digest(raw_bytes(row), 4) for row in tensors[0].detach().cpu()]


def excerpt(tensors: list[Tensor]) -> list[float]:
    """Return some values of the first sample [48], evenly spaced; all where there are fewer."""
    if not tensors or tensors[0].dim() == 0 or not len(tensors[0]):
        return []
    values = tensors[0][0].detach().flatten()
    places = torch.linspace(0, len(values) - 1, min(EXCERPT, len(values))).long()
    return [_short(x) for x in values[places.to(values.device)].double().tolist()]


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(content: bytes, size: int = 8) -> str:
    return hashlib.sha256(content).hexdigest()[: 2 * size]


def _short(number: float) -> float:
    """Return a number with 10 digits: enough for its size; the bits tell what is equal."""
    return float(f"{number:.10g}")
