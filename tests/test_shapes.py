"""The built-in shapes are a real task, and the same for everyone."""

from common.data import Images, load_data, train_loader
from common.models import MLP, Net
from common.options import Options
from common.recipes import RECIPES
from common.shapes import CLASSES, draw_grey_shapes, draw_shapes

import hashlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

both_formats = pytest.mark.parametrize(
    "draw, size, digest",
    [
        (
            draw_shapes,
            (3, 32, 32),
            "025fd1b97a09771d3ca61a4ed3137c82b8e21c1f0f0121966d0481fcb54f09ca",
        ),
        (
            draw_grey_shapes,
            (1, 28, 28),
            "ca0476d7f8dd875529d6d5ce23956963cb4ebe10eadce265766fce67f73f9497",
        ),
    ],
    ids=["coloured", "grey"],
)


@both_formats
def test_format(draw, size, digest):
    images, labels = draw(1005, seed=0)
    assert images.shape == (1005, *size) and images.dtype == torch.uint8
    assert labels.shape == (1005,) and labels.dtype == torch.int64
    assert len(CLASSES) == len(set(CLASSES)) == 10
    assert labels.bincount().tolist() == [101] * 5 + [100] * 5


@both_formats
def test_the_same_for_everyone_by_seed(draw, size, digest):
    images, labels = draw(3000, seed=1)
    again, _ = draw(3000, seed=1)
    other, _ = draw(3000, seed=2)
    assert torch.equal(images, again) and not torch.equal(images, other)
    # Made on Linux, x86-64; a machine where this differs draws other images than everyone else.
    drawn = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert drawn == digest


def test_grey_shapes_are_bright_on_dark():
    images, labels = draw_grey_shapes(1000, seed=0)
    corners = images[:, 0, ::27, ::27].float()
    middle = images[:, 0, 12:16, 12:16].float()
    assert corners.amax() < 100
    # A ring and a frame are hollow, a crescent may be; the others cover the middle, mostly.
    full = ~torch.isin(
        labels, torch.tensor([CLASSES.index(n) for n in ("ring", "frame", "crescent")])
    )
    assert (middle[full].mean((1, 2)) > 100).float().mean() > 0.95


def accuracy_after_one_epoch(model, data, recipe):
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    for images, labels in train_loader(data.train, recipe, Options()):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        images, labels = data.test.__getitems__(list(range(10_000)))
        return (model(images).argmax(1) == labels).float().mean().item()


# The lesson's own batches take 30 seconds; eight times as large at eight times the rate, a third.
@pytest.mark.parametrize("batch_size", [pytest.param(4, marks=pytest.mark.slow), 32])
def test_the_network_learns_them_and_a_linear_model_does_not(batch_size):
    recipe = RECIPES["cifar"]
    recipe = replace(recipe, batch_size=batch_size, lr=recipe.lr * batch_size / recipe.batch_size)
    data = load_data(recipe, Options(data="shapes"))
    torch.manual_seed(0)
    network = accuracy_after_one_epoch(Net(), data, recipe)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    linear = accuracy_after_one_epoch(linear, data, recipe)
    print(f"after one epoch: Net {network:.2%}, a linear model {linear:.2%}")
    assert network > 0.6
    assert linear < network - 0.3


def test_the_mlp_learns_the_grey_ones():
    """At a hundred times the lesson's learning rate: 188 steps are few."""
    train, test = (Images(*draw_grey_shapes(count, seed)) for count, seed in ((6000, 1), (2000, 2)))
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = train_loader(train, RECIPES["fashion"], Options())
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    with torch.no_grad():
        images, labels = test.__getitems__(list(range(2000)))
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"after two epochs: MLP {accuracy:.2%}")
    assert accuracy > 0.5
