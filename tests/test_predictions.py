"""The lesson `predict`: answers streamed to the disk, in order, from one process and from two."""

from common import SIDES
from common import predict as command
from common.messages import BadInput
from common.proof.compare import compare_results
from common.proof.lessons import load

import contextlib

import lightning as L
import numpy as np
import pytest
import torch
from helpers import WITH_CHECKPOINTS, Noisy, assert_agree, count, small_data, some, train
from PIL import Image
from test_parallel import Groups
from torch import nn
from torch.utils.data import DataLoader

onnx = pytest.importorskip("onnx")
ONE = dict(lesson="predict", devices=1, max_epochs=1)
OPTIONS = {
    "defaults": {},
    "two epochs": {"max_epochs": 2},
    "a part of the images": {"limit_test_batches": 2, "limit_train_batches": 5},
    "a share of them": {"limit_test_batches": 0.4, "batch_size": 16},
    "ONNX": {"onnx": True, "limit_test_batches": 1},
}


def answers(folder, side):
    return np.load(folder / "predict" / side / "answers.npy")


@pytest.mark.parametrize("name", some(OPTIONS))
def test_each_option(name, tmp_path, monkeypatch, capsys):
    runs = [train(side, tmp_path, monkeypatch, **ONE | OPTIONS[name]) for side in SIDES]
    assert_agree(compare_results(*runs), WITH_CHECKPOINTS)
    ours, theirs = (answers(tmp_path, side) for side in SIDES)
    assert (ours == theirs).all() and ours.dtype == np.float32 and len(ours) >= 50
    assert np.allclose(ours.sum(1), 1, atol=1e-6)
    # What it says of the images is what the test counted.
    data, (counts,) = small_data(lesson="predict"), [torch.tensor(runs[0]["confusion_matrix"])]
    right = (ours.argmax(1) == data.test.labels[: len(ours)].numpy()).sum()
    assert right == counts.diag().sum() and counts.sum() == len(ours)
    assert not list(tmp_path.glob("predict/*/*.part"))
    said = capsys.readouterr().out.count("ONNX's logits differ from PyTorch's by")
    assert said == (2 if "onnx" in OPTIONS[name] else 0)
    count("options of predict")


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with contextlib.closing(Groups(tmp_path_factory.mktemp("groups"))) as groups:
        yield groups


# Two processes do not divide the images; four have batches of several sizes.
TOGETHER = {"two": (2, dict(sizes=(120, 33, 35))), "four": (4, dict(sizes=(120, 130, 141)))}


@pytest.mark.parametrize("name", some(TOGETHER, 2))
def test_several_processes_write_the_answers_in_order(name, groups):
    world, settings = TOGETHER[name]
    settings = settings | {k: v for k, v in ONE.items() if k != "devices"}
    runs = [groups(world, side, **settings)[0] for side in SIDES]
    assert_agree(compare_results(*(run.result for run in runs)), WITH_CHECKPOINTS)
    ours, theirs = (np.load(run.folder / "answers.npy") for run in runs)
    assert len(ours) == settings["sizes"][2] and (ours == theirs).all()
    # One process alone says the same of each image, but for rounding: its batches are larger.
    net = Noisy()
    net.load_state_dict(runs[0].state())
    images, _ = small_data(*settings["sizes"], lesson="predict").test.__getitems__(
        list(range(len(ours)))
    )
    with torch.inference_mode():
        alone = net.eval()(images).softmax(1).numpy()
    assert np.abs(ours - alone).max() < 1e-6
    # And in another order that would be seen.
    assert np.abs(ours - np.concatenate([alone[r::world] for r in range(world)])).max() > 1e-3
    count("groups that predict")


