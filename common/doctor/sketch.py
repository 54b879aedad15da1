"""Sums over tensors' values that tell two tensors apart, and how far apart they are.

The values lie in a table of 1,024 columns: each tensor begins in a row of its own, and zeros fill
its last one. So many small tensors are added up in a few calls.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from .memory import array

COLUMNS = 1024
FLOATS = (torch.float32, torch.float64)
BUCKETS = 16  # numbers of a sketch
ROWS = 256  # that are added up at a time: what is made of them stays in the processor's cache
SMALL, LARGE = 1e-30, 1e30  # squares that single precision still has places for


def height(values: Tensor) -> int:
    """Return how many rows the values [n] of a tensor fill."""
    return max(1, -(-len(values) // COLUMNS))


def table(parts: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Return a table [rows, 1024] of tensors' values [n] of one type; in `out`, where it fits."""
    rows = sum(map(height, parts))
    kind = parts[0].dtype
    if out is None or len(out) != rows or out.dtype != kind:
        out = torch.empty(rows, COLUMNS, dtype=kind, device="cpu")
    padded = [
        x for part in parts for x in (part, _zeros(kind)[: height(part) * COLUMNS - len(part)])
    ]
    torch.cat(padded, out=out.view(-1))
    return out


def hashes(values: Tensor) -> np.ndarray:
    """Return a hash of 64 bits of each row of a table.

    It is multilinear: the sum of words of 64 bits, each times a random key, modulo 2 ** 64 (Lemire
    and Kaser 2014, https://arxiv.org/abs/1202.4961). Before, the upper bits of a word are laid over
    its lower ones: of two words whose highest bit alone differs, as that of a sign, the products
    would differ by 2 ** 63 whatever the key is, and two such differences would cancel out. Not by
    32 places: then the signs of the two numbers in a word would meet.
    """
    found = np.empty(len(values), np.uint64)
    for begin in range(0, len(values), ROWS):
        words = array(values[begin : begin + ROWS].view(torch.int64)).view(np.uint64)
        folded = words >> np.uint64(29)
        folded ^= words
        np.matmul(folded, keys(0, words.shape[1]), out=found[begin : begin + ROWS])
    return found


def sums(values: Tensor, signs: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return the sum of the squares of each row of a table, and the signed sum of each column.

    Single precision stays single: in double precision it would take three times as long.
    """
    squares = np.empty(len(values))
    columns = torch.zeros(COLUMNS, dtype=torch.float64, device="cpu")
    for begin in range(0, len(values), ROWS):
        part, end = values[begin : begin + ROWS], begin + ROWS
        part = part if part.dtype in FLOATS else part.to(torch.float64)
        numbers = array(part)
        squares[begin:end] = np.einsum("ij,ij->i", numbers, numbers)
        # By PyTorch, which keeps to the number of threads that it was given.
        columns += torch.mv(part.t(), signs[begin:end].to(part.dtype))
    outside = np.flatnonzero(~((squares > SMALL) & (squares < LARGE)))
    if len(outside):
        exact = array(values[torch.from_numpy(outside)].to(torch.float64))
        squares[outside] = np.einsum("ij,ij->i", exact, exact)
    return squares, columns


def sketch(columns: Tensor) -> list[float]:
    """Return the sketch [16] of a table, from the signed sums of its columns."""
    return (columns * signs(2, COLUMNS)).reshape(-1, BUCKETS).sum(0).tolist()


def keys(seed: int, count: int) -> np.ndarray:
    """Return the first `count` of random numbers of 64 bits, the same ones each time."""
    return _keys(seed, 1 << max(count - 1, 0).bit_length())[:count]


@functools.lru_cache(64)
def _keys(seed: int, count: int) -> np.ndarray:
    # From a generator of their own, so that the training draws its own.
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64) | np.uint64(1)


def signs(seed: int, count: int) -> Tensor:
    """Return the first `count` of random signs."""
    return torch.from_numpy((keys(seed, count) >> np.uint64(63)) * 2.0 - 1)


@functools.lru_cache(16)
def _zeros(kind: torch.dtype) -> Tensor:
    return torch.zeros(COLUMNS, dtype=kind, device="cpu")
