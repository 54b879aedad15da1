"""What docs/tutorials.md says of the tutorials' claims: one test for each row of its table."""

from common import ROOT
from common.models import Net

import copy
import importlib.metadata
import math
import pickle
import re
import warnings

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from helpers import count, load_lesson
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from torchsummary import summary
from torchvision import datasets, models, transforms
from torchvision.transforms import v2

CLAIMS = "claims of the tutorials"
POINTS = TensorDataset(torch.linspace(-1, 1, 200).reshape(100, 2), torch.arange(100) % 2)


def points():
    """Ten batches of ten points."""
    return DataLoader(POINTS, batch_size=10)


class Lit(L.LightningModule):
    """The smallest module that trains and tests."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**settings):
    """A Trainer on the CPU that is quiet and writes nothing, unless told otherwise."""
    quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False}
    return L.Trainer(**{**fixed, **quiet, **settings})


def parameters(*layers):
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


# PyTorch's tutorials


def test_the_cnn_has_62006_parameters():
    net = Net()
    assert parameters(net.conv1, net.conv2) == 6 * (3 * 5 * 5 + 1) + 16 * (6 * 5 * 5 + 1)
    assert parameters(net.fc1, net.fc2, net.fc3) == 401 * 120 + 121 * 84 + 85 * 10
    assert parameters(net) == 62_006
    count(CLAIMS)


def test_the_printed_accuracy_is_cut_off():
    correct, total = 5_499, 10_000
    assert "%d %%" % (100 * correct / total) == "54 %"  # noqa: UP031, as the tutorial has it
    assert f"{100 * correct // total} %" == "54 %"
    assert f"{100 * correct / total:.2f} %" == "54.99 %"
    count(CLAIMS)


def test_accuracies_of_the_classes_give_the_accuracy():
    generator = torch.Generator().manual_seed(1)
    confusion = torch.randint(1, 100, (10, 10), generator=generator)
    confusion[3, 3] = 0  # one class is never recognized
    compute_metrics = load_lesson("plain", "cifar").compute_metrics
    accuracy = compute_metrics(1.0, confusion, "test")["test_accuracy"]
    of_classes = confusion.diag() / confusion.sum(1)
    images = confusion.sum(1)  # of each class
    weighted = (of_classes * images).sum() / images.sum()
    assert weighted.item() == pytest.approx(accuracy, rel=1e-6)
    assert of_classes.mean().item() != pytest.approx(accuracy, rel=1e-3)
    assert of_classes[3] == 0 < accuracy
    # CIFAR-10's test set has equally many images of each class: there the plain mean will do.
    truth, predicted = torch.arange(200) % 10, torch.randint(0, 10, (200,), generator=generator)
    confusion = torch.bincount(10 * truth + predicted, minlength=100).reshape(10, 10)
    accuracy = compute_metrics(1.0, confusion, "test")["test_accuracy"]
    of_classes = confusion.diag() / confusion.sum(1)
    assert of_classes.mean().item() == pytest.approx(accuracy, rel=1e-6)
    count(CLAIMS)


def test_a_loop_over_four_labels_needs_batches_of_four():
    def labels_seen(images, batch_size):
        seen = []
        for labels in torch.arange(images).split(batch_size):
            for i in range(4):
                seen.append(labels[i].item())
        return len(seen)

    assert labels_seen(16, 4) == 16
    assert labels_seen(16, 8) == 8  # the other half is left out, without an error
    with pytest.raises(IndexError, match="index 2 is out of bounds"):
        labels_seen(10, 4)  # the last batch has two
    count(CLAIMS)


def test_running_loss_is_right_for_full_windows():
    losses, window, printed, running_loss = [5.0, 4.0, 3.0, 2.0, 1.0], 2, [], 0.0
    for i, loss in enumerate(losses):
        running_loss += loss
        if i % window == window - 1:
            printed.append(running_loss / window)
            running_loss = 0.0
    assert printed == [4.5, 2.5]
    assert running_loss / window == 0.5  # the rest: one loss of 1.0, divided by 2
    # The tutorial: 50,000 images in batches of 4, printed every 2,000 batches.
    assert divmod(50_000 // 4, 2_000) == (6, 500)
    count(CLAIMS)


def test_a_loaders_iterator_has_no_next_method():
    with pytest.raises(AttributeError, match="object has no attribute 'next'"):
        iter(points()).next()
    images, labels = next(iter(points()))
    assert len(images) == len(labels) == 10
    count(CLAIMS)


def test_a_pil_image_holds_bytes():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    assert image.getextrema() == ((0, 255),) * 3
    tensor = transforms.ToTensor()(image)
    assert (tensor.min(), tensor.max()) == (0, 1)
    tensor = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(tensor)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    count(CLAIMS)


def test_to_tensor_works_and_only_the_one_of_v2_warns():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = transforms.ToTensor()(image)
        new = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(image)
        unscaled = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)])(image)
    with pytest.warns(UserWarning, match=r"`ToTensor\(\)` is deprecated"):
        v2.ToTensor()
    torch.testing.assert_close(old, new.as_subclass(torch.Tensor), rtol=1e-6, atol=0)
    assert not torch.equal(old, new)  # the last bit of some values
    assert (old.max(), new.max(), unscaled.max()) == (1, 1, 255)
    count(CLAIMS)


def test_relu_on_the_logits_can_stop_the_learning():
    logits = torch.linspace(-2, -1, 10).reshape(1, 10).requires_grad_()
    loss = F.cross_entropy(F.relu(logits), torch.tensor([3]))
    assert loss.item() == pytest.approx(math.log(10))
    assert torch.autograd.grad(loss, logits)[0].count_nonzero() == 0
    loss = F.cross_entropy(logits, torch.tensor([3]))
    assert torch.autograd.grad(loss, logits)[0].count_nonzero() == 10
    count(CLAIMS)


def test_a_mean_of_batch_means_is_not_the_mean():
    logits = torch.linspace(-3, 3, 100).reshape(10, 10)
    labels = torch.arange(10)
    true = F.cross_entropy(logits, labels).item()
    total = weighted = 0.0
    batches = list(zip(logits.split(4), labels.split(4), strict=True))  # of 4, 4 and 2
    for pred, y in batches:
        total += F.cross_entropy(pred, y).item()
        weighted += F.cross_entropy(pred, y).item() * len(y)
    assert weighted / 10 == pytest.approx(true, rel=1e-6)
    assert total / len(batches) != pytest.approx(true, rel=1e-3)
    assert divmod(10_000, 64) == (156, 16)  # the quickstart's last batch has 16 images, not 64
    count(CLAIMS)


def test_eval_mode_lasts_until_train_is_called():
    model, ones, changed = nn.Dropout(0.5), torch.ones(100), []
    for train_first in (False, False, True):
        if train_first:
            model.train()
        changed.append(not torch.equal(model(ones), ones))  # the epoch of training
        model.eval()  # the evaluation after it
    assert changed == [True, False, True]
    count(CLAIMS)


def test_pretrained_works_and_warns(monkeypatch):
    """On the device meta nothing is computed; a stand-in for the weights saves the download."""
    asked = []

    def stand_in(weights, *args, **kwargs):
        asked.append(weights)
        return empty

    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict", stand_in)
    with torch.device("meta"):
        empty = models.vgg16(weights=None).state_dict()
        with pytest.warns(UserWarning) as caught:
            models.vgg16(pretrained=True)
        first, second = (str(warning.message) for warning in caught)
        assert "'pretrained' is deprecated since 0.13" in first
        assert "equivalent to passing `weights=VGG16_Weights.IMAGENET1K_V1`" in second
        with pytest.warns(UserWarning) as caught:
            models.resnet18(pretrained=False)
        first, second = (str(warning.message) for warning in caught)
        assert "'pretrained' is deprecated since 0.13" in first
        assert "equivalent to passing `weights=None`" in second
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            models.vgg16(weights="IMAGENET1K_V1")
            models.resnet18(weights=None)
    assert asked == [models.VGG16_Weights.IMAGENET1K_V1] * 2
    count(CLAIMS)


def test_a_whole_saved_model_does_not_load(tmp_path):
    net, path = Net(), tmp_path / "model.pth"
    torch.save(net, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(path)
    assert isinstance(torch.load(path, weights_only=False), Net)
    torch.save(net.state_dict(), path)
    loaded = Net()
    loaded.load_state_dict(torch.load(path))
    assert torch.equal(loaded.conv1.weight, net.conv1.weight)
    count(CLAIMS)


def test_a_state_dict_is_no_copy():
    model = nn.Linear(2, 2)
    best, copied = model.state_dict(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(best["weight"], model.weight)
    assert not torch.equal(copied["weight"], model.weight)
    count(CLAIMS)


# Losses, parameters and summaries


def test_log_softmax_twice_is_harmless():
    logits = torch.linspace(-5, 5, 100).reshape(10, 10)
    labels = torch.arange(10).flip(0)
    once = F.log_softmax(logits, dim=1)
    torch.testing.assert_close(F.log_softmax(once, dim=1), once, rtol=1e-5, atol=1e-5)
    loss = nn.CrossEntropyLoss()(logits, labels).item()
    assert nn.CrossEntropyLoss()(once, labels).item() == pytest.approx(loss, rel=1e-5)
    assert F.nll_loss(once, labels).item() == pytest.approx(loss, rel=1e-5)
    count(CLAIMS)


def test_softmax_before_cross_entropy_is_harmful():
    labels = torch.arange(10)
    certain = 1000.0 * torch.eye(10)  # right, and as sure as can be
    assert F.cross_entropy(certain, labels).item() == 0
    floor = F.cross_entropy(F.softmax(certain, dim=1), labels).item()
    assert floor == pytest.approx(math.log(math.e + 9) - 1) == pytest.approx(1.4612, abs=5e-5)
    count(CLAIMS)


def test_parameters_of_convolutions():
    channels = [(3, 32), (32, 32), (32, 64), (64, 64)]
    layers = [nn.Conv2d(into, out, 3, 1) for into, out in channels]
    counts = [parameters(layer) for layer in layers]
    assert counts == [out * (into * 3 * 3 + 1) for into, out in channels]
    assert counts == [896, 9_248, 18_496, 36_928] and sum(counts) == 65_568
    without_bias = [out * into * 3 * 3 for into, out in channels]
    assert without_bias == [864, 9_216, 18_432, 36_864] and sum(without_bias) == 65_376
    without_input_channels = [out * (3 * 3 + 1) for _, out in channels]
    assert without_input_channels == [320, 320, 640, 640] and sum(without_input_channels) == 1_920
    assert [out * 3 * 3 for _, out in channels] == [288, 288, 576, 576]  # with neither
    linear = [nn.Linear(64 * 5 * 5, 512), nn.Linear(512, 128), nn.Linear(128, 10)]
    assert parameters(*layers, *linear) == 952_234
    count(CLAIMS)


def test_torchsummary_takes_cuda_where_there_is_cuda(monkeypatch, capsys):
    """A stand-in for the GPU's type of tensors: it differs from that of the weights, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    summary(Net(), (3, 32, 32))
    assert "Total params: 62,006" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "FloatTensor", torch.DoubleTensor, raising=False)
    with pytest.raises(RuntimeError, match="should be the same"):
        summary(Net(), (3, 32, 32))
    summary(Net(), (3, 32, 32), device="cpu")
    assert "Total params: 62,006" in capsys.readouterr().out
    count(CLAIMS)


