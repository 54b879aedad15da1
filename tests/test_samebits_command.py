"""Beside a diagnosis: one run alone, ranks, a page, JSON, where exactly, a fixture."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import samebits
import torch
from helpers import count
from samebits import Trace, check, compare
from samebits.__main__ import main
from torch import nn

pytest_plugins = "pytester"


def make(path, rate=0.1, steps=3, build=None, change=None, rank=0, first_sample=None, **more):
    """Train a little; another rank has other samples, which make the same gradients."""
    torch.manual_seed(0)
    net = (build or (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))()
    with Trace(net, path=path, **more):
        optimizer = torch.optim.SGD(net.parameters(), rate)
        for i in range(steps):
            if change:
                change(net, optimizer, i)
            optimizer.zero_grad()
            samples = torch.cat(
                [torch.ones(4, 2) * i, torch.full((4, 1), -0.0 if rank else 0.0)], 1
            )
            if first_sample is not None:
                samples[0] = first_sample
            nn.functional.cross_entropy(net(samples), torch.arange(4) % 2).backward()
            optimizer.step()
    return path


@pytest.fixture
def traces(tmp_path):
    return str(make(tmp_path / "a.trace")), str(make(tmp_path / "b.trace", rate=0.2))


def test_exit_statuses(traces, tmp_path, capsys):
    a, b = traces
    assert main([a, a]) == 0 and main([a, b]) == 1
    with pytest.raises(samebits.BadInput):
        main([a, str(tmp_path / "none")])


def test_json(traces, capsys):
    assert main([*traces, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["stage"] == "update" and said["equal"] is False and said["step"] == 1
    assert said["causes"][0]["name"] == "Another learning rate"


def test_a_page_needs_nothing_else(traces, tmp_path, capsys):
    target = tmp_path / "it.html"
    assert main([*traces, "--html", str(target)]) == 1
    page = target.read_text()
    assert "Another learning rate" in page and page.count("<rect") == len(samebits.STAGES) + 2
    assert page.count("<tr") == len(samebits.STAGES) + 1 and "<svg" in page
    assert not re.search(r"<(script|link|img)|src=|url\(", page)
    assert not list(tmp_path.glob("*.part"))
    hostile = samebits.Diagnosis(1, "update", 1, "<script>alert(1)</script>\x1b[2J")
    from samebits.page import page as write

    assert "<script" not in write(hostile, "<a>", "b") and "\x1b" not in write(hostile, "a", "b")


# One run alone.


def frozen(net, optimizer, i):
    optimizer.param_groups[0]["params"] = list(net[2].parameters())


class Empty(nn.Linear):
    """A parameter without values, as some layers have that are not used."""

    def __init__(self):
        super().__init__(3, 2)
        self.none = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return super().forward(x) + self.none.sum()


def normalized():
    """A bias before BatchNorm, on which nothing depends but for rounding."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.constant_(net[0].bias, 10.0)
    return net


