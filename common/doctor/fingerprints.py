"""What is written of a tensor: a digest of its bits, norms, and a sketch that tells distances."""

import functools
import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUCKETS, COLUMNS = 16, 1024  # of a sketch, see below
PLAIN = (Tensor, torch.nn.Parameter)
LARGE = 1 << 24  # a sparse tensor of more values is not made dense

Line = dict[str, Any]


def fingerprint(tensor: Tensor) -> Line:
    """Return what identifies a tensor and what tells how far two of them are apart.

    `bits` is a digest of its shape, type and bytes: equal bits, equal tensors. `norm` is the
    Euclidean norm, `sum` the sum, `max` the largest magnitude, `zeros` how many values are 0.
    `sketch` are 16 sums of the values with random signs, the same for all tensors of that size; the
    norm of the difference of two sketches is, but for a third of it, that of the tensors'
    difference (a count sketch: Charikar, Chen and Farach-Colton 2002,
    https://doi.org/10.1007/3-540-45465-9_59). Of a complex number both parts count.

    Raises what PyTorch raises where a tensor has no values that can be read, as one on `meta`.
    """
    plain = dense(tensor)
    values = _values(plain).astype(np.float64)
    with np.errstate(all="ignore"):  # a training that diverges is recorded, too
        return {
            "bits": _digest(tensor, plain),
            "shape": shape(tensor),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": short(math.sqrt(float(np.einsum("i,i->", values, values)))),
            "sum": short(float(values.sum())),
            "max": short(float(np.abs(values).max(initial=0))),
            "zeros": len(values) - int(np.count_nonzero(values)),
            "sketch": _sketch([values])[0],
        }


def seen(tensor: Tensor) -> Line:
    """Return the fingerprint, or why there is none."""
    try:
        return fingerprint(tensor)
    except Exception as error:
        return {"bits": not_seen(error)}


def bits(tensor: Tensor) -> str:
    """Return the digest of a tensor, or '?' and why it could not be read."""
    try:
        return _digest(tensor, dense(tensor))
    except Exception as error:
        return not_seen(error)


def not_seen(error: Exception) -> str:
    return f"?{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


def together(tensors: dict[str, Tensor]) -> Line:
    """Return the digest and the norm of each of several tensors, and norm and sketch of all.

    The sketch is the sum of theirs, so that the order of the tensors does not matter.
    """
    digests: dict[str, str] = {}
    values = []
    for name, tensor in tensors.items():
        try:
            plain = dense(tensor)
            digests[name] = _digest(tensor, plain)
            values.append(_values(plain))
        except Exception as error:
            digests[name] = not_seen(error)
            values.append(np.zeros(0))
    with np.errstate(all="ignore"):
        sketch, norms = _sketch(values)
        norm = short(math.sqrt(sum(n * n for n in norms)))
    norms = [float(f"{n:.4g}") for n in norms]
    return {"bits": digests, "norm": norm, "sketch": sketch, "norms": norms}


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU with all values in a row, as numbers that NumPy can read."""
    if (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_complex()
        and not tensor.is_nested
    ):
        return tensor.detach().reshape(-1)  # as nearly all are
    tensor = tensor.detach()
    if tensor.is_meta:
        return torch.zeros(0)
    if hasattr(tensor, "to_local"):  # spread over processes: this one's part
        tensor = tensor.to_local()
    if tensor.is_nested:
        tensor = torch.cat([part.flatten() for part in tensor.unbind()])
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.numel() > LARGE else tensor.to_dense()
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def shape(tensor: Tensor) -> list:
    if tensor.is_nested:
        return [list(part.shape) for part in tensor.unbind()]
    return list(tensor.shape)


def _values(plain: Tensor) -> np.ndarray:
    if plain.dtype in (torch.float32, torch.float64, torch.int64):
        return plain.numpy()
    return plain.to(torch.float64).numpy()


def _digest(tensor: Tensor, plain: Tensor) -> str:
    digest = hashlib.sha256(f"{shape(tensor)} {tensor.dtype}".encode())
    if tensor.is_meta:  # it has no values, so all that it is says its shape
        return digest.hexdigest()[:16]
    content: Any = plain.view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()[:16]


def _sketch(tensors: list[np.ndarray]) -> tuple[list[float], list[float]]:
    """Add up the values with signs, in 16 buckets [16]; and the norm of each tensor.

    The sign of a value is the product of those of its row and of its column in a table of 1,024
    columns: two values have independent signs, and few numbers make them all. All tensors lie in
    one table, each from a row of its own on.
    """
    heights = [max(1, -(-len(values) // COLUMNS)) for values in tensors]
    table = np.empty((sum(heights), COLUMNS))
    starts = np.cumsum([0, *heights])[:-1]
    for values, start, height in zip(tensors, starts, heights, strict=True):
        place = table[start : start + height].reshape(-1)
        place[: len(values)] = values
        place[len(values) :] = 0
    if not tensors:
        return [0.0] * BUCKETS, []
    rows = np.concatenate([_signs(1, height) for height in heights])
    # By PyTorch, which keeps to the number of threads that it was given.
    columns = torch.mv(torch.from_numpy(table).t(), torch.from_numpy(rows)).numpy()
    sums = (columns * _signs(0, COLUMNS)).reshape(-1, BUCKETS).sum(0)
    squares = np.add.reduceat(np.einsum("ij,ij->i", table, table), starts)
    return [short(x) for x in sums.tolist()], np.sqrt(squares).tolist()


@functools.lru_cache(256)
def _signs(seed: int, count: int) -> np.ndarray:
    """Return `count` signs; from a generator of their own, so that the training draws its own."""
    return np.random.default_rng(seed).integers(0, 2, count) * 2.0 - 1


def is_batch(tensor: Tensor) -> bool:
    """Tell whether a tensor has samples along its first dimension."""
    is_plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    return is_plain and tensor.dim() > 0 and tensor.numel() > 0


def rows(tensor: Tensor) -> list[str]:
    """Return a digest for each sample of a batch, along the first dimension."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if values.is_complex():
        values = torch.view_as_real(values)
    table: Any = values.reshape(len(values), -1).view(torch.uint8).numpy()
    return [hashlib.sha256(row).hexdigest()[:8] for row in table]


def excerpt(tensor: Tensor, limit: int) -> Line:
    """Return values [rows, columns] of a tensor, all or the first rows, at most `limit` of them.

    A row is what the last dimension holds; of a tensor with one dimension a row has one value. Of
    rows that are longer than the limit, values that are evenly spaced are taken.
    """
    values = tensor.detach()
    is_plain = values.layout is torch.strided and not values.is_nested and not values.is_complex()
    if not is_plain or values.dim() == 0 or not values.numel():
        return {"rows": [], "of": 0}
    values = values.cpu()
    table = values.reshape(-1, values.shape[-1] if values.dim() > 1 else 1)
    count = max(1, limit // table.shape[1])
    part = table[:count]
    if part.shape[1] > limit:
        part = part[:, torch.linspace(0, part.shape[1] - 1, limit).long()]
    numbers = [[float(f"{x:.9g}") for x in row] for row in part.double().tolist()]
    return {"rows": numbers, "of": len(table)}


def digest(content: bytes, size: int = 8) -> str:
    return hashlib.sha256(content).hexdigest()[: 2 * size]


def short(number: float) -> float:
    """Return a number with 10 digits: enough for its size; the bits tell what is equal."""
    return float(f"{number:.10g}")
