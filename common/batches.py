"""A whole data set on one device, handed out in batches: no workers, and no single images."""

from common.data import EpochSampler, Images, count_batches

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DeviceBatches:
    """The images of a split on `device`, as bytes, normalized and augmented batch by batch.

    In place of a DataLoader: the Trainer takes any iterable that has a length, and calls
    `set_epoch` of its `sampler`; a loop by hand has to. The order depends on the seed and the epoch
    alone, and so do the augmentations.

    `flip` mirrors half of the images; with "alternate" those that were not mirrored in the epoch
    before (Keller Jordan's airbench, https://arxiv.org/abs/2404.00498: every pair of epochs then
    sees both forms of each image). `translate` moves each image by up to so many pixels, with its
    border mirrored. `drop_last` leaves out the last batch where it is shorter; `limit` all batches
    but the first, as args.limit_train_batches does.

    Yields float32 images [batch, channels, height, width], in the memory format, and labels.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int, device: torch.device, *,
        flip: str = "none", translate: int = 0, drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format, limit: int | float = 1.0,
    ) -> None:  # fmt: skip
        self.device, self.labels = device, images.labels.to(device)
        self.channels_last = memory_format == torch.channels_last

        def laid_out(images: Tensor) -> Tensor:
            """Give the axes the order that they have in memory: then one image is one piece."""
            images = images.permute(0, 2, 3, 1) if self.channels_last else images
            return images.contiguous().to(device)

        self.images = laid_out(images.images)
        # As large as an image: to repeat three numbers for each pixel takes ten times as long.
        self.mean, self.std = (
            laid_out(each.expand(1, *images.images.shape[1:]))
            for each in _statistics(images.transform)
        )
        batches = count_batches(math.ceil(len(images) / batch_size), limit)
        self.sampler = EpochSampler(len(images), seed, batches * batch_size)
        self.batch_size, self.drop_last, self.seed = batch_size, drop_last, seed
        self.flip, self.translate = flip, translate

    def __len__(self) -> int:
        count = len(self.sampler) / self.batch_size
        return int(count) if self.drop_last else math.ceil(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU: a GPU's generator gives other numbers.
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.sampler.epoch)
        mirrored = self._mirrored(generator)
        order = torch.tensor(list(self.sampler)).to(self.device)
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            images = self.images.index_select(0, chosen).float().sub_(self.mean).div_(self.std)
            images = images.permute(0, 3, 1, 2) if self.channels_last else images
            if mirrored is not None:
                turn = mirrored[chosen].view(-1, 1, 1, 1)
                images = torch.where(turn, images.flip(3), images)
            if self.translate:
                images = self._moved(images, generator)
            yield images, self.labels[chosen]

    def _mirrored(self, generator: torch.Generator) -> Tensor | None:
        """Return which images of the set are mirrored in this epoch, bool [images]."""
        count, epoch = len(self.labels), self.sampler.epoch
        if self.flip == "none":
            return None
        if self.flip == "alternate":
            first = torch.Generator().manual_seed(self.seed)
            return (torch.rand(count, generator=first) < 0.5).to(self.device) ^ bool(epoch % 2)
        return (torch.rand(count, generator=generator) < 0.5).to(self.device)

    def _moved(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images, each moved by up to `translate` pixels in both directions."""
        r, (count, _, height, width) = self.translate, images.shape
        padded = F.pad(images, (r, r, r, r), "reflect")
        down, right = torch.randint(2 * r + 1, (2, count), generator=generator).to(self.device)
        rows = (down[:, None] + torch.arange(height, device=self.device))[:, None, :, None]
        columns = (right[:, None] + torch.arange(width, device=self.device))[:, None, None, :]
        every = torch.arange(count, device=self.device)[:, None, None, None]
        channels = torch.arange(images.shape[1], device=self.device)[None, :, None, None]
        return padded[every, channels, rows, columns]


def _statistics(transform: Any) -> tuple[Tensor, Tensor]:
    """Return mean and spread of the pixels, as bytes, that a transform takes away: [3, 1, 1].

    One subtraction and one division then do what dividing by 255 and Normalize do.
    """
    if not transform:
        return torch.zeros(1, 1, 1), torch.full((1, 1, 1), 255.0)
    return 255 * transform.mean, 255 * transform.std
