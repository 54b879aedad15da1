"""The pictures of a run, drawn with matplotlib from what the run measured.

Matplotlib takes most of a second to import: only what draws does so. Places are given in numbers,
since matplotlib's layouts draw everything twice, and a grid of images is one image with words on
it: 32 small plots take ten times as long.
"""

from common.data import Data, Images
from common.folders import write_whole

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 32  # images in a grid
IN_A_ROW = 8
DPI = 100
# Okabe and Ito's colours, which nearly everyone can tell apart: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#555555"
SIDES = {"plain": "plain", "lightning": "Lightning"}  # as they are written


def draw(
    model: nn.Module, data: Data, result: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, "Figure"]:
    """Return file names and pictures: samples, curves, confusion matrix and predictions.

    And what surrounds the optimizer, where `rows`, those of metrics.csv, have it.
    """
    figures = {
        "samples.png": _samples(data),
        "curves.png": curves(result),
        "confusion.png": _confusion(data, result),
        "predictions.png": _predictions(model, data, result),
    }
    steps = [row for row in rows if "train_lr" in row]
    return figures | {"optimizer.png": _optimizer(result, steps)} if steps else figures


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI)


def _heading(result: dict[str, Any]) -> str:
    side = SIDES.get(result["side"], "the Trainer")
    return f"{result['lesson']}, {side}, on {result['data']}"


