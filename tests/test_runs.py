"""What a run computes and leaves behind."""

from common import figures, folders, run
from common.data import count_batches
from common.folders import FILES
from common.messages import BadInput
from common.models import Net
from common.proof import fingerprints, watch
from common.run import default_threads

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from helpers import SIDES, arguments, count, give, load_lesson, small_data, train
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_metrics_by_hand_equal_torchmetrics(pairs):
    """Also where classes are absent from the truth, from the predictions, or from both."""
    truth, predicted = torch.tensor(pairs).T
    confusion = torch.bincount(10 * truth + predicted, minlength=100).reshape(10, 10)
    ours = METRICS(2.5 * len(pairs), confusion, "test")
    close = dict(rel=1e-6, abs=1e-7)
    assert torch.equal(confusion, tm.multiclass_confusion_matrix(predicted, truth, 10))
    for name, theirs in {
        "accuracy": tm.multiclass_accuracy(predicted, truth, 10, average="micro"),
        "f1": tm.multiclass_f1_score(predicted, truth, 10, average="macro"),
    }.items():
        assert ours[f"test_{name}"] == pytest.approx(theirs.item(), **close), name
    assert ours["test_loss"] == 2.5


METRICS = load_lesson("plain", "cifar").compute_metrics


def test_the_tutorials_network():
    assert sum(parameter.numel() for parameter in Net().parameters()) == 62_006
    assert Net()(torch.zeros(4, 3, 32, 32)).shape == (4, 10)


def test_limits_follow_the_trainers_rule():
    from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches

    for total in (1, 7, 100, 11_250):
        for limit in (1, 5, 1000, 1.0, 0.5, 0.999, 0.1):
            if int(total * limit) < 1:
                continue
            theirs = _parse_num_batches("training", total, limit)
            assert count_batches(total, limit) == theirs, (total, limit)
            count("limits")


def test_threads_follow_the_batch():
    assert default_threads(4) == default_threads(127) == 1
    assert 1 <= default_threads(128) <= 8


@pytest.mark.parametrize("side", SIDES)
def test_files(side, tmp_path, monkeypatch, capsys):
    draw = figures.draw
    module = load_lesson(side, "cifar")
    give(module, small_data(), Net, "cifar", monkeypatch)
    monkeypatch.setattr(figures, "draw", draw)
    args = arguments(module, side, "cifar", tmp_path)
    returned = watch.watch(module.main, args)
    watch.show(returned, args)
    folder = tmp_path / "cifar" / side
    assert {path.name for path in folder.iterdir()} - {"hparams.yaml"} == set(FILES)
    result = json.loads((folder / "result.json").read_text())
    assert result == json.loads(json.dumps(returned))
    for key in """
        lesson side data seed hyperparameters versions device threads train_loss val_loss
        val_accuracy val_f1 test_loss test_accuracy test_f1 test_accuracy_per_class
        confusion_matrix checkpoints train_seconds weights_sha256
    """.split():
        assert key in result, key
    assert result["side"] == side and result["threads"] == 1 and result["device"] == "cpu"
    assert len(result["train_loss"]) == 30 and all(map(math.isfinite, result["train_loss"]))
    assert [len(result[f"val_{name}"]) for name in ("loss", "accuracy", "f1")] == [2, 2, 2]
    matrix = torch.tensor(result["confusion_matrix"])
    assert matrix.shape == (10, 10) and matrix.sum() == 140
    truth = small_data().test.labels
    assert torch.equal(matrix.sum(1), truth.bincount(minlength=10))
    assert result["test_accuracy"] == pytest.approx((matrix.diag().sum() / 140).item())
    assert set(result["versions"]) >= {"python", "torch", "torchvision", "lightning"}
    assert result["hyperparameters"]["lr"] == 0.02
    # sha256sum, typed by a newcomer, gives what the table and result.json say.
    content = (folder / "weights.pt").read_bytes()
    assert result["weights_sha256"] == hashlib.sha256(content).hexdigest()
    # The weights load into the bare network, and give the same answers.
    net = Net()
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    images, labels = small_data().test.__getitems__(list(range(140)))
    with torch.no_grad():
        right = (net.eval()(images).argmax(1) == labels).sum()
    assert right == matrix.diag().sum()
    said = capsys.readouterr().out
    assert "accuracy" in said and result["weights_sha256"][:16] in said
    for name in FILES:
        if name.endswith(".png"):
            picture = np.array(Image.open(folder / name).convert("RGB"))
            # Something is drawn in every quarter, not the heading alone.
            for half in np.array_split(picture, 2):
                for quarter in np.array_split(half, 2, axis=1):
                    assert len(np.unique(quarter.reshape(-1, 3), axis=0)) > 50, name
            count("pictures")


