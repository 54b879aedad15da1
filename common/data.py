"""The images: found or drawn, split, and handed out as whole normalised batches.

All images of a split are one uint8 tensor, and a batch is cut out of it and normalised in one go.
That takes half a millisecond for 128 images; opened one by one through PIL they take longer than
the training step itself (docs/speed.md).
"""

from common import shapes
from common.download import Contents, Part, Source, Unreachable, read_real, source
from common.download import is_here as is_here
from common.messages import BadInput, notice

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

VALIDATION = 5_000  # images taken out of those to train on
TO_TRAIN_ON = {"cifar10": 50_000, "fashionmnist": 60_000}  # before that; as many shapes stand in
# Evaluation keeps no gradients, so that large batches fit. The last one is short (5,000 = 9 * 512
# + 392), which is why averages must count samples and not batches.
EVAL_BATCH_SIZE = 512
SHARED_MEMORY = Path("/dev/shm")  # through which processes hand over batches; on Linux alone


class Normalize:
    """Takes each channel's mean away and divides by its standard deviation, in place.

    To the same bits as torchvision's, which makes tensors of its numbers and checks them for each
    batch: with four images that takes as long as all else that is done to a batch.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)


# Of CIFAR-10's own training images, whose mean and spread then become 0 and 1.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# What torchvision's pretrained networks were trained with:
# https://docs.pytorch.org/vision/0.29/models.html
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """One split: images, uint8 [count, channels, height, width], and labels, int64 [count].

    The transforms get a whole batch: of images, scaled to [0, 1], and of labels. `split` is train,
    val or test, `name` the data set, `classes` the classes' names.
    """

    images: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    target_transform: Callable[[Tensor], Tensor] | None = None
    split: str = ""
    name: str = ""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: float32 [batch, channels, height, width], and its labels or targets.

        Equal to `ToTensor` and the transform image by image, bit for bit. That is why it divides
        by 255: torchvision's v2.ToDtype(scale=True) multiplies by 1/255 instead, and that rounds
        some values differently in the last bit.
        """
        # index_select copies a whole image at a time, where self.images[indices] copies each byte.
        chosen = torch.tensor(indices)
        images = self.images.index_select(0, chosen).float().div_(255)
        labels = self.labels.index_select(0, chosen)
        return (
            self.transform(images) if self.transform else images,
            self.target_transform(labels) if self.target_transform else labels,
        )


class Data(NamedTuple):
    """The three splits of a data set."""

    train: Images
    val: Images
    test: Images

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


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

    def __init__(self, count: int, seed: int, first: int | None = None) -> None:
        """Shuffle `count` samples; hand out the `first` ones of each epoch's order, else all."""
        self.count, self.seed, self.epoch = count, seed, 0
        self.first = count if first is None else min(first, count)
        self.rank, self.world = processes()
        self.skipped: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, epoch: int, samples: int) -> None:
        """Let that epoch begin after its first samples: a run that was stopped trained on them."""
        # Processes that load ahead fetch the first batches before set_epoch is called.
        self.epoch, self.skipped = epoch, {epoch: samples}

    def __len__(self) -> int:
        return self.first // self.world  # the same for every process, or they wait for each other

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        begin = self.skipped.get(self.epoch, 0)
        yield from order[begin + self.rank : len(self) * self.world : self.world]


def processes() -> tuple[int, int]:
    """Return this process's number and how many train together: 0 of 1 where it is alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    # torchrun tells it before the processes have met: a loader can be made before they do.
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def count_batches(total: int, limit: int | float) -> int:
    """Return how many of `total` batches a limit leaves, by the Trainer's rule.

    A whole number counts batches, a fraction is a share of them, rounded down.
    """
    return min(limit, total) if isinstance(limit, int) else int(limit * total)


def limit_of(args: Any, split: str) -> tuple[str, int | float]:
    """Return what limits a split's batches: an option's name, and its value.

    Two options of the Trainer's go before the usual ones.
    """
    names = ["overfit_batches"] if split in ("train", "val") else []
    for name in (*names, "fast_dev_run"):
        if value := getattr(args, name, 0):
            return name, value
    return f"limit_{split}_batches", getattr(args, f"limit_{split}_batches")


def count_samples(images: Images, args: Any) -> int:
    """Return how many samples of a split its limit, such as args.limit_train_batches, leaves."""
    size = args.batch_size if images.split == "train" else EVAL_BATCH_SIZE
    batches = math.ceil(len(images) / size)
    _, limit = limit_of(args, images.split)
    return min(count_batches(batches, limit) * size, len(images))


def make_loaders(data: Data, args: Any) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return the loaders of the three splits: train, shuffled by an EpochSampler, val and test.

    args.limit_train_batches and its like leave out all batches but the first, here and not in the
    loops: len(loader) is what will be trained on. args.batch_size is that of all processes
    together, each of which gets its share.
    """
    return make_loader(data.train, args), make_loader(data.val, args), make_loader(data.test, args)


