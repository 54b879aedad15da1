"""What is written of a tensor: a digest of its bits, norms, and a sketch that tells distances."""

import hashlib
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .memory import array, dense, is_plain, memcmp
from .sketch import signs, sketch, sums, table

READ_AS_THEY_ARE = (torch.float32, torch.float64, torch.int64)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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
    values = _values(plain)
    rows = table([plain.to(torch.float64)])
    with np.errstate(all="ignore"):  # a training that diverges is recorded, too
        squares, columns = sums(rows, signs(1, len(rows)))
        return {
            "bits": by_digest(tensor, plain),
            "shape": shape(tensor),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": short(math.sqrt(squares.sum())),
            "sum": short(float(values.sum(dtype=np.float64))),
            "max": short(float(np.abs(values).max(initial=0))),
            "zeros": len(values) - int(np.count_nonzero(values)),
            "sketch": [short(x) for x in sketch(columns)],
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
        return by_digest(tensor, dense(tensor))
    except Exception as error:
        return not_seen(error)


def checksum(tensor: Tensor) -> str:
    """Return a CRC-32 of a tensor: three times as fast as a digest, and enough to say where.

    Two tensors that differ have the same one once in four thousand million times, and never where
    one value of 32 bits differs. What is called equal is so by its digest.
    """
    try:
        return by_checksum(tensor, dense(tensor))
    except Exception as error:
        return not_seen(error)


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same bits."""
    try:
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if is_plain(one) and is_plain(other) and one.is_contiguous() and other.is_contiguous():
            return memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0
        # As integers: what is not a number is not equal to itself, and 0 is equal to -0.
        return np.array_equal(_integers(one), _integers(other))
    except Exception:
        return bits(one) == bits(other)


def _integers(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values in a row, as integers of their size."""
    plain = dense(tensor)
    return array(plain.view(INTEGERS[plain.element_size()]))


def not_seen(error: Exception) -> str:
    return f"?{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


def shape(tensor: Tensor) -> list:
    if tensor.is_nested:
        return [list(part.shape) for part in tensor.unbind()]
    return list(tensor.shape)


def _values(plain: Tensor) -> np.ndarray:
    return array(plain if plain.dtype in READ_AS_THEY_ARE else plain.to(torch.float64))


def _kind(tensor: Tensor) -> str:
    return f"{shape(tensor)} {tensor.dtype}"


def _bytes(plain: Tensor) -> Any:
    """Return a buffer of a tensor's bytes; NumPy has no bfloat16, for example."""
    return array(plain if plain.dtype in READ_AS_THEY_ARE else plain.view(torch.uint8))


def by_digest(tensor: Tensor, plain: Tensor) -> str:
    """Return a digest of a tensor and of its values in a row, as `dense` gives them."""
    digest = hashlib.sha256(_kind(tensor).encode())
    if tensor.is_meta:  # it has no values, so all that it is says its shape
        return digest.hexdigest()[:16]
    digest.update(_bytes(plain))
    return digest.hexdigest()[:16]


def by_checksum(tensor: Tensor, plain: Tensor) -> str:
    """Return a checksum of a tensor and of its values in a row."""
    return f"{zlib.crc32(_bytes(plain), zlib.crc32(_kind(tensor).encode())):08x}"


def is_batch(tensor: Tensor) -> bool:
    """Tell whether a tensor has samples along its first dimension."""
    is_plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    return is_plain and tensor.dim() > 0 and tensor.numel() > 0


def rows(tensor: Tensor) -> list[str]:
    """Return a digest for each sample of a batch, along the first dimension."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if values.is_complex():
        values = torch.view_as_real(values)
    table: Any = array(values.reshape(len(values), -1).view(torch.uint8))
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
