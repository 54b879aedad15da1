"""Two processes of Lightning's DDP train on the same global batches as one process."""

from common.models import Net

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import count, train

SCRIPT = """
import json, sys
import pytest, torch
sys.path.insert(0, {tests!r})
from helpers import train
from common.data import processes
from common.models import Net
with pytest.MonkeyPatch.context() as monkeypatch:
    run = train("lightning", __import__("pathlib").Path({folder!r}), monkeypatch, model=Net,
                devices=2)
if processes()[0] == 0:
    weights = {{name: tensor.tolist() for name, tensor in run.model.state_dict().items()}}
    with open({folder!r} + "/two.json", "w") as file:
        json.dump([run.result(), weights], file)
"""


@pytest.mark.slow
def test_two_processes_share_the_batch(tmp_path, monkeypatch):
    one = train("plain", tmp_path, monkeypatch, model=Net)
    # DDP starts its processes by running the script anew: it needs one of its own.
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result, weights = json.loads((tmp_path / "two.json").read_text())
    ours = one.result()
    # The same images, in the same order, in batches of eight together.
    assert result["fingerprints"]["data"] == ours["fingerprints"]["data"]
    assert result["fingerprints"]["start"] == ours["fingerprints"]["start"]
    # Gradients of two halves are averaged: equal but for rounding.
    assert result["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-5)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(torch.tensor(weights[name]), tensor, rtol=1e-4, atol=1e-6)
    # Every test image is counted once.
    assert sum(map(sum, result["confusion_matrix"])) == 140
    assert result["confusion_matrix"] == ours["confusion_matrix"]
    assert result["test_loss"] == pytest.approx(ours["test_loss"], rel=1e-5)
    assert result["val_f1"] == pytest.approx(ours["val_f1"], rel=1e-5)
    count("runs of one process and of two")
