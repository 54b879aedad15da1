"""What is written of a tensor: a digest of its bits, norms, and a sketch that tells distances."""

import functools
import hashlib
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUCKETS, COLUMNS = 16, 1024  # of a sketch, see below
ROWS = 64  # of its table that are made at a time: they stay in the processor's cache
PLAIN = (Tensor, torch.nn.Parameter)
LARGE = 1 << 24  # a sparse tensor of more values is not made dense

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
    sketch = Sketch()
    with np.errstate(all="ignore"):  # a training that diverges is recorded, too
        sketch.add(values)
        return {
            "bits": by_digest(tensor, plain),
            "shape": shape(tensor),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": short(sketch.norms()[0]),
            "sum": short(float(values.sum(dtype=np.float64))),
            "max": short(float(np.abs(values).max(initial=0))),
            "zeros": len(values) - int(np.count_nonzero(values)),
            "sketch": sketch.numbers(),
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


class Stage:
    """The bits and the norm of each of several tensors, and norm and sketch of all.

    `identify` is `by_digest` or `by_checksum`. The sketch is the sum of theirs, so that the order
    of the tensors does not matter. Each tensor is read once, when it is added.
    """

    def __init__(self, identify: Callable[[Tensor, Tensor], str]) -> None:
        self.identify = identify
        self.bits: dict[str, str] = {}
        self.sketch = Sketch()

    def add(self, name: str, tensor: Tensor) -> str:
        """Add a tensor; return its bits."""
        values = np.zeros(0)
        try:
            plain = dense(tensor)
            found = self.identify(tensor, plain)
            values = _values(plain)
        except Exception as error:
            found = not_seen(error)
        with np.errstate(all="ignore"):
            self.sketch.add(values)
        self.bits[name] = found
        return found

    def line(self) -> Line:
        """Return what is written of the stage."""
        with np.errstate(all="ignore"):
            norms = self.sketch.norms() if self.bits else []
            norm = short(math.sqrt(sum(n * n for n in norms)))
            sketch = self.sketch.numbers()
        norms = [float(f"{n:.4g}") for n in norms]
        return {"bits": self.bits, "norm": norm, "sketch": sketch, "norms": norms}


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


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory as NumPy sees it.

    Not by tensor.numpy(): from then on PyTorch would refuse to resize that memory, as FSDP does.
    """
    return np.from_dlpack(tensor)


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


class Sketch:
    """Norms of tensors, and 16 sums of their values with signs: the sum of the tensors' sketches.

    The sign of a value is the product of those of its row and of its column in a table of 1,024
    columns: two values have independent signs, and few numbers make them all. Each tensor begins
    in a row of its own.
    """

    def __init__(self) -> None:
        self.table = np.empty((ROWS, COLUMNS))
        self.signs = np.empty(ROWS)
        self.filled = 0  # rows of the table
        self.columns = np.zeros(COLUMNS)
        self.squares: list[np.ndarray] = []  # of each row, the sum
        self.heights: list[int] = []

    def add(self, values: np.ndarray) -> None:
        """Add a tensor's values [n]."""
        height = max(1, -(-len(values) // COLUMNS))
        signs = _signs(1, height)
        self.heights.append(height)
        row = 0
        while row < height:
            begin, end = self.filled, min(ROWS, self.filled + height - row)
            part = values[row * COLUMNS : (row + end - begin) * COLUMNS]
            place = self.table[begin:end].reshape(-1)
            place[: len(part)] = part
            place[len(part) :] = 0
            self.signs[begin:end] = signs[row : row + end - begin]
            row, self.filled = row + end - begin, end
            if end == ROWS:
                self._empty()

    def _empty(self) -> None:
        """Add up the rows of the table."""
        rows, self.filled = self.table[: self.filled], 0
        self.squares.append(np.einsum("ij,ij->i", rows, rows))
        # By PyTorch, which keeps to the number of threads that it was given.
        signs = torch.from_numpy(self.signs[: len(rows)])
        self.columns += torch.mv(torch.from_numpy(rows).t(), signs).numpy()

    def norms(self) -> list[float]:
        """Return the Euclidean norm of each tensor."""
        self._empty()
        starts = np.cumsum([0, *self.heights])[:-1]
        return np.sqrt(np.add.reduceat(np.concatenate(self.squares), starts)).tolist()

    def numbers(self) -> list[float]:
        """Return the sketch [16]."""
        self._empty()
        sums = (self.columns * _signs(0, COLUMNS)).reshape(-1, BUCKETS).sum(0)
        return [short(x) for x in sums.tolist()]


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
