"""Copies of many tensors that are made, hashed and added up together.

A network has hundreds of small tensors. To look at each by itself would take longer than to train
them.
"""

import functools
import math
import zlib
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from .fingerprints import Line, not_seen, shape, short
from .memory import dense, is_plain, memcmp
from .sketch import hashes, height, keys, signs, sketch, sums, table


class Snapshot:
    """The values of tensors as they were, in one table for each type of number.

    The hash of a tensor has 48 bits, of its bytes, shape and type. Two tensors that differ have the
    same one once in four thousand million times, or less often.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, tuple] = {}  # shape and type of each tensor, and how many values
        self.unseen: dict[str, str] = {}  # why a tensor could not be read
        self.tables: dict[torch.dtype, Tensor] = {}
        self.places: dict[torch.dtype, dict[str, slice]] = {}  # the rows of each tensor

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors, in the place of those before."""
        self.kinds, self.unseen, self.places = {}, {}, {}
        parts: dict[torch.dtype, list[Tensor]] = {}
        # What is made within inference_mode could not be written to again after it.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in tensors.items():
                values, kind = _read(tensor)
                if values is None:
                    self.unseen[name] = kind[0]
                    continue
                self.kinds[name] = kind
                own = parts.setdefault(values.dtype, [])
                places = self.places.setdefault(values.dtype, {})
                first = next(reversed(places.values())).stop if own else 0
                places[name] = slice(first, first + height(values))
                own.append(values)
            self.tables = {k: table(own, self.tables.get(k)) for k, own in parts.items()}

    def changed(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return the names of those that are not the same, bit for bit, as the copies."""
        return [name for name, tensor in tensors.items() if not self._is_same(name, tensor)]

    def _is_same(self, name: str, tensor: Tensor) -> bool:
        values, kind = _read(tensor)
        if values is None:
            return self.unseen.get(name) == kind[0]
        if self.kinds.get(name) != kind:
            return False
        copies = self.tables[values.dtype]
        place = copies.data_ptr() + self.places[values.dtype][name].start * copies[0].nbytes
        return memcmp(values.data_ptr(), place, values.nbytes) == 0

    def slots(self) -> dict[str, Tensor]:
        """Return the copies, to be written to: then nothing has to be taken."""
        found = {}
        for dtype, places in self.places.items():
            for name, rows in places.items():
                what, own, count = self.kinds[name]
                if own == dtype and isinstance(what, torch.Size):  # it is copied as it is
                    found[name] = self.tables[dtype][rows].view(-1)[:count].view(what)
        return found

    def bits(self) -> dict[str, str]:
        """Return the hash of each tensor."""
        found = dict(self.unseen)
        for kind, values in self.tables.items():
            first, within = self._rows(kind)
            numbers = hashes(values) * keys(3, int(within.max()) + 1)[within]
            numbers = np.add.reduceat(numbers, first)
            numbers += np.array([_mark(self.kinds[n]) for n in self.places[kind]], np.uint64)
            numbers >>= np.uint64(16)
            for name, number in zip(self.places[kind], numbers.tolist(), strict=True):
                found[name] = f"{number:012x}"
        return {name: found[name] for name in (*self.kinds, *self.unseen)}

    def line(self, among: Collection[str] | None = None) -> Line:
        """Return what is written of a stage: all hashes; norms and sketch of those in `among`.

        A sketch is the sum of those of the tensors, so that their order does not matter.
        """
        norms = dict.fromkeys(self.unseen, 0.0)
        columns = torch.zeros(1)
        for kind, values in self.tables.items():
            places = self.places[kind]
            first, within = self._rows(kind)
            row_signs = signs(1, int(within.max()) + 1)[torch.from_numpy(within)]
            for name, rows in places.items():
                if among is not None and name not in among:
                    row_signs[rows] = 0
            with np.errstate(all="ignore"):  # a training that diverges is recorded, too
                squares, own = sums(values, row_signs)
                squares = np.sqrt(np.add.reduceat(squares, first))
            columns = columns + own
            norms |= zip(places, squares.tolist(), strict=True)
        wanted = [norms[n] for n in (*self.kinds, *self.unseen) if among is None or n in among]
        return {
            "bits": self.bits(),
            "norm": short(math.hypot(*wanted)),
            "sketch": [short(x) for x in sketch(columns)],
            "norms": [float(f"{n:.4g}") for n in wanted],
        }

    def _rows(self, kind: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row of each tensor, and of each row which one of its tensor it is."""
        first = np.array([rows.start for rows in self.places[kind].values()])
        count = len(self.tables[kind])
        return first, np.arange(count) - np.repeat(first, np.diff(first, append=count))


def _read(tensor: Tensor) -> tuple[Tensor | None, tuple]:
    """Return a tensor's values [n], and its kind; None and the reason where it has none."""
    try:
        values = dense(tensor)
        what = tensor.shape if is_plain(tensor) else str(shape(tensor))
        return values, (what, tensor.dtype, len(values))
    except Exception as error:
        return None, (not_seen(error),)


@functools.lru_cache(4096)
def _mark(kind: tuple) -> int:
    """Return a number for a kind of tensor, which becomes a part of its hash."""
    what, dtype, count = kind
    return zlib.crc32(f"{what} {dtype} {count}".encode()) << 32
