"""The images: found or drawn, split, and handed out as whole normalised batches.

All images of a split are one uint8 tensor, and a batch is cut out of it and normalised in one go.
That takes half a millisecond for 128 images; opened one by one through PIL they take longer than
the training step itself (docs/speed.md).
"""

from common import shapes
from common.download import Source, Unreachable, read_real, source
from common.download import is_here as is_here
from common.messages import BadInput, notice
from common.options import Options, count_batches
from common.recipes import Recipe

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

VALIDATION = 5_000  # images taken out of those to train on
# Evaluation keeps no gradients, so that large batches fit. The last one is short (5,000 = 9 * 512
# + 392), which is why averages must count samples and not batches.
EVAL_BATCH_SIZE = 512


class Normalize:
    """Takes each channel's mean away and divides by its standard deviation, in place.

    To the same bits as torchvision's, which makes tensors of its numbers and checks them for each
    batch: with four images that takes as long as all else that is done to a batch.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)


# What a recipe's `pixels` stands for: applied to batches that are scaled to [0, 1].
PIXELS = {
    "unit": None,
    "signed": Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),  # to [-1, 1]
    # Mean and spread of CIFAR-10's own training images become 0 and 1.
    "standard": Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    # What torchvision's pretrained networks were trained with:
    # https://docs.pytorch.org/vision/0.29/models.html
    "imagenet": Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """One split: images, uint8 [count, channels, height, width], and labels, int64 [count].

    The transforms get a whole batch: of images, scaled to [0, 1], and of labels.
    """

    images: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    target_transform: Callable[[Tensor], Tensor] | None = None

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
        self.done: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def carry_on(self, done: dict[int, list[int]]) -> None:
        """Leave out, in each epoch, the samples that an earlier process trained on.

        They are the first of that epoch's order. Begins in the last epoch among them: processes
        that load ahead fetch the first batches before set_epoch is called.
        """
        self.done, self.handed_out, self.epoch = done, dict(done), max(done, default=0)

    def __len__(self) -> int:
        return self.count // self.world  # the same for every process, or they wait for each other

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        # Parity compares what was really handed out, by all processes together.
        seen = self.handed_out[self.epoch] = list(self.done.get(self.epoch, []))
        for start in range(len(seen), len(self) * self.world, self.world):
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
    """Return a loader of unshuffled batches, EVAL_BATCH_SIZE in all; every sample comes once.

    Several processes get as many batches each, since some wait for each other in every batch. Where
    they do not divide the set, some have one sample less; PyTorch's DistributedSampler repeats
    samples instead, which then count twice.
    """
    rank, world = processes()
    sampler, size = range(rank, len(images), world), EVAL_BATCH_SIZE // world
    fewest, most = len(images) // world, math.ceil(len(images) / world)
    while math.ceil(fewest / size) != math.ceil(most / size):
        size += 1
    return _loader(images, size, sampler, recipe, options)


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
    parts = None
    if options.data != "shapes":
        try:
            parts = _real(recipe.data, options.data_dir)
        except Unreachable as reason:
            real = source(recipe.data)
            if options.data == recipe.data:
                raise BadInput(
                    f"{real.title} is not in '{options.data_dir}' and could not be downloaded "
                    f"({reason}); put the folder {real.folder} there, or use --data shapes."
                ) from None
            _print_notice(real, options.data_dir, reason)
    name = recipe.data if parts else "shapes"
    data = _split(name, *(parts or _shapes_like(recipe.data)), recipe)
    _check_limits(data, recipe, options)
    print(
        f"Data: {data.name}, {len(data.train):,} images to train on, {len(data.val):,} to validate "
        f"on, {len(data.test):,} to test on."
    )
    return data


def _split(
    name: str, classes: tuple[str, ...], train: Images, test: Images, recipe: Recipe
) -> Data:
    """Take the validation images out of the training images, drawn by the recipe's seed."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
    val, rest = order[:VALIDATION], order[VALIDATION:]
    transform = PIXELS[recipe.pixels]
    return Data(
        name,
        classes,
        train=Images(train.images[rest], train.labels[rest], transform),
        val=Images(train.images[val], train.labels[val], transform),
        test=Images(test.images, test.labels, transform),
    )


def _shapes_like(name: str) -> tuple[tuple[str, ...], Images, Images]:
    """Return shapes in the format of a real data set: their classes, to train on, to test on."""
    kind, count = {"cifar10": ("coloured", 50_000), "fashionmnist": ("grey", 60_000)}[name]
    train, test = shapes.kept(kind, count, seed=1), shapes.kept(kind, 10_000, seed=2)
    return shapes.CLASSES, Images(*train), Images(*test)


def _real(name: str, folder: Path) -> tuple[tuple[str, ...], Images, Images]:
    """Read a real data set: its classes, the images to train on, those to test on."""
    classes, train, test = read_real(name, folder)
    return classes, Images(*train), Images(*test)


def _print_notice(real: Source, folder: Path, reason: Exception) -> None:
    notice(
        f"THIS IS NOT {real.title}. It was not found, and could not be downloaded, so the",
        "built-in drawn shapes are used instead. The numbers below say nothing about",
        f"{real.title}.",
        f"Looked in: {folder}   Download: {reason}",
        f"To train on the real images, put {real.folder} into a folder",
        "and name that folder by --data-dir or DATA_DIR.",
    )


def _check_limits(data: Data, recipe: Recipe, options: Options) -> None:
    """Refuse a share that is smaller than one batch, and fewer images than devices."""
    devices = options.devices * getattr(recipe, "num_nodes", 1)
    for stage, images, size, limit in (
        ("train", data.train, recipe.batch_size, options.limit_train_batches),
        ("val", data.val, EVAL_BATCH_SIZE, options.limit_val_batches),
        ("test", data.test, EVAL_BATCH_SIZE, options.limit_test_batches),
    ):
        batches = math.ceil(len(images) / size)
        if len(images) < devices:
            raise BadInput(
                f"there are {len(images)} {stage} images for {devices} devices; use fewer devices."
            )
        if count_batches(batches, limit) < 1:
            raise BadInput(
                f"--limit-{stage}-batches {limit} is less than one batch of the {batches} there "
                f"are; use a number of batches, or a larger share."
            )
    last = len(data.train) % recipe.batch_size or recipe.batch_size
    backbone = getattr(recipe, "backbone", "vgg16")  # the only one without BatchNorm
    if 1 in (recipe.batch_size, last) and backbone != "vgg16":
        raise BadInput(
            f"--batch-size {recipe.batch_size} makes a batch of one image, over which the "
            f"BatchNorm of {backbone} can take no average; choose another size, or vgg16."
        )
