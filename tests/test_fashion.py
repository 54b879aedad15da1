"""What the lesson fashion and its page claim: targets, averages, choices, moves, exercises."""

from common import ROOT
from common import data as data_module
from common.data import Data, Images, load_images, make_loader
from common.models import MLP
from common.proof.compare import compare_results
from common.proof.sidebyside import cells
from common.run import Options
from common.shapes import CLASSES, draw_grey_shapes

import functools
import re
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import SIDES, GreyNoisy, count, load_lesson, real_data, small_data, some, train
from torch import nn
from torch.utils.data import DataLoader

PAGE = (ROOT / "docs" / "fashion.md").read_text()
DATA = "fashionmnist"

OF_ITS_OWN = (
    "make_loaders(data, args)\n",
    "make_loaders(data, args)\n    val_loader = torch.utils.data.DataLoader("
    "data.val, 50, shuffle={}, collate_fn=lambda b: b)\n",
)
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "no zero_grad": ("plain", "steps", ("        optimizer.zero_grad()\n", "")),
    "zero_grad between backward and step": (
        "plain", "steps",
        ("        loss.backward()\n", "        loss.backward()\n        optimizer.zero_grad()\n"),
    ),
    "a ReLU after the last layer": (
        "plain", "steps",
        ("    net = MLP().to(device)\n", "    net = MLP().to(device)\n"
         "    net.layers.append(torch.nn.ReLU())\n"),
    ),
    "one-hot targets on one side": ("lightning", "steps", ("if args.one_hot:", "if True:")),
    "no return loss": ("lightning", "steps", ("        return loss\n", "")),
    "a network of the module's own": (
        "lightning", "start",
        ("self.model, self.lr = model", "self.model, self.lr = type(model)()"),
    ),
    "a validation loader that shuffles": (
        "plain", "random", (OF_ITS_OWN[0], OF_ITS_OWN[1].format(True)),
    ),
    "validated on the test images": (
        "plain", "data", ("test_loop(model, val_loader,", "test_loop(model, test_loader,"),
    ),
    "divided by the number of batches": (
        "plain", "metrics",
        (".item() * len(labels)", ".item()"),
        ("return compute_metrics(total_loss,",
         "total_loss *= confusion.sum().item() / len(loader)\n"
         "    return compute_metrics(total_loss,"),
    ),
}  # fmt: skip


class WithReLU(MLP):
    """The network of the tutorial's first version."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.ReLU())


@functools.cache
def ten_thousand() -> Images:
    """10,000 grey images: FashionMNIST's test images where DATA_DIR has them, else shapes."""
    if folder := real_data(DATA):
        return real_images(folder).test
    return Images(*draw_grey_shapes(10_000, seed=3), name="shapes", classes=CLASSES)


def real_images(folder) -> Data:
    args = Options(data=DATA, data_dir=folder)
    args.batch_size = 64
    return load_images(DATA, args)


# Enough for the network to tell all ten classes apart: 282 steps, 1.5 seconds.
LONGER = dict(lr=0.1, batch_size=64, max_epochs=6)


@functools.cache
def longer_data() -> Data:
    images = ten_thousand()
    lengths = [3000, 130, 1000, 10_000 - 4130]
    parts = zip(images.images.split(lengths), images.labels.split(lengths), strict=True)
    splits = zip(("train", "val", "test"), parts, strict=False)
    return Data(*[replace(images, images=i, labels=n, split=split) for split, (i, n) in splits])


def train_fashion(side, folder, monkeypatch, *changes, **settings):
    """Train one side of the lesson on a few grey images; return its result."""
    settings = {"model": MLP, **settings}
    return train(side, folder, monkeypatch, *changes, lesson="fashion", **settings)


def network_of(folder, side="plain", model=MLP):
    """The trained network, from the weights.pt that the run left."""
    net = model()
    net.load_state_dict(torch.load(folder / "fashion" / side / "weights.pt", weights_only=True))
    return net.eval()


def measured(text: str) -> None:
    """Print a number for the page: pytest -s, and of its output the lines with `measured`."""
    print(f"measured on {ten_thousand().name}: {text}")


@pytest.fixture(scope="module")
def monkeypatch_for_all():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory, monkeypatch_for_all):
    folder = tmp_path_factory.mktemp("unchanged")
    runs = {side: train_fashion(side, folder, monkeypatch_for_all) for side in SIDES}
    assert compare_results(runs["plain"], runs["lightning"]).agree
    return runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, monkeypatch_for_all):
    """A network that gets most of the images right."""
    folder = tmp_path_factory.mktemp("trained")
    train_fashion("plain", folder, monkeypatch_for_all, **LONGER, images=longer_data())
    return network_of(folder)


