"""The built-in shapes are a real task, and the same for everyone."""

from common.data import load_data, train_loader
from common.models import Net
from common.options import Options
from common.recipes import RECIPES
from common.shapes import CLASSES, draw_shapes

import hashlib

import torch
import torch.nn.functional as F
from torch import nn


def test_format():
    images, labels = draw_shapes(1005, seed=0)
    assert images.shape == (1005, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (1005,) and labels.dtype == torch.int64
    assert len(CLASSES) == len(set(CLASSES)) == 10
    assert labels.bincount().tolist() == [101] * 5 + [100] * 5


def test_the_same_for_everyone_by_seed():
    images, labels = draw_shapes(3000, seed=1)
    again, _ = draw_shapes(3000, seed=1)
    other, _ = draw_shapes(3000, seed=2)
    assert torch.equal(images, again) and not torch.equal(images, other)
    # Made on Linux, x86-64; a machine where this differs draws other images than everyone else.
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "025fd1b97a09771d3ca61a4ed3137c82b8e21c1f0f0121966d0481fcb54f09ca"


def accuracy_after_one_epoch(model, data):
    """The recipe of `cifar`: one epoch of SGD, 1e-3, momentum 0.9, batches of four."""
    recipe = RECIPES["cifar"]
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    for images, labels in train_loader(data.train, recipe, Options()):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        images, labels = data.test.__getitems__(list(range(10_000)))
        return (model(images).argmax(1) == labels).float().mean().item()


def test_the_network_learns_them_and_a_linear_model_does_not():
    data = load_data(RECIPES["cifar"], Options(data="shapes"))
    torch.manual_seed(0)
    network = accuracy_after_one_epoch(Net(), data)
    linear = accuracy_after_one_epoch(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), data)
    print(f"after one epoch: Net {network:.2%}, a linear model {linear:.2%}")
    assert network > 0.6
    assert linear < network - 0.3
