"""The built-in data sets: ten drawn shapes on noise, for machines without the real images.

In colour they have CIFAR-10's format (3 channels, 32 by 32 pixels) and its difficulty in small:
place, size, tilt, both colours and the noise change from image to image, so that no pixel alone
tells the class. In grey they have FashionMNIST's (1 channel, 28 by 28 pixels), and like the clothes
there they are bright on dark, in the middle, and all of about one size.
"""

from common import ROOT

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "circle",
    "ring",
    "square",
    "frame",
    "triangle",
    "plus",
    "cross",
    "diamond",
    "stripes",
    "crescent",
)
FOLDER = ROOT / "data" / "shapes"  # what was drawn once
NOISE = 100  # the largest change that noise makes to a coloured pixel, of 255
GREY_NOISE = 33


def draw_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` coloured images with as many of each class as that allows, in random order.

    Returns images, uint8 [count, 3, 32, 32], and labels, int64 [count]. The same seed gives the
    same bits on every machine: the generator is numpy's frozen one (RandomState, whose stream is
    guaranteed never to change), and the drawing uses only operations that IEEE 754 rounds exactly.
    """
    return _draw(count, seed, channels=3, size=32, reach=4.5, paint=_colour)


def draw_grey_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` grey images: uint8 [count, 1, 28, 28], and labels, int64 [count].

    The same seed gives the same bits on every machine, as in `draw_shapes`.
    """
    return _draw(count, seed, channels=1, size=28, reach=1.5, paint=_grey)


# By kind: how to draw it, and the format of an image.
KINDS = {"coloured": (draw_shapes, (3, 32, 32)), "grey": (draw_grey_shapes, (1, 28, 28))}


def kept(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the shapes of that kind, "coloured" or "grey", with their labels: drawn once and kept.

    To draw 60,000 takes seconds, to read them a fifth of one. The file lies in FOLDER. A damaged
    file, or one of another version of this module, is not used. Where nothing can be written,
    they are drawn each time.
    """
    draw, format_ = KINDS[kind]
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{kind} {count} {seed}".encode()).digest()
    path = FOLDER / f"{kind}-{count}-{seed}-{key.hex()[:16]}"
    pixels = count * int(np.prod(format_))
    with contextlib.suppress(OSError):
        # The sum of key and content, the images, the labels: bytes that no one interprets.
        content = np.fromfile(path, np.uint8)
        images, labels = content[32 : 32 + pixels], content[32 + pixels :]
        if len(labels) == count and content[:32].tobytes() == _sum(key, images, labels):
            images = images.reshape(count, *format_)
            return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    drawn, classes = draw(count, seed)
    with contextlib.suppress(OSError):
        images, labels = drawn.numpy(), classes.numpy().astype(np.uint8)
        _write(path, _sum(key, images, labels), images.data, labels.data)
    return drawn, classes


def _sum(key: bytes, images: np.ndarray, labels: np.ndarray) -> bytes:
    whole = hashlib.sha256(key)
    whole.update(images.data)
    whole.update(labels.data)
    return whole.digest()


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _draw(
    count: int,
    seed: int,
    channels: int,
    size: int,
    reach: float,
    paint: Callable[[np.ndarray, np.random.RandomState], np.ndarray],
) -> tuple[Tensor, Tensor]:
    """Draw shapes whose centres lie up to `reach` pixels off the middle, and paint them."""
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(count) % len(CLASSES))
    images = np.empty((count, channels, size, size), dtype=np.uint8)
    for label, name in enumerate(CLASSES):
        places = np.flatnonzero(labels == label)
        # A thousand at a time: the arrays of one round stay in the processor's cache.
        for start in range(0, len(places), 1000):
            chosen = places[start : start + 1000]
            images[chosen] = paint(_inside(name, len(chosen), size, reach, random), random)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _inside(
    name: str, count: int, size: int, reach: float, random: np.random.RandomState
) -> np.ndarray:
    """Return bool [count, size, size]: which pixels of each image lie inside its shape."""
    middle = (size - 1) / 2
    centre = _between(middle - reach, middle + reach, (2, count, 1, 1), random)
    radius = _between(6, 11, (count, 1, 1), random)  # pixels
    # A tilt of up to 15 degrees. These two fractions are its cosine and sine for t = tan(angle/2);
    # np.cos itself may round differently from one machine to the next.
    t = _between(-0.13, 0.13, (count, 1, 1), random)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    pixel = np.arange(size)
    y = (pixel[None, :, None] - centre[0]) / radius
    x = (pixel[None, None, :] - centre[1]) / radius
    # (u, v): the shape's own coordinates; it reaches from -1 to 1 in both.
    u, v = x * cosine + y * sine, y * cosine - x * sine

    round_ = u * u + v * v
    square = np.maximum(abs(u), abs(v))
    if name == "circle":
        return round_ < 0.8
    if name == "ring":
        return (round_ < 1.0) & (round_ > 0.35)
    if name == "square":
        return square < 0.8
    if name == "frame":
        return (square < 0.9) & (square > 0.5)
    if name == "triangle":
        return (v < 0.8) & (abs(u) < 0.55 * (v + 1.0))
    if name == "plus":
        return (square < 1.0) & (np.minimum(abs(u), abs(v)) < 0.3)
    if name == "cross":
        return (square < 0.9) & (abs(abs(u) - abs(v)) < 0.4)
    if name == "diamond":
        return abs(u) + abs(v) < 1.1
    if name == "stripes":
        return (square < 0.95) & ((abs(v) < 0.22) | (abs(v) > 0.6))
    assert name == "crescent", name
    return (round_ < 1.0) & ((u - 0.5) ** 2 + v * v > 0.7)


def _between(
    low: float, high: float, shape: tuple[int, ...], random: np.random.RandomState
) -> np.ndarray:
    """Draw numbers from `low` to `high`.

    As RandomState.uniform does, but in two steps: some processors do its one step, low + range *
    x, with a single rounding, and others with two.
    """
    return low + (high - low) * random.random_sample(shape)


def _colour(inside: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return uint8 [count, 3, 32, 32]: shape and ground in two colours, with noise over both."""
    count = len(inside)
    ground = random.randint(0, 256, (count, 3, 1, 1))
    # 64 to 192 further round the circle of 256 values: never closer than 64 in any channel.
    shape = (ground + random.randint(64, 193, (count, 3, 1, 1))) % 256
    return _with_noise(np.where(inside[:, None], shape, ground), NOISE, random)


def _grey(inside: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return uint8 [count, 1, 28, 28]: a bright shape on a dark ground, with noise over both."""
    count = len(inside)
    ground = random.randint(0, 60, (count, 1, 1, 1))
    shape = random.randint(130, 256, (count, 1, 1, 1))
    return _with_noise(np.where(inside[:, None], shape, ground), GREY_NOISE, random)


def _with_noise(pictures: np.ndarray, noise: int, random: np.random.RandomState) -> np.ndarray:
    """Change each pixel by up to `noise`; return uint8."""
    bits = np.frombuffer(random.bytes(pictures.size), dtype=np.int8).reshape(pictures.shape)
    changed = pictures.astype(np.int16) + bits.astype(np.int16) * noise // 128
    return changed.clip(0, 255).astype(np.uint8)
