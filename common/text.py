"""The text that the lesson tokens learns to write, as a stream of batches.

A part of Python's own manual, 200 kB, which ships with the repository (manual.txt, and its licence
beside it): so numbers are the same for everyone. A character is a token.
"""

from common import ROOT
from common.data import processes
from common.messages import BadInput

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

MANUAL = ROOT / "common" / "manual.txt"
SHORTEST, LONGEST = 32, 128  # characters of a piece
MEAN = (SHORTEST + LONGEST) // 2
NOTHING = -100  # the target of padding, which cross_entropy leaves out by default


@dataclass(frozen=True)
class Text:
    """The three parts of a text, int64 [characters], and the alphabet: the number of each letter.

    A number is that letter's place in `letters`.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    letters: str

    def say(self, numbers: Tensor) -> str:
        return "".join(self.letters[number] for number in numbers.tolist())


def load_text(args: Any) -> Text:
    """Return the manual; say what it is, and note it in `args`.

    Raises BadInput where args.data asks for images, or a limit is a share: a stream does not know
    how long it is.
    """
    if args.data not in ("auto", "shapes"):
        raise BadInput(
            f"this lesson learns from a text that is always here, and --data {args.data} asks for "
            "images; leave it out."
        )
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
        limit = getattr(args, name)
        if isinstance(limit, float) and limit != 1.0:
            raise BadInput(
                f"--{name.replace('_', '-')} {limit} is a share, and a stream does not know how "
                "long it is; give it a number of batches."
            )
    text = read_text(MANUAL.read_text(encoding="ascii"))
    args.used_data = "text"
    if processes()[0] == 0:
        print(
            f"Data: Python's manual, {len(text.train):,} characters to train on, {len(text.val):,} "
            f"to validate on, {len(text.test):,} to test on; {len(text.letters)} different ones."
        )
    return text


def read_text(characters: str) -> Text:
    """Split a text: nine tenths to train on, a twentieth to validate on, one to test on."""
    letters = "".join(sorted(set(characters)))
    place = {letter: number for number, letter in enumerate(letters)}
    numbers = torch.tensor([place[letter] for letter in characters])
    train, val = len(numbers) * 18 // 20, len(numbers) * 19 // 20
    return Text(numbers[:train], numbers[train:val], numbers[val:], letters)


class Stream(IterableDataset):
    """Hands out batches of pieces of a text, as dicts, one pass after the other. It has no length.

    A batch is `input` and `target`, int64 [pieces, longest], padded, and `share`: by what a sum
    over its tokens is to be multiplied, so that each token of the whole window counts the same. A
    window are `window` batches that make one optimizer step. The pieces of a pass depend on the
    seed and on the number of the pass alone.
    """

    def __init__(
        self,
        numbers: Tensor,
        batch_size: int,
        seed: int,
        window: int = 1,
        limit: int | float = 1.0,
    ) -> None:
        self.numbers, self.batch_size, self.seed = numbers, batch_size, seed
        self.window, self.limit, self.epoch = window, limit, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def pieces(self) -> Iterator[list[Tensor]]:
        """Yield the pieces of each batch of this pass."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        count = max(1, len(self.numbers) // MEAN)
        longest = min(LONGEST, len(self.numbers) - 1)
        lengths = torch.randint(min(SHORTEST, longest), longest + 1, (count,), generator=generator)
        starts = torch.rand(count, generator=generator).double()
        batches = -(-count // self.batch_size)
        if isinstance(self.limit, int):
            batches = min(batches, self.limit)
        for batch in range(batches):
            chosen = range(count)[batch * self.batch_size : (batch + 1) * self.batch_size]
            found = []
            for piece in chosen:
                length = int(lengths[piece])
                start = int(starts[piece] * (len(self.numbers) - length))
                found.append(self.numbers[start : start + length + 1])
            yield found

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        windows = itertools.batched if hasattr(itertools, "batched") else _batched
        batches = (
            self._padded(pieces, sum(len(p) - 1 for each in window for p in each))
            for window in windows(self.pieces(), self.window)
            for pieces in window
        )
        # Of several processes that load, each makes its share; the loader takes them in turns.
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return itertools.islice(batches, first, None, step)

    def _padded(self, pieces: list[Tensor], tokens: int) -> dict[str, Tensor]:
        longest = max(map(len, pieces)) - 1
        inputs = torch.zeros(len(pieces), longest, dtype=torch.long)
        targets = torch.full((len(pieces), longest), NOTHING)
        for row, piece in enumerate(pieces):
            inputs[row, : len(piece) - 1], targets[row, : len(piece) - 1] = piece[:-1], piece[1:]
        # float64 would make float32 losses of another type.
        return {"input": inputs, "target": targets, "share": torch.tensor(1 / tokens)}


def _batched(values: Iterator[Any], count: int) -> Iterator[tuple]:
    """Do what itertools.batched does from Python 3.12 on."""
    while group := tuple(itertools.islice(values, count)):
        yield group


def make_streams(text: Text, args: Any) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return the loaders of the three parts; those to evaluate on hand out the same each time."""
    window = args.accumulate_grad_batches
    streams = (
        Stream(text.train, args.batch_size, args.seed, window, args.limit_train_batches),
        Stream(text.val, 64, args.seed, 1, args.limit_val_batches),
        Stream(text.test, 64, args.seed, 1, args.limit_test_batches),
    )
    train, val, test = (
        # batch_size None: the stream makes whole batches itself.
        DataLoader(
            stream,
            batch_size=None,
            num_workers=args.num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
        for stream in streams
    )
    return train, val, test
