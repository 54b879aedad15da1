"""The images: found or drawn, split, and handed out as whole normalised batches.

All images of a split are one uint8 tensor, and a batch is cut out of it and normalised in one go.
That takes 1 ms for 128 images; opened one by one through PIL they take 33 ms, longer than the
training step itself.
"""

from common import shapes
from common.messages import BadInput
from common.options import Options, count_batches, is_writable
from common.recipes import Recipe

import math
import os
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms import Normalize

VALIDATION = 5_000  # images taken out of the 50,000 to train on
# Evaluation keeps no gradients, so that large batches fit. The last one is short (5,000 = 9 * 512
# + 392), which is why averages must count samples and not batches.
EVAL_BATCH_SIZE = 512
NETWORK_SECONDS = 8.0  # how long to wait for the server before saying that there is no network

normalize = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """One split: images, uint8 [count, 3, height, width], and labels, int64 [count]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a normalised batch: float32 [batch, 3, height, width] in [-1, 1], int64 [batch].

        Equal to `ToTensor` and `Normalize(0.5)` image by image, bit for bit. That is why it
        divides by 255: torchvision's v2.ToDtype(scale=True) multiplies by 1/255 instead, and that
        rounds some values differently in the last bit.
        """
        return normalize(self.images[indices].float().div_(255)), self.labels[indices]


@dataclass(frozen=True)
class Data:
    """A data set by name, with its class names and its three splits."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images


class EpochSampler(Sampler[int]):
    """Hands out the training samples in an order that depends on the seed and the epoch alone.

    `set_epoch` before each epoch: the Trainer does it by itself, a loop by hand must.

    Why not `shuffle=True` with the loader's own generator, the usual advice: that order depends on
    how often the generator was used before. A `for` loop over the loader uses it once more at the
    end of an epoch than the Trainer does, where the batch size divides the set, and from the
    second epoch on the two train on different batches.

    With several processes, each takes every `world`-th sample, so that their batches of
    `batch_size / world` are together the batch that one process would have had.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.rank, self.world = processes()
        self.handed_out: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.world  # the same for every process, or they wait for each other

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        # Parity compares what was really handed out, by all processes together.
        seen = self.handed_out[self.epoch] = []
        for start in range(0, len(self) * self.world, self.world):
            seen += order[start : start + self.world]
            yield order[start + self.rank]


def processes() -> tuple[int, int]:
    """Return this process's number and how many train together: 0 of 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def train_loader(images: Images, recipe: Recipe, options: Options) -> DataLoader:
    """Return a loader of shuffled batches; its `sampler` is an EpochSampler.

    The recipe's batch size is the global one: each of several processes gets its share of it.
    """
    sampler = EpochSampler(len(images), recipe.seed)
    return _loader(images, recipe.batch_size // sampler.world, sampler, recipe, options)


def eval_loader(images: Images, recipe: Recipe, options: Options) -> DataLoader:
    """Return a loader of unshuffled batches, EVAL_BATCH_SIZE in all; every sample comes once."""
    rank, world = processes()
    sampler = range(rank, len(images), world)
    return _loader(images, EVAL_BATCH_SIZE // world, sampler, recipe, options)


def _loader(
    images: Images,
    batch_size: int,
    sampler: Sampler[int] | range,
    recipe: Recipe,
    options: Options,
) -> DataLoader:
    # A loader without its own generator draws from the global one whenever it is iterated, also
    # with shuffle=False: then validating once more changes the rest of the training.
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=options.num_workers,
        collate_fn=_whole_batch,
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def _whole_batch(batch: Any) -> Any:
    """Leave the batch as `__getitems__` made it; there is nothing left to collate."""
    return batch


def load_data(recipe: Recipe, options: Options) -> Data:
    """Find the images and say which ones they are.

    `options.data` "auto" looks for the real files under `options.data_dir`, then tries to download
    them, then draws shapes; the name of a data set never falls back; "shapes" looks nowhere.

    Raises BadInput where a data file is damaged, the folder is missing or cannot be written to, the
    real data cannot be had and no fall-back was allowed, or a limit leaves no batch.
    """
    assert recipe.data == "cifar10", recipe.data
    data = None
    if options.data != "shapes":
        try:
            data = _real_cifar10(options.data_dir, recipe.seed)
        except Unreachable as reason:
            if options.data == recipe.data:
                raise BadInput(
                    f"CIFAR-10 is not in '{options.data_dir}' and could not be downloaded "
                    f"({reason}); put the folder {CIFAR10.base_folder} there, or use --data shapes."
                ) from None
            _print_notice(options.data_dir, reason)
    if data is None:
        train, test = shapes.draw_shapes(50_000, seed=1), shapes.draw_shapes(10_000, seed=2)
        data = _split("shapes", shapes.CLASSES, Images(*train), Images(*test), recipe.seed)
    _check_limits(data, recipe, options)
    print(
        f"Data: {data.name}, {len(data.train):,} images to train on, {len(data.val):,} to validate "
        f"on, {len(data.test):,} to test on."
    )
    return data


def is_here(folder: Path) -> bool:
    """Tell whether the real images are in a data folder, whole or damaged."""
    return (folder / CIFAR10.base_folder).is_dir()


class Unreachable(Exception):
    """The data could not be downloaded; the text says why."""


def _split(name: str, classes: tuple[str, ...], train: Images, test: Images, seed: int) -> Data:
    """Take the validation images out of the training images, drawn by `seed`."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    val, rest = order[:VALIDATION], order[VALIDATION:]
    return Data(
        name,
        classes,
        train=Images(train.images[rest], train.labels[rest]),
        val=Images(train.images[val], train.labels[val]),
        test=test,
    )


