"""Parity that explains itself: the steps around the first difference, the cause, the picture."""

from common.proof import explain

from types import SimpleNamespace

import numpy as np
import pytest
import samebits
from helpers import count
from PIL import Image

FEW = ["--data", "shapes", "--accelerator", "cpu", "--max-epochs", "1", "--limit-val-batches", "1",
       "--limit-test-batches", "1", "--threads", "1"]  # fmt: skip


def traced(monkeypatch, folder, lesson, first, last, change=None, *more):
    """Trace both sides, of which Lightning's is changed; return the diagnosis."""
    load = explain.load
    for side in ("plain", "lightning"):
        changes = [change] if change and side == "lightning" else []
        monkeypatch.setattr(explain, "load", lambda s, n, c=changes: load(s, n, *c))
        path = folder / f"{side}.trace"
        argv = [*FEW, *more, "--runs-dir", str(folder)]
        explain.trace(side, lesson, path, first, last, argv)
    monkeypatch.setattr(explain, "load", load)
    return samebits.compare(folder / "plain.trace", folder / "lightning.trace")


NESTEROV = ("lr=lr, momentum=momentum)", "lr=lr, momentum=momentum, nesterov=True)")
LATE = (
    '        self.log("train_loss", loss, prog_bar=True)\n',
    '        self.log("train_loss", loss, prog_bar=True)\n'
    "        if self.global_step == 29:\n"
    "            self.optimizers().param_groups[0]['momentum'] = 0.8\n",
)


@pytest.mark.parametrize(
    "first, last, change, step, cause",
    [
        (1, 4, NESTEROV, 1, "Another setting of the optimizer: nesterov"),
        (29, 33, LATE, 30, "Another setting of the optimizer: momentum"),
        (29, 33, None, None, None),
    ],
)
def test_the_cause_is_named(first, last, change, step, cause, tmp_path, monkeypatch):
    diagnosis = traced(monkeypatch, tmp_path, "cifar", first, last, change)
    if change is None:
        assert diagnosis.equal and diagnosis.steps == last, str(diagnosis)
    else:
        assert diagnosis.step == step and diagnosis.causes[0].name == cause, str(diagnosis)
    count("sides traced around a step", 2)


def test_it_traces_around_the_first_loss_that_differs(monkeypatch, capsys):
    """By losses alone: which steps are traced, also where batches are accumulated."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=3, stderr="the last words")

    monkeypatch.setattr(explain.subprocess, "run", run)
    losses = [[1.0] * 50, [1.0] * 40 + [2.0] * 10]
    args = SimpleNamespace(lesson="cifar", devices=1, max_epochs=2)
    said = explain.explain(args, ["--lr", "0.1"], "steps", losses)
    assert said == "The plain side could not be traced; its last words were: the last words"
    assert commands[0][7:9] == ["39", "44"] or commands[0][6:8] == ["39", "44"], commands[0]
    assert commands[0][-4:-2] == ["--lr", "0.1"] and commands[0][-2] == "--runs-dir"
    args.accumulate_grad_batches = 4
    explain.explain(args, [], "steps", losses)
    assert ["9", "14"] in [commands[1][6:8], commands[1][7:9]], commands[1]
    assert "Trace one process" in explain.explain(
        SimpleNamespace(lesson="parallel", devices=2), [], "steps", losses
    )
    assert "averages" in explain.explain(args, [], "metrics", losses) and len(commands) == 2


@pytest.mark.parametrize("difference", [0.0, 1e-6, None])
def test_the_picture_of_both_curves(difference, tmp_path):
    ours = [2.3 - 0.01 * n for n in range(60)]
    theirs = [x + (difference or 0) * (n > 30) for n, x in enumerate(ours)]
    theirs[50] = None if difference is None else theirs[50]
    explain.draw([ours, theirs], "cifar on shapes: both sides", tmp_path / "a" / "parity.png")
    picture = np.array(Image.open(tmp_path / "a" / "parity.png").convert("RGB"))
    for half in np.array_split(picture, 2):
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 20
    count("pictures of both sides")