def test_the_network_is_the_tutorials():
    assert sum(parameter.numel() for parameter in MLP().parameters()) == 669_706


# Targets.


def loss_and_gradients(net, images, targets):
    net.zero_grad()
    loss = F.cross_entropy(net(images), targets)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in net.parameters()]


def test_one_hot_targets_give_the_same_gradients_and_the_loss_but_for_rounding():
    one_hot = load_lesson("plain", "fashion").to_one_hot
    images = ten_thousand()
    torch.manual_seed(0)
    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    differences = []
    # Batches of 64, and a last one of 24, which is no power of two.
    for indices in torch.arange(41 * 64 + 24).split(64):
        batch, labels = images.__getitems__(indices)
        loss, gradients = loss_and_gradients(net, batch, labels)
        other_loss, other_gradients = loss_and_gradients(net, batch, one_hot(labels))
        assert all(map(torch.equal, gradients, other_gradients))
        differences.append(abs(other_loss - loss) / loss)
        optimizer.step()
    measured(
        f"of {len(differences)} losses, {sum(d > 0 for d in differences)} differ between class "
        f"numbers and one-hot targets, by up to {max(differences):.0e}; all gradients are equal"
    )
    assert len(differences) == 42
    assert 0 < max(differences) < 1e-6


@pytest.mark.parametrize("side", SIDES)
def test_one_hot_is_for_training_alone_and_changes_no_weight(
    side, unchanged, tmp_path, monkeypatch
):
    seen = {}
    make = DataLoader.__init__

    def noted(loader, images, *args, **kwargs):
        seen[images.split] = images
        make(loader, images, *args, **kwargs)

    monkeypatch.setattr(DataLoader, "__init__", noted)
    run = train_fashion(side, tmp_path, monkeypatch, one_hot=True)
    _, targets = seen["train"].__getitems__([0, 1, 2])
    assert targets.dtype == torch.float32 and targets.shape == (3, 10)
    assert torch.equal(targets.argmax(1), seen["train"].labels[:3])
    for split in ("val", "test"):
        assert torch.equal(seen[split].__getitems__([0, 1, 2])[1], seen[split].labels[:3])
        assert seen[split].labels.dtype == torch.int64
    assert run["weights_sha256"] == unchanged[side]["weights_sha256"]
    assert run["confusion_matrix"] == unchanged[side]["confusion_matrix"]
    assert run["train_loss"] == pytest.approx(unchanged[side]["train_loss"], rel=1e-6)
    assert run["train_loss"] != unchanged[side]["train_loss"]


# A ReLU after the last layer.


def dead(run, net, images) -> tuple[list[str], list[str]]:
    """The classes that a trained network never predicts, and those that get no gradient at all.

    The second are measured on all training images together, and their logits are 0 on every one.
    """
    predicted = torch.tensor(run["confusion_matrix"]).sum(0)
    batch, labels = images.__getitems__(list(range(len(images))))
    logits = net(batch)
    F.cross_entropy(logits, labels).backward()
    last = [layer for layer in net.layers if isinstance(layer, nn.Linear)][-1]
    still = (last.weight.grad == 0).all(1) & (last.bias.grad == 0)
    assert (logits[:, still] == 0).all()
    return (
        [name for name, times in zip(images.classes, predicted.tolist(), strict=True) if not times],
        [name for name, stands in zip(images.classes, still.tolist(), strict=True) if stands],
    )


def report(seed, relu, run, never, no_gradient):
    measured(
        f"seed {seed}, {'ReLU' if relu else 'none'} after the last layer: test accuracy "
        f"{run['test_accuracy']:.2%}, never predicted: {', '.join(never) or 'none'}; "
        f"no gradient: {', '.join(no_gradient) or 'none'}"
    )


def test_a_relu_after_the_last_layer_kills_classes(tmp_path, monkeypatch):
    settings = dict(images=longer_data(), **LONGER)
    without_gradient = 0
    for seed in range(3):
        for model in (MLP, WithReLU):
            run = train_fashion("plain", tmp_path, monkeypatch, model=model, seed=seed, **settings)
            net = network_of(tmp_path, model=model)
            never, no_gradient = dead(run, net, longer_data().train)
            report(seed, model is WithReLU, run, never, no_gradient)
            if model is MLP:
                assert not never and not no_gradient
            else:
                assert never and set(no_gradient) <= set(never)
                without_gradient += len(no_gradient)
    assert without_gradient > 0


