"""The pictures of a run, drawn with matplotlib from what the run measured."""

from common.data import Data, Images

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

SHOWN = 32  # images in a grid, eight in a row


def draw(
    model: nn.Module, data: Data, result: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Figure]:
    """Return file names and pictures: samples, curves, confusion matrix and predictions.

    And what surrounds the optimizer, where `rows`, those of metrics.csv, have it.
    """
    figures = {
        "samples.png": _samples(data),
        "curves.png": _curves(result),
        "confusion.png": _confusion(data, result),
        "predictions.png": _predictions(model, data, result),
    }
    steps = [row for row in rows if "train_lr" in row]
    return figures | {"optimizer.png": _optimizer(result, steps)} if steps else figures


def _grid(images: Images, titles: list[str], colors: list[str], heading: str) -> Figure:
    """Draw images in rows of eight, each with its title."""
    rows = -(-len(titles) // 8)
    figure = Figure(figsize=(9, 1.45 * rows + 0.6), layout="constrained")
    figure.suptitle(heading)
    axes = figure.subplots(rows, 8, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, image, title, color in zip(axes, images.images, titles, colors, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=7, color=color)
    return figure


def _samples(data: Data) -> Figure:
    titles = [data.classes[label] for label in data.train.labels[:SHOWN].tolist()]
    return _grid(data.train, titles, ["black"] * SHOWN, f"{data.name}: images to train on")


def _curves(result: dict[str, Any]) -> Figure:
    """Draw the training loss of every step with its running mean, and the validation results."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{result['lesson']}, {result['side']}, on {result['data']}")
    left, right = figure.subplots(1, 2)
    losses = torch.tensor([math.nan if x is None else x for x in result["train_loss"]])
    window = max(1, len(losses) // 20)
    means = losses.unfold(0, window, 1).mean(1).numpy()
    left.plot(
        range(1, len(losses) + 1),
        losses.numpy(),
        color="lightgray",
        linewidth=0.3,
        label="each step",
    )
    left.plot(range(window, len(losses) + 1), means, label=f"mean of {window:,} steps")
    left.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, None))
    if np.isfinite(means).any():
        left.set_ylim(0, 1.1 * means[np.isfinite(means)].max())
    epochs = range(len(result["val_loss"]))  # from 0 on, as everywhere else
    right.plot(epochs, result["val_accuracy"], "o-", label="validation accuracy")
    right.plot(epochs, result["val_f1"], "s--", label="validation macro F1")
    right.axhline(result["test_accuracy"], color="gray", linestyle=":", label="test accuracy")
    right.set(
        xlabel="epoch",
        ylabel="score, from 0 to 1",
        ylim=(0, 1),
        xticks=epochs[:: 1 + len(epochs) // 20],
    )
    for axis in (left, right):
        for line in axis.legend().get_lines():
            line.set_linewidth(1.5)  # that of the single steps is too thin to be seen
    return figure


def _optimizer(result: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Draw the learning rate, the gradients' norm and the scale of the loss over the steps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(f"{result['lesson']}, {result['side']}, on {result['data']}")
    panels = {
        "learning rate": {"train_lr": ""},
        "norm of all gradients": {
            "train_grad_norm": "before clipping",
            "train_grad_norm_clipped": "after clipping",
        },
        "scale of the loss": {"train_loss_scale": ""},
    }
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, label in lines.items():
            axis.plot([row["step"] + 1 for row in rows], [row[name] for row in rows], label=label)
        axis.set(xlabel="optimizer step", title=title, ylim=(0, None))
        if len(lines) > 1:
            axis.legend()
    return figure


def _confusion(data: Data, result: dict[str, Any]) -> Figure:
    """Draw the confusion matrix; each row is a true class, coloured by its shares."""
    counts = torch.tensor(result["confusion_matrix"])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axis = figure.subplots()
    axis.set_title(
        f"{result['lesson']}, {result['side']}, test on {result['data']}: "
        f"{result['test_accuracy']:.2%} right"
    )
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
    figure = _answers(model, data.val, data.classes, f"epoch {epoch}: images to validate on")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    path = folder / "pictures" / f"epoch_{epoch}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def _predictions(model: nn.Module, data: Data, result: dict[str, Any]) -> Figure:
    heading = f"{result['lesson']}, {result['side']}: test images of {data.name}"
    return _answers(model, data.test, data.classes, heading)


@torch.no_grad()
def _answers(model: nn.Module, images: Images, classes: tuple[str, ...], heading: str) -> Figure:
    """Draw the first images with truth and prediction, the wrong ones in red."""
    first = replace(images, images=images.images[:SHOWN], labels=images.labels[:SHOWN])
    batch, truth = first.__getitems__(list(range(len(first))))
    predicted = model(batch.to(next(model.parameters()))).argmax(1).cpu()
    titles = [
        f"is {classes[t]}\nsaid {classes[p]}"
        for t, p in zip(truth.tolist(), predicted.tolist(), strict=True)
    ]
    colors = ["green" if right else "red" for right in (predicted == truth).tolist()]
    return _grid(first, titles, colors, heading)
