"""The lesson `fabric`: one training on three rungs, by hand, on Fabric and on the Trainer."""

from common import sides_of
from common.environment import WITH_PROCESSES
from common.proof.compare import compare_results

import contextlib
import subprocess
import sys

import pytest
import torch
from helpers import STAGES, assert_agree, count, some, train
from lightning.fabric import Fabric
from test_parallel import Groups
from torch import nn

RUNGS = sides_of("fabric")
OPTIONS = {
    "defaults": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "no accumulation": {"accumulate_grad_batches": 1},
    "three batches in a step, the last ones alone": {"accumulate_grad_batches": 4},
    "clipped hard": {"gradient_clip_val": 0.01},
    "not clipped": {"gradient_clip_val": 0.0},
    "limits": {"limit_train_batches": 7, "limit_val_batches": 1, "limit_test_batches": 2},
    "bfloat16, all at once": {
        "precision": "bf16-mixed", "accumulate_grad_batches": 3, "gradient_clip_val": 0.1,
        "momentum": 0.5, "seed": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", some(OPTIONS))
def test_each_option_on_three_rungs(name, tmp_path, monkeypatch):
    a, *others = [
        train(side, tmp_path, monkeypatch, lesson="fabric", devices=1, **OPTIONS[name])
        for side in RUNGS
    ]
    assert [run["side"] for run in (a, *others)] == ["plain", "lightning", "trainer"]
    for other in others:
        assert_agree(compare_results(a, other), STAGES)
        count("comparisons of two rungs")


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with contextlib.closing(Groups(tmp_path_factory.mktemp("groups"))) as groups:
        yield groups


# An image is left out of each epoch, and two processes do not divide those to evaluate on.
ODD = dict(sizes=(121, 33, 35))
TOGETHER = {
    "two processes": (2, ODD),
    "two processes in bfloat16": (2, {"precision": "bf16-mixed"}),
    "an incomplete group of batches": (2, {"accumulate_grad_batches": 4}),
    "four processes": (4, {"limit_val_batches": 1}),
}


@pytest.mark.parametrize("name", some(TOGETHER))
def test_several_processes_on_three_rungs(name, groups):
    world, settings = TOGETHER[name]
    a, *others = [groups(world, side, lesson="fabric", **settings)[0] for side in RUNGS]
    for other in others:
        assert_agree(compare_results(a.result, other.result), STAGES)
        assert a.weights == other.weights
        count("comparisons of two rungs")


def test_two_processes_train_on_the_batches_of_one(groups):
    one, two = (groups(n, "plain", lesson="fabric")[0].result for n in (1, 2))
    prints = [run["fingerprints"]["data"] for run in (one, two)]
    assert prints[0] == prints[1] and len(prints[0]) >= 8


# One change on one rung, and the stage that must differ first.
CHANGES = {
    "no set_epoch": ("plain", "data", ("        train_loader.sampler.set_epoch(epoch)\n", "")),
    "a look at the loader before": (
        "lightning", "data",
        ("    #: One seed for all", "    next(iter(train_loader))\n    #: One seed for all"),
    ),
    "the loss not divided": (
        "lightning", "steps", ("fabric.backward(loss / group)", "fabric.backward(loss)"),
    ),
    "clipped before the group is complete": (
        "plain", "steps",
        ("            if not due:\n",
         "            clip_grad_norm_(net.parameters(), args.gradient_clip_val)\n"
         "            if not due:\n"),
    ),
    "not clipped": (
        "trainer", "steps", ("        gradient_clip_val=args.gradient_clip_val,\n", ""),
    ),
    "gradients never cleared": ("lightning", "steps", ("            optimizer.zero_grad()\n", "")),
    "no step on the last group": (
        "plain", "steps", ("% group == 0 or batch == len(train_loader)", "% group == 0"),
    ),
    "dropout goes on from the first seed": (
        "lightning", "steps",
        ("    #: As the Trainer does with several processes: dropout begins from the seed.\n"
         "    fabric.seed_everything(args.seed, verbose=False)\n", ""),
    ),
    "the test does not begin from the seed": (
        "plain", "random",
        ("    seed_everything(args.seed)\n    test =", "    test ="),
    ),
    "a mean over batches": (
        "lightning", "metrics",
        ("mean.update(F.nll_loss(output, labels).double(), len(labels))",
         "mean.update(F.nll_loss(output, labels).double())"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        return {side: train(side, folder, monkeypatch, **SETTINGS) for side in RUNGS}


SETTINGS = dict(lesson="fabric", devices=1, accumulate_grad_batches=4, gradient_clip_val=0.3)


@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes, **SETTINGS)
    for other in set(RUNGS) - {side}:
        comparison = compare_results(changed, unchanged[other])
        assert comparison.first_difference.name == stage, comparison.first_difference
    count("negative controls")


def test_a_rung_is_started_as_several_processes():
    assert {"fabric", "fabric_trainer"} <= set(WITH_PROCESSES)


# What Fabric does silently; docs/fabric.md tells of each.


@pytest.fixture(scope="module")
def half():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    return fabric


def test_set_epoch_counts_iterations(half):
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    data = torch.arange(4)
    sampler = Sampler(data)
    loader = half.setup_dataloaders(
        torch.utils.data.DataLoader(data, 2, sampler=sampler), use_distributed_sampler=False
    )
    next(iter(loader)), next(iter(loader))
    list(loader)
    assert sampler.epochs == (0, 1, 2)


def test_a_layer_called_directly_is_not_under_autocast(half):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.seen = []

        def forward(self, x):
            y = self.layer(x)
            self.seen.append(y.dtype)
            return y

    net = Two()
    model = half.setup(net)
    assert model(torch.ones(1, 2)).dtype == torch.float32 and net.seen == [torch.bfloat16]
    assert model.layer(torch.ones(1, 2)).dtype == torch.float32


TWO = """
import torch, lightning as L
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
batches = lambda: DataLoader(torch.arange(8.)[:, None], 2)
fabrics = [b.flatten().tolist() for b in fabric.setup_dataloaders(batches())]

class Lit(L.LightningModule):
    got = []
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, _):
        self.got.append(batch.flatten().tolist())
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
L.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp",
          enable_model_summary=False, **quiet).fit(Lit(), batches())
changed = torch.ones(1) * (fabric.global_rank + 1)
fabric.all_reduce(changed, reduce_op="sum")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
    def forward(self, x):
        return self.layer(x)
gradients = []
for direct in (False, True):
    model = fabric.setup(Net())
    x = torch.ones(1, 1) * (fabric.global_rank + 1)
    fabric.backward((model.layer(x) if direct else model(x)).sum())
    gradients.append(model.module.layer.weight.grad.item())
if fabric.global_rank == 0:
    print("FOUND", repr((fabrics, Lit.got, changed.item(), gradients)))
"""


@pytest.mark.slow
def test_what_differs_with_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run([sys.executable, *run], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (line,) = [each for each in ended.stdout.splitlines() if each.startswith("FOUND")]
    fabrics, trainers, changed, gradients = eval(line.removeprefix("FOUND "))
    # Fabric keeps the order of a loader that does not shuffle; the Trainer shuffles it.
    assert fabrics == [[0.0, 2.0], [4.0, 6.0]]
    assert sorted(map(sorted, trainers)) != fabrics and len(trainers) == 2
    assert changed == 3.0  # all_reduce has changed its argument
    # Averaged over both processes (1 and 2), and that of the first process alone.
    assert gradients == [1.5, 1.0]