def test_a_variable_is_a_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variable = torch.autograd.Variable(torch.zeros(1))
    assert type(variable) is torch.Tensor
    count(CLAIMS)


# Lightning


@pytest.mark.parametrize(
    "old, value, new",
    [
        ("gpus", 1, {"accelerator": "auto", "devices": 1}),
        ("progress_bar_refresh_rate", 20, {"callbacks": [TQDMProgressBar(refresh_rate=20)]}),
        ("weights_summary", None, {"enable_model_summary": False}),
        ("checkpoint_callback", False, {"enable_checkpointing": False}),
    ],
)
def test_arguments_that_the_trainer_has_lost(old, value, new):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{old}'"):
        L.Trainer(**{old: value})
    make_trainer(enable_progress_bar=True, **new)
    count(CLAIMS)


def test_resume_from_checkpoint_moved_to_fit(tmp_path):
    first, path = make_trainer(), tmp_path / "last.ckpt"
    first.fit(Lit(), points())
    first.save_checkpoint(path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'resume_from_checkpoint'"):
        L.Trainer(resume_from_checkpoint=path)
    second = make_trainer(max_epochs=3)
    second.fit(Lit(), points(), ckpt_path=path)
    assert (first.global_step, second.global_step) == (10, 30)
    count(CLAIMS)


def test_the_strategy_dp_is_gone():
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='dp'`"):
        make_trainer(strategy="dp")
    assert isinstance(make_trainer(strategy="ddp").strategy, DDPStrategy)
    count(CLAIMS)


def test_precision_16_works_and_warns():
    with pytest.warns(UserWarning) as caught:
        trainer = make_trainer(precision=16)
    said = " ".join(str(warning.message) for warning in caught)
    assert "`precision=16` is supported for historical reasons" in said
    assert "Using `precision='bf16-mixed'` instead" in said
    assert trainer.precision == "bf16-mixed"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(precision="bf16-mixed")
    assert not [warning for warning in caught if "precision" in str(warning.message)]
    count(CLAIMS)


def test_epoch_end_hooks_with_outputs_are_gone():
    for hook in ("training_epoch_end", "validation_epoch_end", "test_epoch_end"):
        old = type("Old", (Lit,), {hook: lambda self, outputs: None})()
        run = make_trainer().test if hook == "test_epoch_end" else make_trainer().fit
        with pytest.raises(NotImplementedError, match=f"`{hook}` has been removed in v2.0.0"):
            run(old, points())

    class New(Lit):
        def on_train_epoch_end(self):
            self.ended = True

    model = New()
    make_trainer().fit(model, points())
    assert model.ended
    count(CLAIMS)


def test_a_dict_is_logged_by_log_dict():
    class Old(Lit):
        def test_step(self, batch, batch_idx):
            self.log("losses", {"a": 1.0, "b": 2.0})

    class New(Lit):
        def test_step(self, batch, batch_idx):
            self.log_dict({"a": 1.0, "b": 2.0})

    with pytest.raises(ValueError, match="`dict` values cannot be logged"):
        make_trainer().test(Old(), points(), verbose=False)
    assert make_trainer().test(New(), points(), verbose=False) == [{"a": 1.0, "b": 2.0}]
    count(CLAIMS)


def test_hparams_cannot_be_assigned():
    class Old(L.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.hparams = {"lr": lr}

    class New(L.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(AttributeError, match=r"'hparams' of .* has no setter"):
        Old(0.1)
    assert New(0.1).hparams.lr == 0.1
    count(CLAIMS)


def test_test_dataloaders_are_dataloaders():
    with pytest.raises(TypeError, match="unexpected keyword argument 'test_dataloaders'"):
        make_trainer().test(Lit(), test_dataloaders=points())
    assert make_trainer().test(Lit(), dataloaders=points(), verbose=False)
    count(CLAIMS)


def test_testing_without_a_model_loads_the_checkpoint(tmp_path):
    model = Lit()
    trainer = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, points())
    saved = model.model.weight.detach().clone()
    with torch.no_grad():
        model.model.weight.zero_()
    trainer.test(model, points(), verbose=False)
    assert model.model.weight.count_nonzero() == 0  # those in memory were tested
    with pytest.warns(UserWarning, match="best model of the previous `fit` call will be used"):
        trainer.test(dataloaders=points(), verbose=False)
    assert torch.equal(model.model.weight, saved)  # and those in memory are overwritten
    count(CLAIMS)


def test_accuracy_needs_its_task():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'task'"):
        torchmetrics.Accuracy()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'task'"):
        torchmetrics.functional.accuracy(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="`num_classes` must be type `int`"):
        torchmetrics.Accuracy(task="multiclass")
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
    assert accuracy(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    count(CLAIMS)


def test_lightning_has_no_metrics_of_its_own():
    for library in (pl, L.pytorch):
        with pytest.raises(AttributeError, match="has no attribute 'metrics'"):
            library.metrics.Accuracy()
    count(CLAIMS)


def test_multiclass_accuracy_is_the_mean_of_the_classes():
    truth, predicted = torch.tensor([0, 0, 0, 0, 1, 2]), torch.zeros(6, dtype=torch.long)
    assert MulticlassAccuracy(3)(predicted, truth).item() == pytest.approx(1 / 3)
    for accuracy in (
        torchmetrics.Accuracy(task="multiclass", num_classes=3),
        MulticlassAccuracy(3, average="micro"),
    ):
        assert accuracy(predicted, truth).item() == pytest.approx(4 / 6)
    count(CLAIMS)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_the_two_packages_do_not_mix():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return points()

    alone = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    assert alone.test(Module(), points(), verbose=False)
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        alone.test(Lit(), points(), verbose=False)
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        make_trainer().test(Module(), points(), verbose=False)
    with pytest.raises(TypeError, match="invalid dataloader was passed"):
        make_trainer().fit(Lit(), Data())
    with pytest.raises(ValueError, match="Expected a parent"):
        make_trainer().fit(Lit(), datamodule=Data())
    count(CLAIMS)


def test_the_trainer_splits_again():
    class Data(L.LightningDataModule):
        def __init__(self, seed=None):
            super().__init__()
            self.seed = seed

        def setup(self, stage=None):
            seeded = self.seed is not None
            generator = torch.Generator().manual_seed(self.seed) if seeded else None
            self.train, self.val = random_split(POINTS, [60, 40], generator=generator)

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=10)

    torch.manual_seed(1)
    for seed in (None, 42):
        data = Data(seed)
        data.setup()
        before = set(data.val.indices)
        make_trainer().fit(Lit(), data)
        trained_on = before & set(data.train.indices)
        assert bool(trained_on) == (seed is None)
    count(CLAIMS)


def test_eval_does_not_freeze():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).eval()
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(3, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    model.requires_grad_(False)
    assert not model(torch.ones(3, 2)).requires_grad
    count(CLAIMS)


def test_both_parts_of_a_split_share_the_transform():
    train, val = random_split(datasets.FakeData(size=10, image_size=(3, 4, 4)), [8, 2])
    train.dataset.transform = lambda image: "augmented"
    val.dataset.transform = lambda image: "plain"
    assert train[0][0] == val[0][0] == "plain"
    augmented = datasets.FakeData(10, (3, 4, 4), transform=lambda image: "augmented")
    assert Subset(augmented, train.indices)[0][0] == "augmented"
    count(CLAIMS)


def test_keys_of_a_checkpoint_have_a_prefix(tmp_path):
    model, trainer, path = Lit(), make_trainer(), tmp_path / "last.ckpt"
    trainer.fit(model, points())
    trainer.save_checkpoint(path)
    weights = torch.load(path)["state_dict"]
    plain = nn.Linear(2, 2)
    weights = {key: value for key, value in weights.items() if key.startswith("model.")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight", "bias"'):
        plain.load_state_dict(weights)
    consume_prefix_in_state_dict_if_present(weights, "model.")
    plain.load_state_dict(weights)
    assert torch.equal(plain.weight, model.model.weight)
    count(CLAIMS)


def test_the_page():
    page = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    head, line, *rows = [row for row in page.splitlines() if row.startswith("|")]
    assert set(line) <= set("| -")
    versions = re.findall(r"\b([a-z]+) (\d+\.\d+\.\d+)", head)
    assert [name for name, _ in versions] == ["torch", "torchvision", "lightning", "torchmetrics"]
    for name, version in versions:
        assert importlib.metadata.version(name).split("+")[0] == version, name
    ours = {name for name in globals() if name.startswith("test_")} - {"test_the_page"}
    slow = "test_the_default_run_on_the_real_images"
    assert f"def {slow}(" in (ROOT / "tests" / "test_readme.py").read_text(encoding="utf-8")
    named = []
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4 and all(cells), row
        named += re.findall(r"^`(test_\w+)`$", cells[3])
    assert len(named) == len(rows) >= 20
    assert set(named) == ours | {slow}