def test_a_network_that_was_not_tested_is_noticed(tmp_path, monkeypatch, capsys):
    """The runner tests what main returns once more: another network than the logged one shows."""
    module = load_lesson("plain", "cifar", ("    return net\n", "    return Net()\n"))
    give(module, small_data(train=600), Net, "cifar", monkeypatch)
    args = arguments(module, "plain", "cifar", tmp_path, max_epochs=3, lr=0.01)
    watch.show(watch.watch(module.main, args), args)
    assert "it is not the one that was tested" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, DataParallel really splits")
def test_dataparallel_leaves_no_prefix(tmp_path, monkeypatch):
    """On a machine without GPU, DataParallel hands everything through: the wrapping is the same."""
    one = train("plain", tmp_path, monkeypatch)
    wrapped = []
    original = torch.nn.DataParallel.__init__
    monkeypatch.setattr(
        torch.nn.DataParallel,
        "__init__",
        lambda self, *a, **k: wrapped.append(1) or original(self, *a, **k),
    )
    monkeypatch.setattr(run, "_check_devices", lambda args: None)  # there is one, at most
    two = train("plain", tmp_path, monkeypatch, devices=2)
    assert wrapped == [1]
    assert one["fingerprints"]["weights"] == two["fingerprints"]["weights"]
    assert one["weights_sha256"] == two["weights_sha256"]


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_that_is_no_number_ends_well(side, tmp_path, monkeypatch, capsys):
    """Too large a learning rate, which newcomers try: a result, and a sentence that says so."""
    module = load_lesson(side, "cifar")
    give(module, small_data(), Net, "cifar", monkeypatch)
    args = arguments(module, side, "cifar", tmp_path, lr=1e30)
    watch.show(watch.watch(module.main, args), args)
    text = (tmp_path / "cifar" / side / "result.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert None in json.loads(text)["train_loss"]
    assert "is not a number: nothing was learned" in capsys.readouterr().out


def test_a_complete_run_is_kept_when_another_starts(tmp_path, monkeypatch):
    folder = tmp_path / "cifar" / "plain"
    for seed in (1, 2, 3):
        train("plain", tmp_path, monkeypatch, seed=seed)
    seeds = [
        json.loads((path / "result.json").read_text())["seed"]
        for path in (folder, folder.with_name("plain.previous"))
    ]
    assert seeds == [3, 2]
    # A run that was stopped does not take the place of the complete one.
    (folder / "result.json").unlink()
    folders.start_folder(folder)
    assert json.loads((folder.with_name("plain.previous") / "result.json").read_text())["seed"] == 2
    assert list(folder.iterdir()) == []


def test_what_is_refused_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    """The folder is made ready where a lesson first asks for it: after it has its images."""
    folder = tmp_path / "cifar" / "plain"
    train("plain", tmp_path, monkeypatch)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BadInput, match="limit-val-batches"):
        train("plain", tmp_path, monkeypatch, limit_val_batches=0.001)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(before) == 3 and not folder.with_name("plain.previous").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"before")

    def break_off(temporary):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        folders.write_whole(path, break_off)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_fingerprints_are_exact():
    a = torch.zeros(3)
    b = torch.tensor([0.0, 0.0, 1e-45])
    assert fingerprints.fingerprint(a) != fingerprints.fingerprint(b)
    assert fingerprints.fingerprint(a)["sha256"] == hashlib.sha256(bytes(12)).hexdigest()
    assert fingerprints.fingerprint(a) != fingerprints.fingerprint(a.double())
    assert fingerprints.fingerprint(a) != fingerprints.fingerprint(a.view(3, 1))
    assert fingerprints.fingerprint(torch.ones(2, 3).T) == fingerprints.fingerprint(
        torch.ones(3, 2)
    )