def make_loader(images: Images, args: Any) -> DataLoader:
    """Return the loader of one split.

    To evaluate, batches of EVAL_BATCH_SIZE come unshuffled, and every sample once. Several
    processes get as many batches each, since some wait for each other in every batch. Where they
    do not divide the set, some have one sample less; PyTorch's DistributedSampler repeats samples
    instead, which then count twice.
    """
    count, (rank, world) = count_samples(images, args), processes()
    sampler: Sampler[int] | range = range(rank, count, world)
    size = EVAL_BATCH_SIZE // world
    if images.split == "train":
        sampler, size = EpochSampler(len(images), args.seed, count), args.batch_size // world
    else:
        fewest, most = count // world, math.ceil(count / world)
        while math.ceil(fewest / size) != math.ceil(most / size):
            size += 1
    return DataLoader(
        images,
        batch_size=size,
        sampler=sampler,
        num_workers=args.num_workers,
        collate_fn=_whole_batch,
        # A loader without its own generator draws from the global one whenever it is iterated, also
        # with shuffle=False: then validating once more changes the rest of the training.
        generator=torch.Generator().manual_seed(args.seed),
    )


def _whole_batch(batch: Any) -> Any:
    """Leave the batch as `__getitems__` made it; there is nothing left to collate."""
    return batch


def load_images(name: str, args: Any, transform: Callable[[Tensor], Tensor] | None = None) -> Data:
    """Find the images of cifar10 or fashionmnist; say which they are, and note it in `args`.

    args.data "auto" looks for the real files under args.data_dir, then tries to download them, then
    draws shapes; the name of a data set never falls back; "shapes" looks nowhere. `transform` gets
    whole batches, scaled to [0, 1].

    Raises BadInput where a data file is damaged, the folder is missing or cannot be written to, the
    real data cannot be had and no fall-back was allowed, or a limit leaves no batch.
    """
    if args.data not in ("auto", "shapes", name):
        raise BadInput(
            f"this lesson trains on {name}, and --data {args.data} asks for another set; use "
            f"--data {name}, shapes or auto."
        )
    parts = None
    if args.data != "shapes":
        try:
            parts = read_real(name, args.data_dir)
        except Unreachable as reason:
            real = source(name)
            if args.data == name:
                raise BadInput(
                    f"{real.title} is not in '{args.data_dir}' and could not be downloaded "
                    f"({reason}); put the folder {real.folder} there, or use --data shapes."
                ) from None
            _print_notice(real, args.data_dir, reason)
    used = name if parts else "shapes"
    data = _split(used, *(parts or _shapes_like(name)), args.seed, transform)
    _check_limits(data, args)
    args.used_data, args.classes = data.name, data.classes
    if processes()[0] == 0:
        print(
            f"Data: {used}, {len(data.train):,} images to train on, {len(data.val):,} to validate "
            f"on, {len(data.test):,} to test on."
        )
    return data


