"""The pictures of a run show what it measured, and can be read without colours."""

from common import ROOT, figures

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import small_data
from torch import nn


class Says(nn.Module):
    """Gives the images of a batch these classes, one after the other."""

    def __init__(self, said):
        super().__init__()
        self.said, self.weight = said, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return nn.functional.one_hot(self.said, 10)[: len(x)]


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def pixels(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def has(picture, color):
    return (picture == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(2).any()


@pytest.mark.parametrize("lesson", ["cifar", "fashion"])
@pytest.mark.parametrize("wrong", [0, 1, 32])
def test_right_and_wrong_differ_by_more_than_colour(lesson, wrong):
    data = small_data(lesson=lesson)
    truth = data.val.labels[:32]
    said = truth.clone()
    said[:wrong] = (said[:wrong] + 1) % 10
    figure = figures._answers(Says(said), data.val, data.classes, "heading")
    *shown, heading = words(figure)
    assert heading == f"heading: ✓ {32 - wrong} right, ✗ {wrong} wrong"
    for place, (word, t, s) in enumerate(zip(shown, truth, said, strict=True)):
        ours = f"✗ said {data.classes[s]}\nis {data.classes[t]}"
        assert word == (ours if place < wrong else f"✓ {data.classes[t]}")
    picture = pixels(figure)
    assert has(picture, figures.BLUE) == (wrong < 32) and has(picture, figures.ORANGE) == (
        wrong > 0
    )


@pytest.mark.parametrize("lesson", ["cifar", "fashion"])
def test_the_images_are_drawn_pixel_by_pixel(lesson, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN", 11)  # not a whole row
    data = small_data(lesson=lesson)
    figure = figures._samples(data)
    names = [data.classes[label] for label in data.train.labels[:11]]
    assert words(figure) == [*names, f"{data.name}: images to train on"]
    picture = pixels(figure)
    size = data.train.images.shape[-1]
    # The twelfth place is empty, the tenth has its image: in each axis, every third pixel.
    side, width, height = 3 * size + 8, 3 * size + 20, 3 * size + 46
    y, x = 44 + height + 4, 2 * width + 10
    tenth = picture[y : y + 3 * size : 3, x : x + 3 * size : 3]
    expected = data.train.images[10].permute(1, 2, 0).expand(size, size, 3)
    assert np.array_equal(tenth, expected.numpy())
    assert (picture[44 + height :, 3 * width :] == 255).all() and side < width


def test_what_draws_nothing_does_not_import_matplotlib():
    code = (
        "import sys; from common import figures, run\nprint({'matplotlib', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def result(losses, validated=3):
    of_epochs = {f"val_{name}": [0.5] * validated for name in ("loss", "accuracy", "f1")}
    return of_epochs | {
        "lesson": "cifar", "side": "lightning", "data": "shapes", "train_loss": losses,
        "test_accuracy": 0.5, "hyperparameters": {},
    }  # fmt: skip


@pytest.mark.parametrize("steps", [1, 30, 99, 100, 1234])
def test_the_losses_are_drawn_as_means_and_their_spread(steps):
    figure = figures.curves(result([1.0 + n % 2 for n in range(steps)]))
    left, right = figure.axes
    (line,) = left.get_lines()
    group = max(1, steps // 50)
    assert len(line.get_xdata()) == steps // group <= 99
    assert np.isclose(line.get_ydata()[-1], 1.5, atol=0.51)
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert names == (["each step"] if group == 1 else [f"mean of {group} steps", "80 % of them"])
    assert right.get_legend().get_texts()[0].get_text() == "validation accuracy"
    assert figure.get_suptitle() == "cifar, Lightning, on shapes"


def test_a_panel_without_values_is_left_out():
    assert len(figures.curves(result([1.0, None, 2.0], validated=0)).axes) == 1
