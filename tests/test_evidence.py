"""The proof watches from outside: it changes no bit, sees what it should, and survives a kill."""

from common.messages import BadInput
from common.proof import __main__ as scripts
from common.proof import evidence as module
from common.proof.compare import compare_stages
from common.proof.evidence import Evidence, read, together

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SIDES, count, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LOOP = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def main(lr=0.01):
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(60, 5, generator=draw), torch.randn(60, 1, generator=draw))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    loader = DataLoader(data, 7, generator=torch.Generator().manual_seed(1))
    for epoch in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
    return net
"""
PORT = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Lit(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

def main():
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(60, 5, generator=draw), torch.randn(60, 1, generator=draw))
    torch.manual_seed(0)
    module = Lit(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 1)))
    loader = DataLoader(data, 7, generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False)
    trainer.fit(module, loader)
    return module.net
"""
W = "    w = net[0].weight.data.flatten()\n    i = w.abs().argmax()\n"
ULP = W + "    w[i] = torch.nextafter(w[i], torch.tensor(9.0))\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function that writes a script, changed or not, and returns what watching it found."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def watched(text, *changes, argv=()):
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "script.py"
        path.write_text(text)
        found = scripts.watch(path, list(argv))
        return json.loads(json.dumps(found))  # as it goes from one process to the other

    return watched