def _split(
    name: str,
    classes: tuple[str, ...],
    train: Part,
    test: Part,
    seed: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> Data:
    """Take the validation images out of the training images, drawn by the seed."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    val, rest = order[:VALIDATION], order[VALIDATION:]
    parts = {
        "train": (train[0][rest], train[1][rest]),
        "val": (train[0][val], train[1][val]),
        "test": test,
    }
    return Data(
        *(
            Images(*part, transform, split=split, name=name, classes=classes)
            for split, part in parts.items()
        )
    )


def _shapes_like(name: str) -> Contents:
    """Return shapes in the format of a real data set: their classes, to train on, to test on."""
    kind, count = {"cifar10": "coloured", "fashionmnist": "grey"}[name], TO_TRAIN_ON[name]
    return (
        shapes.CLASSES,
        shapes.kept(kind, count, seed=1),
        shapes.kept(kind, 10_000, seed=2),
    )


def _print_notice(real: Source, folder: Path, reason: Exception) -> None:
    notice(
        f"THIS IS NOT {real.title}. It was not found, and could not be downloaded, so the",
        "built-in drawn shapes are used instead. The numbers below say nothing about",
        f"{real.title}.",
        f"Looked in: {folder}   Download: {reason}",
        f"To train on the real images, put {real.folder} into a folder",
        "and name that folder by --data-dir or DATA_DIR.",
    )


def _check_shared_memory(data: Data, args: Any) -> None:
    """Refuse more processes that load images than shared memory has room for.

    Each keeps two batches there for the training process, and the Trainer's do so for training and
    validation at once. Where there is no room, the system kills them, or they wait for ever.
    """
    if not args.num_workers or not SHARED_MEMORY.is_dir():
        return
    one = [sum(part.nbytes for part in images.__getitems__([0])) for images in data]
    train, val, test = (
        (2 * args.num_workers + 1) * each * min(size, len(images))
        for each, size, images in zip(
            one, (args.batch_size, EVAL_BATCH_SIZE, EVAL_BATCH_SIZE), data, strict=True
        )
    )
    needed, room = train + max(val, test), 0
    with contextlib.suppress(OSError):
        room = shutil.disk_usage(SHARED_MEMORY).free
    if needed > room:
        raise BadInput(
            f"--num-workers {args.num_workers} needs {needed / 1e6:,.0f} MB of shared memory, and "
            f"{SHARED_MEMORY} has {room / 1e6:,.0f} MB free; use fewer, or 0, or give it more "
            "(docker run --shm-size=1g)."
        )


def _check_limits(data: Data, args: Any) -> None:
    """Refuse a share that is smaller than one batch, and fewer images than devices."""
    _check_shared_memory(data, args)
    devices = args.devices * getattr(args, "num_nodes", 1)
    for images in data:
        size = args.batch_size if images.split == "train" else EVAL_BATCH_SIZE
        batches = math.ceil(len(images) / size)
        name, limit = limit_of(args, images.split)
        if len(images) < devices:
            raise BadInput(
                f"there are {len(images)} {images.split} images for {devices} devices; use fewer "
                "devices."
            )
        if count_batches(batches, limit) < 1:
            raise BadInput(
                f"--{name.replace('_', '-')} {limit} is less than one batch of the {batches} "
                f"there are; use a number of batches, or a larger share."
            )
    if hasattr(args, "val_check_interval"):
        _check_interval(len(make_loader(data.train, args)), args)
    last = len(data.train) % args.batch_size or args.batch_size
    backbone = getattr(args, "backbone", "vgg16")  # the only one without BatchNorm
    if 1 in (args.batch_size, last) and backbone != "vgg16":
        raise BadInput(
            f"--batch-size {args.batch_size} makes a batch of one image, over which the "
            f"BatchNorm of {backbone} can take no average; choose another size, or vgg16."
        )


def _check_interval(batches: int, args: Any) -> None:
    """Refuse an interval between validations that never comes, and a share of the whole run."""
    interval, n = args.val_check_interval, args.check_val_every_n_epoch
    if n is None and isinstance(interval, float):
        raise BadInput(
            f"--val-check-interval {interval} is a share of an epoch, but with "
            "--check-val-every-n-epoch None batches are counted over the whole run; give it a "
            "whole number of batches."
        )
    if n and isinstance(interval, int) and interval > batches and not args.fast_dev_run:
        raise BadInput(
            f"--val-check-interval {interval} is more than the {batches} batches of an epoch; "
            "use fewer, or count over the whole run with --check-val-every-n-epoch None."
        )