@pytest.mark.slow
@pytest.mark.skipif(not real_data(DATA), reason="needs the real images: set DATA_DIR")
def test_a_relu_kills_classes_of_the_real_images(tmp_path, monkeypatch):
    """The lesson's default run, with and without the ReLU."""
    data = real_images(real_data(DATA))
    settings = dict(images=data, lr=1e-3, batch_size=64, max_epochs=5)
    for seed in range(5):
        accuracies = []
        for model in (MLP, WithReLU):
            run = train_fashion("plain", tmp_path, monkeypatch, model=model, seed=seed, **settings)
            never, no_gradient = dead(run, network_of(tmp_path, model=model), data.train)
            report(seed, model is WithReLU, run, never, no_gradient)
            assert bool(never) is (model is WithReLU)
            accuracies.append(run["test_accuracy"])
        assert accuracies[1] < accuracies[0] - 0.03


# Averages and choices.


def test_an_average_over_batches_is_not_the_average(trained, monkeypatch):
    """10,000 images are 156 batches of 64 and one of 16."""
    monkeypatch.setattr(data_module, "EVAL_BATCH_SIZE", 64)
    images = ten_thousand()
    with torch.no_grad():
        batch, labels = images.__getitems__(list(range(10_000)))
        logits = trained(batch)
    means = [
        F.cross_entropy(*pair).item()
        for pair in zip(logits.split(64), labels.split(64), strict=True)
    ]
    true = F.cross_entropy(logits.double(), labels).item()
    by_images, by_batches = sum(means) / 10_000, sum(means) / len(means)
    loader = make_loader(replace(images, split="test"), Options())
    assert len(means) == len(loader) == 157

    test_loop, cpu = load_lesson("plain", "fashion").test_loop, torch.device("cpu")
    plain = test_loop(trained, loader, cpu, "test")
    module = load_lesson("lightning", "fashion").LitMLP(trained, lr=1e-3)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    (lightning,) = trainer.validate(module, loader, verbose=False)
    measured(
        f"test loss {true:.6f}; sum of the batch means divided by the images {by_images:.6f}, by "
        f"the batches {by_batches:.6f}; test_loop {plain['test_loss']:.6f}, "
        f"Trainer {lightning['val_loss']:.6f}"
    )
    assert true / by_images == pytest.approx(64, rel=0.02)
    assert abs(by_batches - true) > 1e-5 * true
    assert plain["test_loss"] == pytest.approx(true, rel=1e-6)
    assert lightning["val_loss"] == pytest.approx(true, rel=1e-6)


def test_the_best_on_the_test_images_is_not_as_good_as_it_looks():
    """Labels drawn by lot: no network can be right more often than in one of ten cases."""
    images = ten_thousand()
    torch.manual_seed(0)
    batch, _ = images.__getitems__(list(range(10_000)))
    labels = torch.randint(0, 10, (10_000,))
    with torch.no_grad():
        right = torch.stack([MLP()(batch).argmax(1) == labels for _ in range(20)]).double()
    # Fifty times: 200 images to choose by, the other 9,800 to ask how good the chosen one is.
    chosen_by = right.view(20, 50, 200).mean(2)
    others = (right.sum(1, keepdim=True) - 200 * chosen_by) / 9800
    reported, best = chosen_by.max(0)
    fresh = others.gather(0, best[None])
    measured(
        f"the best of 20 untrained networks on 200 images with labels drawn by lot: "
        f"{reported.mean():.2%} there, {fresh.mean():.2%} on 9,800 others"
    )
    assert reported.mean() > 0.12
    assert fresh.mean() == pytest.approx(0.1, abs=0.01)


# A validation loader that shuffles.


def of_its_own(images, shuffle=True):
    """A loader with PyTorch's defaults."""
    return DataLoader(images, 50, shuffle=shuffle, collate_fn=lambda batch: batch)


