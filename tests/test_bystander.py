"""A trace is a bystander: whatever it meets, the training goes on as without it, and it says so."""

import io
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import samebits.memory
import torch
import torch.nn.functional as F
from helpers import count
from samebits import Trace, compare, read
from torch import nn


class OfSparse(nn.Module):
    """Takes a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return torch.sparse.mm(x, self.weight)


class WithMeta(nn.Module):
    """Has a part without values."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")

    def forward(self, x):
        return self.used(x)


class Opaque:
    """An output that nobody can look into."""

    __slots__ = ("take",)

    def __init__(self, tensor):
        self.take = lambda: tensor


class Hidden(nn.Linear):
    def forward(self, x):
        return Opaque(super().forward(x))


def nested(i):
    parts = [torch.randn(n, 4, generator=torch.Generator().manual_seed(i)) for n in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def dense(*shape):
    return lambda i: torch.randn(*shape, generator=torch.Generator().manual_seed(i))


def plain(net, x):
    return net(x).square().mean()


class Resizing(nn.Linear):
    """Has a buffer that grows, as the memory of FSDP's parameters does."""

    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("memory", torch.zeros(2))

    def forward(self, x):
        if len(self.memory) < 8:
            self.memory.resize_(8).zero_()
        return super().forward(x) + self.memory[0]


class WithScripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), torch.jit.script(nn.Linear(3, 1))

    def forward(self, x):
        return self.second(self.first(x))


class OwnParameter(nn.Linear):
    """Gives one of its parameters."""

    def forward(self, x):
        return self.weight


STRANGE = {
    "nested tensors": (lambda: nn.Linear(4, 2), nested, lambda n, x: n(x).values().mean()),
    "a sparse input": (OfSparse, lambda i: (torch.eye(6) * (i + 1)).to_sparse(), plain),
    "sparse gradients": (lambda: nn.Embedding(9, 2, sparse=True), lambda i: torch.tensor([i, 1]),
                         plain),
    "a lazy module": (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)), dense(2, 5), plain),
    "parameters on meta": (WithMeta, dense(2, 3), plain),
    "an opaque output": (lambda: Hidden(3, 2), dense(2, 3), lambda n, x: n(x).take().mean()),
    "per-sample gradients": (
        lambda: nn.Linear(4, 2), dense(8, 4),
        lambda n, x: torch.func.vmap(lambda row: torch.func.functional_call(
            n, dict(n.named_parameters()), (row,)).sum())(x).mean()),
    "a scripted network": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), dense(8, 4),
                           lambda n, x: torch.jit.script(n)(x).mean()),
    "a buffer that is resized": (Resizing, dense(2, 3), plain),
    "a part that is scripted": (WithScripted, dense(8, 4), plain),
    "a parameter as an output": (lambda: OwnParameter(3, 2), dense(2, 3), plain),
    "half precision": (lambda: nn.Linear(4, 2).bfloat16(), lambda i: dense(8, 4)(i).bfloat16(),
                       plain),
}  # fmt: skip


def strange(name, path=None):
    """Train three steps, in a trace where there is a path; return the weights."""
    build, inputs, loss = STRANGE[name]
    torch.manual_seed(0)
    net = build()
    first = inputs(0) if any(map(nn.parameter.is_lazy, net.parameters())) else None

    def train():
        if first is not None:
            net(first)
        used = [p for p in net.parameters() if not p.is_meta]
        optimizer = torch.optim.SGD(used, 0.1)
        for i in range(3):
            optimizer.zero_grad()
            loss(net, inputs(i)).backward()
            optimizer.step()

    if path is None:
        train()
    else:
        with Trace(net, path=path):
            train()
    return [p.detach() for p in net.parameters() if not p.is_meta]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGE)
def test_a_training_goes_on_whatever_it_is(name, tmp_path):
    bare = strange(name)
    for side in "ab":
        traced = strange(name, tmp_path / f"{side}.trace")
        assert all(map(torch.equal, traced, bare))
    diagnosis = compare(tmp_path / "a.trace", tmp_path / "b.trace")
    assert diagnosis.equal and diagnosis.steps == 3, str(diagnosis)
    count("strange networks traced")


def test_what_was_not_seen_is_said(tmp_path):
    for side in "ab":
        strange("an opaque output", tmp_path / f"{side}.trace")
    assert "Not seen in A" in str(compare(tmp_path / "a.trace", tmp_path / "b.trace"))


def test_weights_that_were_not_seen_are_not_called_equal(tmp_path, monkeypatch):
    def dense(tensor, usual=samebits.memory.dense):
        if tuple(tensor.shape) == (4, 2):
            raise RuntimeError("as asked")
        return usual(tensor)

    monkeypatch.setattr("samebits.fingerprints.dense", dense)
    monkeypatch.setattr("samebits.snapshot.dense", dense)
    for side in "ab":
        with Trace(net := nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)),
                   path=tmp_path / f"{side}.trace"):  # fmt: skip
            optimizer = torch.optim.SGD(net.parameters(), 0.0)
            plain(net, torch.ones(3, 2)).backward()
            torch.nn.init.ones_(net[1].weight), torch.nn.init.ones_(net[1].bias)
            torch.nn.init.ones_(net[0].bias)
            optimizer.step()
    said = compare(tmp_path / "a.trace", tmp_path / "b.trace")
    assert not said.equal


