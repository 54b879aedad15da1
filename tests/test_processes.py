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
from common import run
from common.data import processes
from common.models import Net
from pathlib import Path
with pytest.MonkeyPatch.context() as monkeypatch:
    # The lesson cifar asks for two GPUs; the Trainer also takes two processes on the CPU.
    monkeypatch.setattr(run, "_check_devices", lambda args: None)
    result = train("lightning", Path({folder!r}), monkeypatch, model=Net, devices=2)
if processes()[0] == 0:
    Path({folder!r}, "two.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_share_the_batch(tmp_path, monkeypatch):
    ours = train("plain", tmp_path, monkeypatch, model=Net)
    # DDP starts its processes by running the script anew: it needs one of its own.
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "two.json").read_text())
    # The same images, in the same order, in batches of eight together.
    assert result["fingerprints"]["data"] == ours["fingerprints"]["data"]
    assert result["fingerprints"]["start"] == ours["fingerprints"]["start"]
    # Gradients of two halves are averaged: equal but for rounding.
    assert result["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-5)
    folders = [tmp_path / "cifar" / side for side in ("lightning", "plain")]
    theirs, own = (torch.load(folder / "weights.pt") for folder in folders)
    assert theirs.keys() == own.keys() and len(own) == 10
    for name, tensor in own.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)
    # Every test image is counted once.
    assert sum(map(sum, result["confusion_matrix"])) == 140
    assert result["confusion_matrix"] == ours["confusion_matrix"]
    assert result["test_loss"] == pytest.approx(ours["test_loss"], rel=1e-5)
    assert result["val_f1"] == pytest.approx(ours["val_f1"], rel=1e-5)
    count("runs of one process and of two")