def _grid(images: Images, words: list[str], colors: list[str], heading: str) -> "Figure":
    """Draw images in rows of eight, each in a frame of its colour, with words below it."""
    pixels = images.images[: len(words)].permute(0, 2, 3, 1).numpy()
    size, enlarged = pixels.shape[1], 3
    # In pixels of the picture: an image with its frame, and with the words and the room around it.
    frame = 4
    side = size * enlarged + 2 * frame
    width, height, top = side + 12, side + 38, 44
    rows = -(-len(words) // IN_A_ROW)
    whole = np.full((top + rows * height, IN_A_ROW * width, 3), 255, dtype=np.uint8)
    figure = _figure(whole.shape[1] / DPI, whole.shape[0] / DPI)
    middle = whole.shape[1] / 2
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for number, (image, word, color) in enumerate(zip(pixels, words, colors, strict=True)):
        row, column = divmod(number, IN_A_ROW)
        y, x = top + row * height, column * width + 6
        whole[y : y + side, x : x + side] = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        large = image.repeat(enlarged, 0).repeat(enlarged, 1)  # grey ones have one channel of three
        whole[y + frame : y + side - frame, x + frame : x + side - frame] = large
        axis.text(x + side / 2, y + side + 3, word, color=color, fontsize=8, ha="center", va="top")
    axis.text(middle, 20, heading, fontsize=12, ha="center", va="center")
    axis.imshow(whole, interpolation="nearest", aspect="auto")
    return figure


def _samples(data: Data) -> "Figure":
    words = [data.classes[label] for label in data.train.labels[:SHOWN].tolist()]
    return _grid(data.train, words, [GREY] * len(words), f"{data.name}: images to train on")


def curves(result: dict[str, Any]) -> "Figure":
    """Draw the training loss, its mean and its spread, and the validation results."""
    scores = {k: v for k, v in result.get("scores", {}).items() if k.startswith("val_")}
    validated = bool(scores or result.get("val_loss"))  # without one there is one panel alone
    figure = _figure(10 if validated else 5.5, 4)
    figure.suptitle(_heading(result))
    sides = {"left": 0.07 if validated else 0.12, "right": 0.98, "bottom": 0.13, "wspace": 0.2}
    left, *more = figure.subplots(1, 1 + validated, squeeze=False, gridspec_kw=sides)[0]
    losses = torch.tensor([math.nan if x is None else x for x in result["train_loss"]])
    # What was seen is what was backpropagated: of a group of batches, each its share.
    losses *= result["hyperparameters"].get("accumulate_grad_batches", 1)
    # The losses of single batches would be a wall. Each point stands for a group of steps.
    group = max(1, len(losses) // 50)
    groups = losses[: len(losses) // group * group].view(-1, group).numpy()
    ends = np.arange(1, len(groups) + 1) * group
    low, high = (np.quantile(groups, share, axis=1) for share in (0.1, 0.9))
    of = "each step" if group == 1 else f"mean of {group:,} steps"
    left.plot(ends, groups.mean(1), color=BLUE, label=of)
    if group > 1:
        left.fill_between(ends, low, high, color=BLUE, alpha=0.2, label="80 % of them")
    left.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, None))
    left.legend()
    if not validated:
        return figure
    (right,) = more
    if scores:
        for (name, values), style in zip(scores.items(), ("o-", "s--", "^:"), strict=False):
            right.plot(values, style, label=name.replace("val_", "validation ").replace("_", " "))
        right.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
        right.legend()
        return figure
    epochs = range(len(result["val_loss"]))
    several = "val_check_interval" in result["hyperparameters"]  # in an epoch
    right.plot(epochs, result["val_accuracy"], "o-", color=BLUE, label="validation accuracy")
    right.plot(epochs, result["val_f1"], "s--", color=ORANGE, label="validation macro F1")
    right.axhline(result["test_accuracy"], color="gray", linestyle=":", label="test accuracy")
    right.set(
        xlabel=f"{'validation' if several else 'epoch'}, from 0 on",
        ylabel="score, from 0 to 1",
        ylim=(0, 1),
        xticks=epochs[:: 1 + len(epochs) // 20],
    )
    right.legend()
    return figure


def _optimizer(result: dict[str, Any], rows: list[dict[str, Any]]) -> "Figure":
    """Draw the learning rate and the gradients' norm over the logged steps."""
    figure = _figure(10, 3.8)
    figure.suptitle(_heading(result))
    steps = [row["step"] + 1 for row in rows]
    sides = {"left": 0.07, "right": 0.98, "bottom": 0.14, "top": 0.83}
    left, right = figure.subplots(1, 2, gridspec_kw=sides)
    left.plot(steps, [row["train_lr"] for row in rows], color=BLUE)
    left.set(xlabel="optimizer step", title="learning rate", ylim=(0, None))
    norms = [row["train_grad_norm"] for row in rows]
    right.plot(steps, norms, color=BLUE, label="before clipping")
    settings = result["hyperparameters"]
    if settings["gradient_clip_algorithm"] == "norm" and settings["gradient_clip_val"]:
        most = settings["gradient_clip_val"]
        right.axhline(most, color=ORANGE, linestyle="--", label=f"clipped to {most}")
    right.set(xlabel="optimizer step", title="norm of all gradients", ylim=(0, None))
    right.legend()
    return figure


def _confusion(data: Data, result: dict[str, Any]) -> "Figure":
    """Draw the confusion matrix; each row is a true class, coloured by its shares."""
    counts = torch.tensor(result["confusion_matrix"])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = _figure(7, 6.4)
    axis = figure.add_axes((0.16, 0.15, 0.82, 0.79))
    axis.set_title(f"{_heading(result)}: test accuracy {result['test_accuracy']:.2%}")
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(len(data.classes))
    axis.set_xticks(places, data.classes, rotation=45, ha="right")
    axis.set_yticks(places, data.classes)
    axis.set(xlabel="predicted class", ylabel="true class")
    for row in places:
        for column in places:
            color = "white" if shares[row, column] > 0.5 else "black"
            text = str(counts[row, column].item())
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return figure


def predictions(model: nn.Module, data: Data, epoch: int, folder: Path) -> np.ndarray:
    """Draw the first validation images with what a model in eval mode says of them.

    Writes folder/pictures/epoch_N.png; returns the same picture, uint8 [height, width, 3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure = _answers(model, data.val, data.classes, f"epoch {epoch}, images to validate on")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    path = folder / "pictures" / f"epoch_{epoch}.png"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, Image.fromarray(pixels).save)
    return pixels


@torch.no_grad()
def generated(gan: Any, epoch: int, folder: Path) -> np.ndarray:
    """Draw 64 images that a generator makes of the same random numbers at each call.

    Writes folder/pictures/epoch_N.png; returns that picture, uint8 [height, width, 3]. Draws
    nothing from the global generators, and gives each part of the network back its mode.
    """
    from PIL import Image

    modes = {part: part.training for part in gan.modules()}
    gan.eval()
    device = next(gan.parameters()).device
    noise = torch.randn(64, gan.latent, generator=torch.Generator().manual_seed(0))
    images = gan(noise.to(device)).cpu().add(1).mul(127.5).round().to(torch.uint8)
    for part, mode in modes.items():
        part.training = mode
    size = images.shape[-1]
    # Eight rows of eight, each image twice as large.
    rows = images.view(8, 8, 3, size, size).permute(0, 3, 1, 4, 2).reshape(8 * size, 8 * size, 3)
    pixels = rows.numpy().repeat(2, 0).repeat(2, 1)
    path = folder / "pictures" / f"epoch_{epoch}.png"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, Image.fromarray(pixels).save)
    return pixels


def _predictions(model: nn.Module, data: Data, result: dict[str, Any]) -> "Figure":
    return _answers(model, data.test, data.classes, f"{_heading(result)}, test images")


@torch.no_grad()
def _answers(model: nn.Module, images: Images, classes: tuple[str, ...], heading: str) -> "Figure":
    """Draw the first images with what the model says; where it is wrong, also with the truth."""
    first = replace(images, images=images.images[:SHOWN], labels=images.labels[:SHOWN])
    batch, truth = first.__getitems__(list(range(len(first))))
    predicted = model(batch.to(next(model.parameters()))).argmax(1).cpu()
    right = predicted == truth
    # Marks, for those who see no difference between the colours, and on grey paper.
    words = [
        f"✓ {classes[p]}" if t == p else f"✗ said {classes[p]}\nis {classes[t]}"
        for t, p in zip(truth.tolist(), predicted.tolist(), strict=True)
    ]
    colors = [BLUE if one else ORANGE for one in right.tolist()]
    return _grid(
        first, words, colors, f"{heading}: ✓ {right.sum()} right, ✗ {(~right).sum()} wrong"
    )