def _real_cifar10(folder: Path, seed: int) -> Data:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--data-dir '{folder}' is a file; name the folder that holds the images.")
    if (folder / CIFAR10.train_list[0][0]).exists():
        raise BadInput(
            f"--data-dir '{folder}' holds the data files themselves; name the folder above it, "
            f"'{folder.absolute().parent}', in which they lie as {CIFAR10.base_folder}."
        )
    if folder != Options.data_dir and not folder.is_dir():
        raise BadInput(
            f"the data folder '{folder}' is not there; create it, or leave out --data-dir and "
            f"DATA_DIR to use '{Options.data_dir}'."
        )
    if not is_here(folder):
        _download_cifar10(folder)
    _check_cifar10(folder / CIFAR10.base_folder)
    parts = [CIFAR10(str(folder), train=train) for train in (True, False)]
    train, test = (
        # From torchvision's [count, 32, 32, 3] to PyTorch's [count, 3, 32, 32].
        Images(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    )
    return _split("cifar10", tuple(parts[0].classes), train, test, seed)


def _check_cifar10(folder: Path) -> None:
    """Raise BadInput with the name of the first file that is missing, cut short or altered."""
    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
        if not check_integrity(str(folder / name), md5):
            raise BadInput(
                f"the data file '{folder / name}' is missing, cut short or altered (its md5 sum is "
                f"not {md5}); remove the folder '{folder}' to have it downloaded again, or use "
                "--data shapes."
            )


def _download_cifar10(folder: Path) -> None:
    """Bring CIFAR-10 into `folder`, whole or not at all.

    Raises Unreachable: within NETWORK_SECONDS where the server does not answer at all.
    """
    if folder.exists() and not is_writable(folder):
        raise BadInput(
            f"CIFAR-10 is not in '{folder}', and nothing can be written there to download it; "
            "choose another --data-dir, or use --data shapes."
        )
    archive = folder / CIFAR10.filename
    if not archive.exists():
        _probe(CIFAR10.url)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        if not archive.exists():
            archive = Path(temporary, CIFAR10.filename)
            socket.setdefaulttimeout(30)  # torchvision sets none: a dead line would hang for ever
            try:
                download_url(CIFAR10.url, temporary, CIFAR10.filename, CIFAR10.tgz_md5)
            except (OSError, RuntimeError) as error:
                raise Unreachable(f"the download broke off: {error}") from None
            finally:
                socket.setdefaulttimeout(None)
        if not check_integrity(str(archive), CIFAR10.tgz_md5):
            raise BadInput(
                f"the data file '{archive}' is cut short or altered (its md5 sum is not "
                f"{CIFAR10.tgz_md5}); remove it to have it downloaded again, or use --data shapes."
            )
        extract_archive(str(archive), temporary)
        os.replace(Path(temporary, CIFAR10.base_folder), folder / CIFAR10.base_folder)


def _probe(url: str) -> None:
    """Raise Unreachable unless the server answers within NETWORK_SECONDS.

    In a thread of its own: no time-out of Python's covers the look-up of the server's name, which
    can hang for minutes where there is no network.
    """
    problem: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
            problem.append("")
        except Exception as error:  # a proxy can raise anything; the thread must say what it was
            problem.append(f"the server was not reached: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    if not problem:
        raise Unreachable(f"the server gave no answer in {NETWORK_SECONDS:.0f} seconds")
    if problem[0]:
        raise Unreachable(problem[0])


def _print_notice(folder: Path, reason: Exception) -> None:
    line = "!" * 88
    print(
        f"{line}\n"
        "  THIS IS NOT CIFAR-10. It was not found, and could not be downloaded, so the built-in\n"
        "  drawn shapes are used instead. The numbers below say nothing about CIFAR-10.\n"
        f"  Looked in: {folder}   Download: {reason}\n"
        f"  To train on the real images, put {CIFAR10.base_folder} into a folder\n"
        "  and name that folder by --data-dir or DATA_DIR.\n"
        f"{line}",
        file=sys.stderr,
        flush=True,
    )


def _check_limits(data: Data, recipe: Recipe, options: Options) -> None:
    """Refuse a share that is smaller than one batch."""
    for stage, images, size, limit in (
        ("train", data.train, recipe.batch_size, options.limit_train_batches),
        ("val", data.val, EVAL_BATCH_SIZE, options.limit_val_batches),
        ("test", data.test, EVAL_BATCH_SIZE, options.limit_test_batches),
    ):
        batches = math.ceil(len(images) / size)
        if count_batches(batches, limit) < 1:
            raise BadInput(
                f"--limit-{stage}-batches {limit} is less than one batch of the {batches} there "
                f"are; use a number of batches, or a larger share."
            )