def test_shuffled_validation_images_give_the_same_metrics_but_no_same_pictures(monkeypatch):
    monkeypatch.setattr(data_module, "EVAL_BATCH_SIZE", 50)
    images, cpu = small_data(lesson="fashion").val, torch.device("cpu")
    torch.manual_seed(0)
    net, test_loop = MLP(), load_lesson("plain", "fashion").test_loop
    ordered = make_loader(images, Options())
    one, other = (test_loop(net, loader, cpu, "val") for loader in (ordered, of_its_own(images)))
    assert one["val_accuracy"] == other["val_accuracy"] and one["val_f1"] == other["val_f1"]
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-6)
    for loader, same in ((ordered, True), (of_its_own(images), False)):
        first, second = (next(iter(loader))[0][:32] for _ in range(2))
        assert torch.equal(first, second) is same


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_validation_loader_of_its_own_changes_the_training(shuffle, tmp_path, monkeypatch):
    """It draws from the global generator, even where it does not shuffle."""
    change = (OF_ITS_OWN[0], OF_ITS_OWN[1].format(shuffle))
    before = torch.get_rng_state()
    list(of_its_own(small_data(lesson="fashion").val, shuffle))
    assert not torch.equal(before, torch.get_rng_state())

    one, other = (
        train_fashion("plain", tmp_path, monkeypatch, *changes, model=GreyNoisy)
        for changes in ([], [change])
    )
    ours, theirs = one["train_loss"], other["train_loss"]
    assert ours[:15] == theirs[:15]  # the first epoch, before any validation
    assert one["val_accuracy"][0] == other["val_accuracy"][0]
    assert ours[15:] != theirs[15:]
    # It is the dropout that differs, not the batches.
    assert one["fingerprints"]["data"] == other["fingerprints"]["data"]

    # The lesson's network draws nothing: there only the generator's state differs.
    other = train_fashion("plain", tmp_path, monkeypatch, change)
    one = train_fashion("plain", tmp_path, monkeypatch)
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["fingerprints"]["random"] != other["fingerprints"]["random"]


# The order of a step.


ADAM = ("torch.optim.SGD(net.parameters(), lr=args.lr)", "torch.optim.Adam(net.parameters())")


@pytest.mark.parametrize("optimizer", [(), (ADAM,)], ids=["sgd", "adam"])
def test_gradients_may_be_cleared_before_or_after_the_step(optimizer, tmp_path, monkeypatch):
    first = (
        ("        optimizer.zero_grad()\n", ""),
        ("        loss = F.cross", "        optimizer.zero_grad()\n        loss = F.cross"),
    )
    one, other = (
        train_fashion("plain", tmp_path, monkeypatch, *changes, *optimizer)
        for changes in ((), first)
    )
    assert one["train_loss"] == other["train_loss"] and len(one["train_loss"]) == 30
    assert one["fingerprints"] == other["fingerprints"]


# The page.


def test_the_cells_are_those_of_the_lesson():
    first_table = PAGE.split("\n## ")[0]
    titles = re.findall(r"^\| ([A-Z][^|]+?) \|", first_table, re.MULTILINE)
    assert titles == [title for title in cells((ROOT / "plain/fashion.py").read_text()) if title]


def test_the_quoted_code_stands_in_the_lessons():
    quotes = re.findall(
        r"\[((?:plain|lightning)/\w+\.py)\]\(\.\./\1\):\n\n```python\n(.*?)```", PAGE, re.DOTALL
    )
    assert len(quotes) == PAGE.count("```python") == 10
    lines = 0
    for path, block in quotes:
        source = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        place = 0
        for line in block.splitlines():
            place = source.index(line.strip(), place) + 1  # in this order
            lines += 1
    assert lines == 51
    count("lines of code on docs/fashion.md", lines)


def moves():
    """The page's moves as text changes: for each diff, the (old text, new text) of its parts."""

    def text(part, sign):
        return "".join(line[1:] + "\n" for line in part.splitlines() if line[:1] in ("", " ", sign))

    blocks = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    return [[(text(part, "-"), text(part, "+")) for part in b.split("@@\n")] for b in blocks]


def test_the_proof_holds_after_each_move(unchanged, tmp_path, monkeypatch):
    """The plain script is moved towards Lightning, as a reader would; Lightning's stays."""
    made = []
    assert len(moves()) == 4  # the fifth move leads to lightning/fashion.py itself
    for move in moves():
        made += move
        run = train_fashion("plain", tmp_path, monkeypatch, *made)
        comparison = compare_results(run, unchanged["lightning"])
        assert comparison.agree, comparison.first_difference
        count("moves after which both sides agree")


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train_fashion(side, tmp_path, monkeypatch, *changes)
    (other,) = set(SIDES) - {side}
    comparison = compare_results(changed, unchanged[other])
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")


def test_the_exercises_are_tested_changes():
    rows = re.findall(r"^\| (.+) \| (plain|lightning) \| (\w+) \|$", PAGE, re.MULTILINE)
    assert {name: (side, stage) for name, side, stage in rows} == {
        name: change[:2] for name, change in CHANGES.items()
    }
    count("exercises", len(rows))