ALONE = {
    "nothing": ({}, None),
    "no values": (dict(build=Empty), None),
    "a bias that BatchNorm takes away": (
        dict(build=normalized, steps=1, first_sample=torch.tensor([0.5, -1.0, 2.0])), None),
    "a part that the optimizer lacks": (dict(change=frozen), "Parameters that the optimizer was"),
    "a part that never moves": (
        dict(change=lambda net, *_: net[0].register_forward_hook(lambda m, i, o: o.detach())),
        "Parameters that should train, and never move"),
    "a rate that is infinite": (dict(rate=float("inf")), "A gradient is not finite"),
    "eval mode": (dict(change=lambda net, *_: net.eval()), "model.train() is missing"),
    "an output that is always 0": (
        dict(build=lambda: nn.Sequential(nn.Linear(3, 4), nn.Threshold(1e9, 0.0), nn.Linear(4, 2))),
        "Gradients that are always zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_one_run_alone(name, tmp_path, capsys):
    changes, cause = ALONE[name]
    path = make(tmp_path / "it.trace", **changes)
    found = check(path)
    assert main(["check", str(path)]) == (1 if cause else 0)
    said = capsys.readouterr().out
    if cause is None:
        assert not found and said.startswith("Nothing is wrong")
    else:
        assert any(one.name.startswith(cause) for one in found), found
        assert cause in said
    count("runs checked alone")


def test_an_optimizer_of_another_network(tmp_path):
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with Trace(net, path=tmp_path / "it.trace"):
        net(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
    [cause] = check(tmp_path / "it.trace")
    assert cause.name == "The optimizer does not hold the network's parameters"


# Several processes.


def test_ranks_of_a_run(tmp_path, capsys):
    """As several processes write them: here one after the other."""
    a, b = str(tmp_path / "a.trace"), str(tmp_path / "b.trace")
    for rank in (0, 1):
        make(tmp_path / f"a.rank{rank}.trace", rank=rank)
        make(tmp_path / f"b.rank{rank}.trace", rank=rank)
    assert main([a, b]) == 0 and "2 processes" in capsys.readouterr().out
    assert main(["check", a]) == 0
    make(tmp_path / "b.rank1.trace", rate=0.2, rank=1)
    assert main([a, b]) == 1
    said = capsys.readouterr().out
    assert "this is rank 1" in said and "Within B: Replicas drift apart" in said
    assert main(["check", b]) == 1 and "Replicas drift" in capsys.readouterr().out
    (tmp_path / "b.rank0.trace").unlink()
    with pytest.raises(samebits.BadInput, match="no trace of rank 0"):
        main([a, b])


def test_all_ranks_get_the_same_samples(tmp_path, capsys):
    """As where a DistributedSampler is missing: the run is valid, and each process learns alike."""
    a, b = str(tmp_path / "a.trace"), str(tmp_path / "b.trace")
    for rank in (0, 1):
        make(tmp_path / f"a.rank{rank}.trace", rank=rank)
        make(tmp_path / f"b.rank{rank}.trace")
    assert main(["check", b]) == 1 and main([a, b]) == 0
    said = capsys.readouterr().out
    assert said.count("All processes get the same samples: a DistributedSampler is missing") == 2
    assert "is missing, in B?" in said
    # Where another batch is what differs first, it is the first cause.
    for rank in (0, 1):
        make(tmp_path / f"a.rank{rank}.trace", rank=rank, first_sample=rank + 1.0)
    assert main([b, a]) == 1
    said = capsys.readouterr().out
    assert "1. All processes get the same samples" in said and "in A, in each of the first" in said


def test_what_is_wrong_in_one_rank_alone_is_said(tmp_path, capsys):
    for rank in (0, 1):
        make(tmp_path / f"it.rank{rank}.trace", rank=rank,
             change=(lambda net, *_: net.eval()) if rank else None)  # fmt: skip
    assert main(["check", str(tmp_path / "it.trace")]) == 1
    said = capsys.readouterr().out
    assert "model.train() is missing" in said and "in rank 1: all 4 modules" in said


TWO = """
import sys, torch, torch.distributed as dist, torch.distributed.fsdp, torch.distributed.optim
from samebits import Trace
_, rank, meet, path, kind, change = sys.argv
dist.init_process_group("gloo", init_method="file://" + meet, rank=int(rank), world_size=2)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
model = torch.nn.parallel.DistributedDataParallel(net) if kind in ("ddp", "zero") else net
if kind == "fsdp":
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.fsdp.fully_shard(net, mesh=mesh)
if kind == "fsdp1":
    net = torch.distributed.fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    model = net
make = torch.distributed.optim.ZeroRedundancyOptimizer if kind == "zero" else None
optimizer = (make(net.parameters(), torch.optim.SGD, lr=0.1) if make
             else torch.optim.SGD(net.parameters(), 0.1))
with Trace(net, path=path):
    for i in range(3):
        labels = torch.arange(4) % 2
        if change == "labels" and i == 1 and rank == "1":
            labels = 1 - labels
        optimizer.zero_grad()
        images = torch.arange(12.).reshape(4, 3) / 10 + int(rank) * (change != "samples") + i
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
dist.destroy_process_group()
"""


def in_two(folder, path, kind, change=""):
    meet = folder / f"meet{path.stem}"
    started = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(meet), path, kind, change],
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in (0, 1)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(list(folder.glob(f"{path.stem}.rank*.trace"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp1", "zero", "alone"])
def test_two_processes_write_a_file_each(kind, tmp_path):
    path = tmp_path / "it.trace"
    in_two(tmp_path, path, kind)
    assert main(["check", str(path)]) == (1 if kind == "alone" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_one_process_got_is_found_there(kind, tmp_path, capsys):
    """The others see it in their gradients alone, which are averaged over the processes."""
    a, b, again = (tmp_path / f"{name}.trace" for name in ("a", "b", "again"))
    for path, change in ((a, ""), (b, "labels"), (again, "")):
        in_two(tmp_path, path, kind, change)
    assert main([str(a), str(again)]) == 0
    assert main([str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "from step 2 on, first in the loss" in said and "this is rank 1" in said
    assert "1. Other targets (labels)" in said


@pytest.mark.slow
def test_processes_without_a_sampler(tmp_path, capsys):
    a, b = tmp_path / "a.trace", tmp_path / "b.trace"
    in_two(tmp_path, a, "ddp")
    in_two(tmp_path, b, "ddp", "samples")
    assert main(["check", str(a)]) == 0 and main(["check", str(b)]) == 1
    assert main([str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "1. All processes get the same samples" in said and "in B, in each of the first" in said


# Where exactly.


def scaled(net, optimizer, i):
    with torch.no_grad():
        if i == 1:
            net[0].weight[2, 1] += 1.0


def test_zoom_names_operator_line_and_place(tmp_path, capsys):
    a = make(tmp_path / "a.trace", zoom=2)
    b = make(tmp_path / "b.trace", zoom=2, change=scaled)
    assert main([str(a), str(b), "--zoom"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"In step 2, .*linear.* test_samebits_command.py:\d+", said.replace("/", " "))
    assert re.search(r"largest difference is at \[\d, 2\]: .* in A, .* in B", said)
    with pytest.raises(samebits.BadInput, match="trace both runs again with zoom=STEP"):
        main([str(make(tmp_path / "c.trace")), str(b), "--zoom"])


# How much is rounding.


class Coarse(nn.Module):
    """A network in bfloat16, whose last sum is taken in another order where `turned` is true."""

    turned = False

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(3, 400), nn.Linear(400, 2)
        self.bfloat16()

    def forward(self, x):
        hidden = self.inner(x.bfloat16()).tanh() * 3
        parts = hidden[:, None] * self.out.weight
        halves = parts[:, :, ::2].sum(2) + parts[:, :, 1::2].sum(2)
        return ((halves if self.turned else parts.sum(2)) + self.out.bias).float()


def test_rounding_is_measured_in_bfloat16(tmp_path, capsys):
    """A sum in another order is beyond the fixed limit, and within what one unit makes."""

    class Turned(Coarse):
        turned = True

    class Wrong(Coarse):
        def forward(self, x):
            return 1.5 * super().forward(x)

    def run(name, kind, **more):
        torch.manual_seed(0)
        net = kind()
        with Trace(net, path=tmp_path / f"{name}.trace", **more):
            optimizer = torch.optim.SGD(net.parameters(), 1.0)
            for i in range(20):
                x = torch.randn(16, 3, generator=torch.Generator().manual_seed(i))
                optimizer.zero_grad()
                net(x).sub(x[:, :2]).square().mean().backward()
                optimizer.step()
        return tmp_path / f"{name}.trace"

    a, nudged = run("a", Coarse), run("n", Coarse, nudge=True)
    assert compare(a, nudged).stage == "start"
    for kind, is_rounding in ((Turned, True), (Wrong, False)):
        b = run("b", kind)
        found = compare(a, b, nudged)
        assert not compare(a, b).rounding
        assert found.rounding == is_rounding, str(found)
        assert "one unit in the last place beside" in str(found)
    assert main([str(a), str(b), "--nudged", str(nudged)]) == 1


# For other people's tests.


def test_the_fixture(pytester):
    pytester.makepyfile(
        """
        import torch

        def train(net, rate):
            optimizer = torch.optim.SGD(net.parameters(), rate)
            for _ in range(2):
                optimizer.zero_grad()
                net(torch.ones(2, 3)).sum().backward()
                optimizer.step()

        def both(same_training, rate):
            for name, lr in (("a", 0.1), ("b", rate)):
                torch.manual_seed(0)
                net = torch.nn.Linear(3, 1)
                with same_training.trace(name, net):
                    train(net, lr)
            same_training.check("a", "b")

        def test_same(same_training):
            both(same_training, 0.1)

        def test_other(same_training):
            both(same_training, 0.2)
        """
    )
    # pytest finds it by itself, where the installation is not older than it.
    known = any(entry.name == "samebits" for entry in entry_points(group="pytest11"))
    by_hand = () if known else ("-p", "samebits.pytest_plugin")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *by_hand)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*1. Another learning rate*"])


def test_help_links_are_set_in_one_place():
    from samebits import messages

    folder = Path(samebits.__file__).parent
    for path in folder.glob("*.py"):
        if path.name != "messages.py":
            for line in path.read_text().splitlines():
                assert "pitfalls.md" not in line and "sameness.md" not in line, path
    assert messages.PAGES and messages.SAMENESS
    count("files without a link of their own", len(list(folder.glob("*.py"))))


def test_two_runs_that_only_one_can_see(tmp_path):
    """A whole comparison through `compare` agrees with the command's."""
    a, b = make(tmp_path / "a.trace"), make(tmp_path / "b.trace", rate=0.2)
    assert compare(a, b).causes[0].name == "Another learning rate"