def test_the_imaginary_part_counts(tmp_path):
    for side, factor in (("a", 1.0), ("b", 1j)):
        net = nn.ParameterList([torch.ones(3, dtype=torch.complex64) * factor])
        with Trace(net, path=tmp_path / f"{side}.trace"):
            net[0].grad = torch.zeros_like(net[0])
            torch.optim.SGD(net.parameters(), 0.1).step()
    assert compare(tmp_path / "a.trace", tmp_path / "b.trace").stage == "start"


def test_a_full_disk_ends_the_trace_alone(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    net = nn.Linear(30, 30)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Trace(net, path=tmp_path / "it.trace") as trace:
        trace.writer.raw.close()
        trace.writer.raw = Path("/dev/full").open("wb")  # noqa: SIM115
        trace.writer.file = trace.writer._part()
        for _ in range(60):
            plain(net, torch.ones(3, 30)).backward()
            optimizer.step()
    said = capsys.readouterr().err
    assert "there is no trace" in said and "the training itself went on" in said
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_hook_is_noted(tmp_path, monkeypatch):
    """Wherever it arises."""
    hooks = {
        "before": "Trace._begin_pass",
        "after": "Trace._layer",
        "gradient": "Gradients.add",
        "backward": "float",
        "stepped": "Trace.is_full",
    }
    for name, inner in hooks.items():

        def fails(*args, **kwargs):
            raise ZeroDivisionError("as asked")

        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        with monkeypatch.context() as patch, Trace(net, path=tmp_path / "it.trace"):
            patch.setattr(f"samebits.trace.{inner}", fails, raising=inner != "float")
            plain(net, torch.ones(2, 3)).backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
        end = json.loads(read(tmp_path / "it.trace")[-1])
        assert any("ZeroDivisionError: as asked" in why for why in end["unseen"].values()), name
        count("errors in hooks that end nothing")


def test_nothing_of_it_is_saved_or_stays(tmp_path):
    net, file = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), io.BytesIO()
    usual = torch.autograd.backward
    with Trace(net, path=tmp_path / "it.trace"):
        plain(net, torch.ones(2, 3)).backward()
        torch.save(net, file)
        assert b"samebits" not in file.getvalue() and b"samebits" not in pickle.dumps(net)
        assert torch.autograd.backward is not usual
    assert torch.autograd.backward is usual
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_backward_of_a_generator_of_losses(tmp_path):
    """It gives its tensors once."""
    net = nn.Linear(2, 1, bias=False)
    with Trace(net, path=tmp_path / "it.trace"):
        losses = [net(torch.ones(1, 2)).sum() for _ in range(3)]
        torch.autograd.backward(loss for loss in losses)
    assert net.weight.grad.tolist() == [[3.0, 3.0]]


def test_a_parameter_that_is_an_output_keeps_no_hook(tmp_path):
    net = OwnParameter(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Trace(net, path=tmp_path / "it.trace"):
        for _ in range(3):
            plain(net, torch.ones(1, 3)).backward()
            optimizer.step()
    assert not net.weight._backward_hooks


def test_trainings_in_threads_do_not_disturb_each_other(tmp_path):
    """Traces begin and end while other threads go along PyTorch's hooks."""
    failed = []

    def train(number):
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        try:
            with Trace(net, path=tmp_path / f"{number}.trace"):
                for _ in range(5 + number):
                    plain(net, torch.ones(2, 8)).backward()
                    optimizer.step()
        except RuntimeError as error:
            failed.append(error)

    for _ in range(8):
        threads = [threading.Thread(target=train, args=(number,)) for number in (20, 0, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert all(json.loads(read(path)[-1])["end"] >= 5 for path in tmp_path.glob("*.trace"))
    assert not nn.modules.module._global_forward_hooks


def test_a_trace_can_begin_with_nothing_but_lazy_parameters(tmp_path):
    for side in "ab":
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1))
        with Trace(net, path=tmp_path / f"{side}.trace"):
            plain(net, torch.ones(2, 3)).backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
    assert compare(tmp_path / "a.trace", tmp_path / "b.trace").equal


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiling_within_a_trace_compiles_no_hook(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with Trace(net, path=tmp_path / "it.trace") as trace:
        whole = torch.compile(net, backend="eager", fullgraph=True)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(whole(torch.ones(2, 4)), torch.ones(2, 1)).backward()
            optimizer.step()
    assert not trace.unseen
    first = json.loads(read(tmp_path / "it.trace")[1])
    assert [p["module"] for p in first["passes"]] == [""] and first["passes"][0]["outputs"]