# A change on one side, and what must differ first.
CHANGES = {
    "train mode": (
        "plain", "weights",  # BatchNorm goes on learning from what it is to answer
        ("    net.eval()\n    for images", "    net.train()\n    for images"),
    ),
    "logits in place of probabilities": (
        "plain", "checkpoints", ("net(images.to(device)).softmax(1))", "net(images.to(device)))"),
    ),
    "log-probabilities": (
        "lightning", "checkpoints", ("self(images).softmax(1)", "self(images).log_softmax(1)"),
    ),
    "rounded to half precision": (
        "lightning", "checkpoints",
        ("probabilities.cpu().numpy()", "probabilities.half().float().cpu().numpy()"),
    ),
    "the validation images": (
        "lightning", "checkpoints",
        ("return self.test_dataloader()", "return self.val_dataloader()"),
    ),
    "written from the end": (
        "plain", "checkpoints", ("whole[rank::world] = ", "whole[rank::world][::-1] = "),
    ),
    "softmax over the images": ("plain", "checkpoints", (".softmax(1))", ".softmax(0))")),
    "another network is tested than predicts": (
        "plain", "weights",
        ("    return net\n", "    net.head.bias.data.add_(1)\n    return net\n"),
    ),
    "a random number drawn by the prediction": (
        "plain", "random",
        ("    writer.file.close()\n", "    writer.file.close()\n    torch.rand(1)\n"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        return {side: train(side, folder, monkeypatch, **ONE) for side in SIDES}


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes, **ONE)
    (other,) = set(SIDES) - {side}
    first = compare_results(changed, unchanged[other]).first_difference
    assert first.name == stage, first
    assert stage != "checkpoints" or "answers.npy" in first.difference
    count("negative controls")


# What docs/predict.md tells of the Trainer.


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())

    def forward(self, x):
        return self.net(x)

    def predict_step(self, batch, batch_idx):
        return batch


def quiet(**more):
    off = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **off, **more)


def test_drop_last_is_ignored():
    loader = DataLoader(torch.arange(7.0)[:, None], 2, drop_last=True)
    assert len(loader) == 3
    assert sum(map(len, quiet().predict(Lit(), loader))) == 7


def test_answers_are_inference_tensors():
    loader = DataLoader(torch.arange(4.0)[:, None], 2)

    class Answers(Lit):
        def predict_step(self, batch, batch_idx):
            return self.net(batch)

    first, *_ = quiet().predict(Answers(), loader)
    assert first.is_inference()


def test_to_onnx_exports_the_mode_that_the_module_has(tmp_path):
    nodes = {}
    for mode in (True, False):
        model = Lit()
        model.net.train(mode)
        model.to_onnx(tmp_path / "net.onnx", torch.zeros(2, 1), dynamo=True, verbose=False)
        nodes[mode] = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert "Dropout" in nodes[True] and "Dropout" not in nodes[False]


# `make predict` with an exported network.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    module = load("plain", "predict")
    net = module.NormNet()
    module.export(net, torch.rand(2, 3, 32, 32), folder / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return net, folder


def test_make_predict_takes_what_was_exported(exported, capsys):
    net, folder = exported
    command.main([str(folder / "model.onnx"), str(folder / "photo.png")])
    said = capsys.readouterr().out
    network = next(each for each in command.NETWORKS if each.lesson == "predict")
    with torch.no_grad():
        shares = net(command.picture(folder / "photo.png", network)).softmax(1)[0]
    assert f"Most likely: class {shares.argmax()}, {shares.max():.1%}" in said


@pytest.mark.parametrize("content, words", [
    (b"", "is no network"), (b"no network", "is no network"), (None, "No such file"),
])  # fmt: skip
def test_what_is_no_exported_network_is_refused(content, words, exported, tmp_path):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((BadInput, OSError), match=words):
        command.main([str(path), str(exported[1] / "photo.png")])
    count("files that are no network")


def test_without_the_extra_it_is_one_sentence(tmp_path, monkeypatch):
    usual = command.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else usual(name)
    )
    with pytest.raises(BadInput, match="needs the package onnxruntime"):
        train("plain", tmp_path, monkeypatch, **ONE, onnx=True)