def test_a_strangers_loop_and_its_port_are_equal(script):
    loop, port = script(LOOP), script(PORT)
    comparison = compare_stages(loop, port, scripts.STAGES)
    assert comparison.agree, comparison.first_difference
    assert [stage.compared for stage in comparison.stages] == [5, 4, 27, 4, 14, 1]
    assert list(loop["fingerprints"]["start"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    count("scripts of strangers, watched", 2)


END = "    return net"
CHANGES = {
    "other data": ("data", ("manual_seed(3)", "manual_seed(4)")),
    "another order": ("data", ("DataLoader(data, 7,", "DataLoader(data, 7, shuffle=True,")),
    "another seed": ("start", ("torch.manual_seed(0)", "torch.manual_seed(1)")),
    "one unit in the last place": ("start", ("    optimizer = ", ULP + "    optimizer = ")),
    "another learning rate": ("steps", ("lr=0.01", "lr=0.0101")),
    "no zero_grad": ("steps", ("            optimizer.zero_grad()\n", "")),
    "an epoch more": ("data", ("range(3)", "range(4)")),
    "one unit in the last place, at the end": ("weights", (END, ULP + END)),
    "a setting changed at the end": (
        "optimizer", (END, "    optimizer.param_groups[0]['lr'] = 1.0\n" + END),
    ),
    "a number drawn at the end": ("random", (END, "    torch.rand(1)\n" + END)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_at_its_stage(name, script):
    stage, change = CHANGES[name]
    comparison = compare_stages(script(LOOP), script(LOOP, change), scripts.STAGES)
    assert comparison.first_difference.name == stage, comparison.first_difference
    count("changes of a stranger's loop")


def test_nothing_is_equal_to_nothing(script):
    """A script that trains nothing has no evidence, and no evidence is no agreement."""
    idle = script("from torch import nn\n\ndef main():\n    return nn.Linear(2, 2)\n")
    assert compare_stages(idle, idle, scripts.STAGES).first_difference.name == "data"
    assert compare_stages(idle, idle, ["steps"]).first_difference is not None


def test_two_optimizers_and_no_network_returned(script):
    changes = [
        ("    return net\n", "    return None\n"),
        ("SGD(net.parameters()", "SGD(net[0].parameters()"),
        ("    loader = ", "    other = torch.optim.Adam(net[2].parameters())\n    loader = "),
        ("optimizer.step()\n", "optimizer.step()\n            other.step()\n"),
    ]
    found = script(LOOP, *changes)
    assert list(found["fingerprints"]["start"]) == [f"parameter {n}" for n in range(4)]
    names = found["fingerprints"]["optimizer"]
    assert "optimizer 0, parameter 0: momentum_buffer" in names
    assert "optimizer 1, parameter 1: exp_avg" in names


def test_arguments_are_passed_on(script):
    text = LOOP.replace("main(lr=0.01):", "main():\n    import sys\n    lr = float(sys.argv[1])")
    found = [script(text, argv=[lr]) for lr in ("0.02", "0.01")]
    assert compare_stages(*found, scripts.STAGES).first_difference.name == "steps"
    assert compare_stages(script(LOOP), found[1], scripts.STAGES).agree


@pytest.mark.parametrize(
    "text, sentence",
    [("x = 1\n", "has no function main"), ("def main(lr):\n    pass\n", "needs arguments")],
)
def test_a_script_that_cannot_be_watched(text, sentence, script):
    with pytest.raises(BadInput, match=sentence):
        script(text)


def test_a_loss_that_is_no_number_is_no_agreement(script):
    text = LOOP.replace("lr=0.01", "lr=1e30")
    comparison = compare_stages(script(text), script(text), scripts.STAGES)
    assert "nothing was learned" in comparison.first_difference.difference


@pytest.mark.slow
def test_from_the_shell(tmp_path):
    (tmp_path / "a.py").write_text(LOOP)
    (tmp_path / "b.py").write_text(LOOP.replace("momentum=0.9", "momentum=0.8"))
    command = [sys.executable, "-m", "common.proof", "a.py", "b.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert ended.returncode == 1 and "first in loss of every step: loss of step 3" in ended.stdout


def test_what_is_typed_wrongly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["a.py"], ["a", "b"], ["a.py", "none.py"]):
        with pytest.raises(BadInput, match=r"usage: python -m common.proof A.py B.py"):
            scripts.main(arguments)


# Watching changes nothing.


def a_loop(steps=6):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(24.0).view(8, 3))
    for _ in range(steps // 2):
        for (x,) in DataLoader(data, 4, shuffle=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    return net


def test_watching_changes_no_bit():
    bare = a_loop().state_dict()
    number = torch.rand(1)
    with Evidence() as evidence:
        watched = a_loop()
    assert torch.equal(torch.rand(1), number)  # nor does it draw a random number
    assert all(torch.equal(bare[name], value) for name, value in watched.state_dict().items())
    found = evidence.found(watched)
    assert len(found["train_loss"]) == 6 and len(found["fingerprints"]["start"]) == 6


@pytest.mark.parametrize("side", SIDES)
def test_a_lesson_reaches_the_same_bits_unwatched(side, tmp_path, monkeypatch):
    from helpers import NOISY, arguments, give, load_lesson, small_data

    watched = train(side, tmp_path, monkeypatch, lesson="optimize")
    lesson = load_lesson(side, "optimize")
    give(lesson, small_data(), NOISY["cifar10"], "optimize", monkeypatch)
    net = lesson.main(arguments(lesson, side, "optimize", tmp_path / "again"))
    ours, theirs = watched.net.state_dict(), net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and len(ours) == 9
    count("lessons watched and not")


def test_all_is_as_it_was_afterwards():
    places = [(torch.Tensor, "backward"), (DataLoader, "__iter__"), (torch, "save"),
              (module._BaseDataLoaderIter, "_next_index"), (module.Optimizer, "load_state_dict"),
              (module.EpochSampler, "__iter__"), (module.DeviceBatches, "__init__")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in places]
    with pytest.raises(ZeroDivisionError), Evidence():
        assert getattr(*places[0]) is not before[0]
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in places] == before
    count("observers taken off", len(places))


# What a run that can be resumed keeps.


def line(since, step, losses, **more):
    return json.dumps({"from": since, "global_step": step, "world": 1, "losses": losses,
                       "order": {},
                       "data": {}, **more})  # fmt: skip


def test_the_lines_that_lead_to_a_step(tmp_path):
    file = tmp_path / "evidence.jsonl"
    file.write_text("\n".join([
        line(0, 10, [1.0], start=[]), line(10, 20, [2.0]), line(20, 30, [3.0]),
        # Resumed from 10, by other checkpoints; the last line was cut short by a kill.
        "", line(10, 15, [4.0]), "", line(15, 25, [5.0]), '{"from": 25, "global_st',
    ]))  # fmt: skip
    for step, losses in ((10, [1.0]), (20, [1.0, 2.0]), (30, [1.0, 2.0, 3.0]), (15, [1.0, 4.0]),
                         (25, [1.0, 4.0, 5.0])):  # fmt: skip
        assert [loss for line in read(file, step) for loss in line["losses"]] == losses
        count("steps with evidence")
    for step in (5, 35):
        with pytest.raises(BadInput, match=f"does not reach step {step}"):
            read(file, step)
    with pytest.raises(BadInput, match="does not reach step 10"):
        read(tmp_path / "none.jsonl", 10)


def test_a_line_after_one_that_was_cut_short(tmp_path):
    file = tmp_path / "evidence.jsonl"
    file.write_text('{"from": 0, "global_step": 7, "los')
    with Evidence(file) as evidence:
        a_loop(steps=2)
        evidence._append(2)
    assert len(read(file, 2)) == 1 and len(read(file, 2)[0]["losses"]) == 2


def test_it_is_written_before_the_checkpoint(tmp_path, monkeypatch):
    file, seen = tmp_path / "evidence.jsonl", []
    save = lambda content, path: seen.append(file.exists() and len(read(file, 4)))  # noqa: E731
    monkeypatch.setattr(torch, "save", save)  # which the evidence then stands before
    with Evidence(file):
        a_loop(steps=4)
        torch.save({"weights": 1}, "x")  # not a checkpoint: nothing is written
        torch.save({"global_step": 4}, "x")
        torch.save({"global_step": 4}, "y")  # the best one, of the same step
    assert seen == [False, 1, 1]


def test_several_processes_make_one_line():
    lines = [json.loads(line(0, 4, [1.0, 3.0])), json.loads(line(0, 4, [2.0, 5.0]))]
    for number, each in enumerate(lines):
        each["order"] = {"0": [8, [number, 2 + number]]}
    merged = together(lines)
    assert merged["losses"] == [1.5, 4.0] and merged["order"] == {"0": [8, [0, 1, 2, 3]]}
