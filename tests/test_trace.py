"""A trace changes nothing in what it watches, and is whole or not there."""

import copy
import gzip
import io
import json
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from controls import trace
from helpers import SIDES, Noisy, count, train
from samebits import BadInput, Trace, callback, compare, fingerprint, read
from samebits.files import FORMAT
from samebits.fingerprints import same
from samebits.sketch import COLUMNS, hashes
from samebits.snapshot import Snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


IMAGES, LABELS = torch.randn(12, 3, 32, 32), torch.arange(12) % 10


def steps(net, number=3, momentum=0.9, at=None, optimizer=None):
    """Train by hand; from step `at` on with another momentum."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.02, momentum=momentum)
    for step in range(1, number + 1):
        if step == at:
            optimizer.param_groups[0]["momentum"] = 0.8
        optimizer.zero_grad()
        F.nll_loss(net(IMAGES), LABELS).backward()
        optimizer.step()


def noisy():
    torch.manual_seed(0)
    return Noisy()


def hashed(tensors):
    snapshot = Snapshot()
    snapshot.take(tensors)
    return snapshot.bits()


def lines(path):
    return [json.loads(line) for line in read(path)]


@pytest.mark.parametrize("side", SIDES)
def test_a_run_reaches_the_same_bits_with_a_trace(side, tmp_path, monkeypatch):
    bare = train(side, tmp_path, monkeypatch, lesson="optimize")
    traced = trace(side, tmp_path / "it.trace", monkeypatch, lesson="optimize")
    for part in ("train_loss", "fingerprints", "confusion_matrix", "val_loss"):
        assert traced[part] == bare[part], part
    assert len(lines(tmp_path / "it.trace")) - 2 == 16
    count("runs with and without a trace")


def test_what_a_trace_records(tmp_path):
    net = noisy()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    with Trace(net, path=tmp_path / "it.trace"):
        steps(net, 2)
    head, first, second, end = lines(tmp_path / "it.trace")
    assert head["start"].keys() == start.keys() and len(end.pop("digest")) == 64
    digests = {name: fingerprint(value)["bits"] for name, value in net.state_dict().items()}
    assert end == {
        "end": 2,
        "error": None,
        "weights": {},
        "unseen": {},
        "digests": digests,
        "optimizers": 1,
    }
    assert {name: t["bits"] for name, t in head["start"].items()} == hashed(start)
    assert second["weights"]["bits"] == hashed(net.state_dict())
    [batch] = first["passes"]
    assert batch["inputs"]["x"]["bits"] == fingerprint(IMAGES)["bits"] and len(batch["rows"]) == 12
    assert list(batch["layers"]) == [f"backbone.{n}" for n in range(5)] + ["backbone", "head"]
    assert batch["mode"] == "1" * len(head["modules"])
    assert batch["loss"][""]["shape"] == [12, 10] and len(batch["loss values"][""]["rows"]) == 12
    assert first["backwards"][0]["loss"] == [pytest.approx(2.3, abs=1)]
    assert first["groups"][0]["lr"] == 0.02 and first["groups"][0]["momentum"] == 0.9
    assert first["between"] == {} and first["fresh"] is None and first["optimizer"] == "SGD"
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert second["used"]["bits"] == hashed(gradients)
    assert all(f"{name}: momentum_buffer" in first["state"] for name in gradients)
    # The first step is in full, the others are digests and the numbers of all tensors together.
    assert first["used"]["full"].keys() == second["used"]["bits"].keys()
    assert "full" not in second["used"] and "state" not in second


def test_the_sketch_tells_how_far_tensors_are_apart():
    torch.manual_seed(0)
    off = []
    for size in (3, 100, 1024, 5000, 100_000):
        for _ in range(20):
            a, d = torch.randn(size), torch.randn(size) * 1e-3
            sketches = [torch.tensor(fingerprint(t)["sketch"]) for t in (a + d, a)]
            off.append(((sketches[0] - sketches[1]).norm() / d.norm()).item())
    assert 0.9 < sum(off) / len(off) < 1.1 and min(off) > 0.3 and max(off) < 2
    assert fingerprint(a * 2)["norm"] == pytest.approx(2 * fingerprint(a)["norm"], rel=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_every_type_has_a_fingerprint(dtype):
    found = fingerprint(torch.arange(5).to(dtype))
    assert found["dtype"] == str(dtype)[6:] and found["zeros"] == 1
    assert fingerprint(torch.zeros(()))["shape"] == [] and fingerprint(torch.zeros(0))["norm"] == 0


def mixed():
    torch.manual_seed(0)
    tensors = {str(size): torch.randn(size) for size in (3, 300_000, 0, 1024, 1025, 65_536, 1)}
    tensors |= {"sparse": torch.eye(3).to_sparse(), "complex": torch.randn(3) * 1j}
    tensors |= {"half": torch.randn(9, 7).bfloat16(), "whole": torch.arange(5)}
    tensors |= {"double": torch.randn(2000).double(), "yes": torch.tensor([True, False])}
    tensors |= {"turned": torch.randn(40, 50).t(), "meta": torch.zeros(2, device="meta")}
    tensors |= {"small": torch.full((2000,), 1e-25), "large": torch.full((2000,), 1e25)}
    return tensors


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode, autocast])
def test_several_tensors_are_read_as_each_alone(within):
    """Whatever their types are, and whatever surrounds the trace."""
    tensors, snapshot = mixed(), Snapshot()
    with within():
        for _ in range(2):  # the second time in the memory of the first
            snapshot.take(tensors)
            line = snapshot.line()
    alone = [fingerprint(tensor) for tensor in tensors.values()]
    assert line["bits"] == {n: hashed({n: t})[n] for n, t in tensors.items()}
    by_name = dict(zip(line["bits"], line["norms"], strict=True))
    assert [by_name[n] for n in tensors] == pytest.approx([t["norm"] for t in alone], rel=1e-3)
    assert line["norm"] == pytest.approx(math.hypot(*(t["norm"] for t in alone)), rel=1e-6)
    together = [sum(numbers) for numbers in zip(*(t["sketch"] for t in alone), strict=True)]
    assert line["sketch"] == pytest.approx(together, rel=1e-4)
    some = snapshot.line(among=["half", "double"])
    assert some["bits"] == line["bits"]
    assert some["norms"] == [by_name[n] for n in line["bits"] if n in ("half", "double")]
    count("tensors in a snapshot", len(tensors))


def test_a_snapshot_tells_what_changed():
    tensors, snapshot = mixed(), Snapshot()
    snapshot.take(tensors)
    for name, tensor in tensors.items():
        assert snapshot.changed(tensors) == []
        if tensor.is_meta or not tensor.numel():
            continue
        changed = ~tensor if tensor.dtype == torch.bool else tensor * 2
        assert snapshot.changed(tensors | {name: changed}) == [name]
    for other in (tensors["half"].view(7, 9), tensors["half"].view(torch.float16)):
        assert snapshot.changed(tensors | {"half": other}) == ["half"]
        assert hashed({"half": other}) != hashed({"half": tensors["half"]})


def test_no_flipped_bit_and_no_exchanged_value_leaves_a_hash_as_it_was():
    """Bits that are the highest of a word are those that a product could lose."""
    torch.manual_seed(0)
    values = torch.randn(3 * COLUMNS)
    base, seen = hashed({"": values})[""], set()
    flips = [(place, bit) for place in (0, 1, 2, 1023, 1024, 3071) for bit in range(32)]
    for place, bit in flips:
        other = values.view(torch.int32).clone()
        other[place] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        seen.add(hashed({"": other.view(torch.float32)})[""])
    for pair in ((0, 1), (1, 3), (0, 1024), (1, 2047)):  # the signs of two values
        other = values.clone()
        other[list(pair)] *= -1
        seen.add(hashed({"": other})[""])
        other = values.clone()
        other[list(pair)] = values[list(reversed(pair))]
        seen.add(hashed({"": other})[""])
    others = (-values, values * 2, values.flip(0), values.view(3, -1), values.abs(), values + 1)
    seen |= {hashed({"": x})[""] for x in others}
    assert len(seen) == len(flips) + 8 + len(others) and base not in seen
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32):
        some = (values * 100).to(dtype)
        every = [some, -some, some * 2, some.flip(0), some.abs(), some + 1]
        assert len({hashed({"": x})[""] for x in every}) == len(every), dtype
    rows = torch.randint(-(2**31), 2**31 - 1, (2, 1 << 14, COLUMNS // 8), dtype=torch.int32)
    found = {int(h) for part in rows for h in hashes(part.view(torch.float32))}
    assert len(found) == 1 << 15
    count("bits flipped", len(flips))


def test_the_same_is_the_same_bits():
    nan, half = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 2.0, 3.0]).bfloat16()
    for one in (nan, half, nan.to_sparse(), torch.zeros(2, device="meta"), torch.randn(3) * 1j):
        assert same(one, one.clone())
    for one, other in (
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (nan, torch.tensor([math.nan, 2.0])),
        (half, half.float()),
        (half, half[None]),
        (torch.ones(3).to_sparse(), torch.tensor([1.0, 1.0, 2.0]).to_sparse()),
    ):
        assert not same(one, other)


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_those_of_the_step_whatever_the_steps_before_were(every, tmp_path):
    """They come into the memory of a step before; two optimizers take turns, and one part waits."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)})
    optimizers = [torch.optim.SGD(net[part].parameters(), 0.1) for part in "gd"]
    seen, came = [], {}
    for name, parameter in net.named_parameters():
        parameter.register_hook(lambda g, n=name: came.update({n: g.clone()}))
    with Trace(net, path=tmp_path / "it.trace", every=every):
        for i in range(12):
            which = i % 3 > 0
            net["d"](net["g"](torch.randn(8, 4))).mean().backward()
            names = [n for n, _ in net.named_parameters() if n[0] == "gd"[which]]
            seen.append([hashed({n: came[n] for n in names})])
            if i > 8:
                nn.utils.clip_grad_norm_(net["gd"[which]].parameters(), 0.01)
            seen[-1].append(hashed({n: net.get_parameter(n).grad for n in names}))
            optimizers[which].step()
            net.zero_grad(set_to_none=i % 2 == 0)
    found = [(s["fresh"] or s["used"], s["used"]) for s in lines(tmp_path / "it.trace")[1:-1]]
    assert len(found) == 12 // every
    for step, stages in zip(seen[::every], found, strict=True):
        assert every > 1 or [stage["bits"] for stage in stages] == step
        assert stages[1]["bits"] == step[1]
    count("steps of two optimizers", len(found))


def test_thinned_steps_of_one_optimizer_and_of_two_are_not_compared(tmp_path):
    """Each third step of the one is none of the other's."""
    for side in "ab":
        net = noisy()
        parts = [[net], [net.backbone, net.head]][side == "b"]
        optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts]
        with Trace(net, path=tmp_path / f"{side}.trace", every=3):
            for _ in range(6):
                net.zero_grad()
                F.nll_loss(net(IMAGES), LABELS).backward()
                [optimizer.step() for optimizer in optimizers]
    with pytest.raises(BadInput, match=r"6 steps .*: 1.*, B 12 .*: 2.*without `every`"):
        compare(tmp_path / "a.trace", tmp_path / "b.trace")
    count("refusals of two traces")


def test_every_thins_a_trace(tmp_path):
    with Trace(noisy_net := noisy(), path=tmp_path / "it.trace", every=4):
        steps(noisy_net, 10)
    assert [line["step"] for line in lines(tmp_path / "it.trace")[1:-1]] == [1, 5, 9]
    assert lines(tmp_path / "it.trace")[-1]["end"] == 10


def test_a_network_can_be_copied_and_saved_while_it_is_traced(tmp_path):
    net, file = noisy(), io.BytesIO()
    with Trace(net, path=tmp_path / "it.trace"):
        twin = copy.deepcopy(net)
        torch.save(net, file)
        steps(net)
        twin(IMAGES)  # not recorded
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert saved.eval()(IMAGES).shape == (12, 10)
    assert all(len(line["passes"]) == 1 for line in lines(tmp_path / "it.trace")[1:-1])


def test_hooks_are_gone_afterwards(tmp_path):
    net = noisy()
    with Trace(net, path=tmp_path / "it.trace"):
        steps(net)
    before = (tmp_path / "it.trace").read_bytes()
    steps(net)
    assert (tmp_path / "it.trace").read_bytes() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def test_an_error_in_the_block_keeps_what_was_recorded(tmp_path):
    net = noisy()
    with pytest.raises(RuntimeError), Trace(net, path=tmp_path / "it.trace"):
        steps(net, 2)
        net(torch.zeros(1, 2))
    *_, last, end = lines(tmp_path / "it.trace")
    assert last["step"] == 2 and end["error"].startswith("RuntimeError")
    assert [path.name for path in tmp_path.iterdir()] == ["it.trace"]


class Unusual(nn.Module):
    """Keyword arguments, several outputs, a layer that is called twice, one that is frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, *, x, scale):
        self.calls += 1
        return {"twice": self.a(self.a(x)) * scale, "other": (self.b(x), None)}


def test_unusual_networks(tmp_path):
    torch.manual_seed(0)
    net = Unusual()
    x = torch.randn(5, 4)
    with Trace(net, path=tmp_path / "it.trace"):
        optimizer = torch.optim.AdamW(net.parameters())
        for step in range(3):
            if step == 2:
                net.b.requires_grad_(True)
            for part in x.chunk(2):
                outputs = net(x=part, scale=torch.tensor(2.0))
                (outputs["twice"].sum() + outputs["other"][0].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            net(x=x, scale=torch.tensor(1.0))  # an evaluation that forgot no_grad
    steps_ = lines(tmp_path / "it.trace")[1:-1]
    assert [len(line["passes"]) for line in steps_] == [2, 3, 3]
    assert [[bool(p["loss"]) for p in line["passes"]] for line in steps_][1] == [False, True, True]
    assert list(steps_[0]["passes"][0]["layers"]) == ["a", "a (call 2)", "b"]
    assert [list(batch["inputs"]) for batch in steps_[0]["passes"]] == [["x", "scale"]] * 2
    assert list(steps_[0]["passes"][0]["outputs"]) == ["twice", "other.0"]
    assert "b.weight" not in steps_[0]["used"]["bits"] and "b.weight" in steps_[2]["used"]["bits"]
    assert "calls" in steps_[0]["weights"]["bits"]
    assert compare(tmp_path / "it.trace", tmp_path / "it.trace").equal


def test_one_of_two_optimizers(tmp_path):
    net, other = noisy(), nn.Linear(2, 2)
    mine = torch.optim.SGD(net.parameters(), lr=0.02)
    yours = torch.optim.SGD([*net.parameters(), *other.parameters()], lr=0.02)
    foreign = torch.optim.SGD(other.parameters(), lr=0.02)
    for optimizer, number in ((None, 4), (mine, 2)):
        with Trace(net, optimizer, path=tmp_path / "it.trace"):
            for _ in range(2):
                steps(net, 1, optimizer=mine)
                steps(net, 1, optimizer=yours)
                foreign.step()
        assert lines(tmp_path / "it.trace")[-1]["end"] == number


# Within the Trainer.


class Lit(L.LightningModule):
    def __init__(self, net, fails=False):
        super().__init__()
        self.net, self.fails, self.seen = net, fails, nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        if self.fails and batch_idx == 2:
            raise ArithmeticError("as asked")
        return self.seen(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def trainer(callbacks, **more):
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, max_epochs=1,
        **more,
    )  # fmt: skip


def test_the_callback_traces_as_the_block_does(tmp_path):
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4, generator=torch.Generator())
    trainer([callback(L.Callback, tmp_path / "callback.trace")]).fit(Lit(noisy()), loader)
    lit = Lit(noisy())
    with Trace(lit.net, path=tmp_path / "block.trace"):
        trainer([]).fit(lit, loader)
    assert read(tmp_path / "callback.trace")[1:] == read(tmp_path / "block.trace")[1:]
    assert len(lines(tmp_path / "block.trace")) == 5
    assert set(lines(tmp_path / "block.trace")[0]["start"]) == set(noisy().state_dict())


def test_the_callback_keeps_the_trace_of_a_training_that_fails(tmp_path):
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4)
    with pytest.raises(ArithmeticError):
        trainer([callback(L.Callback, tmp_path / "it.trace")]).fit(Lit(noisy(), True), loader)
    end = lines(tmp_path / "it.trace")[-1]
    assert end["end"] == 2 and end["error"] == "ArithmeticError: as asked"


class Beside(Lit):
    """Has a frozen copy beside its network."""

    def __init__(self, net):
        super().__init__(net)
        self.target = copy.deepcopy(net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)


def test_the_callback_takes_the_network_that_is_meant(tmp_path):
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4, generator=torch.Generator())
    names = noisy().state_dict()
    for network, prefix in (
        (None, ""), ("net", ""), ("target.backbone", None), (lambda module: module, "net."),
    ):  # fmt: skip
        lit = Beside(noisy())
        watch = callback(L.Callback, tmp_path / "it.trace", network=network)
        trainer([watch]).fit(lit, loader)
        if prefix is None:  # no optimizer holds it
            assert lines(tmp_path / "it.trace")[-1]["end"] == 0
        else:
            assert {prefix + name for name in names} <= set(
                lines(tmp_path / "it.trace")[0]["start"]
            )
        count("networks that the callback was told of")
    with pytest.raises(BadInput, match="has no part 'nett'; it has: net, seen, target"):
        watch = callback(L.Callback, tmp_path / "it.trace", network="nett")
        trainer([watch]).fit(Beside(noisy()), loader)


def test_many_fits_overwrite_nothing(tmp_path):
    """The same network goes on in its file; another one gets a file of its own."""
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4, generator=torch.Generator())
    watch, first = callback(L.Callback, tmp_path / "it.trace"), Lit(noisy())
    for module in (first, Lit(noisy()), first):
        trainer([watch]).fit(module, loader)
    assert {path.name for path in tmp_path.iterdir()} == {"it.trace", "it-2.trace"}
    whole = lines(tmp_path / "it.trace")
    assert [line.get("step", line.get("again")) for line in whole[1:-1]] == [1, 2, 3, 3, 4, 5, 6]
    assert whole[-1]["end"] == 6 and lines(tmp_path / "it-2.trace")[-1]["end"] == 3
    assert [line.get("which") for line in whole[1:-1]] == [1, 1, 1, None, 2, 2, 2]


def test_it_serves_both_names_of_lightning(tmp_path):
    import pytorch_lightning as pl

    for base in (L.Callback, pl.Callback):
        assert isinstance(callback(base, tmp_path / "it.trace"), base)


# Bad input.


def test_bad_arguments_are_refused_in_one_sentence(tmp_path):
    for model in (nn.ReLU(), torch.zeros(2), None):
        with pytest.raises(BadInput, match="give it the module"):
            Trace(model, path=tmp_path / "it.trace")
    for every in (0, -1, 1.5, "2"):
        with pytest.raises(BadInput, match="every is"):
            Trace(noisy(), path=tmp_path / "it.trace", every=every)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="name another path"):
        Trace(noisy(), path=tmp_path / "file" / "it.trace").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    count("refusals of a trace", 8)


def test_what_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "it.trace"
    with pytest.raises(BadInput, match="there is no trace"):
        read(path)
    (tmp_path / "it.trace.part").touch()
    with pytest.raises(BadInput, match="the run was killed, or still goes on"):
        read(path)
    with Trace(net := noisy(), path=path):
        steps(net, 1)
    whole = path.read_bytes()
    for content in (b"", b"text", gzip.compress(b"{}"), gzip.compress(b"[1]\n[2]"), whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="make it again"):
            read(path)
        count("refusals of a trace")
    newer = [json.dumps({"trace": FORMAT + 1}), json.dumps({"end": 0})]
    path.write_bytes(gzip.compress("\n".join(newer).encode()))
    with pytest.raises(BadInput, match="no trace of format"):
        read(path)


def test_numbers_that_are_not_finite_can_be_read_again(tmp_path):
    with Trace(net := noisy(), path=tmp_path / "it.trace"):
        steps(net, 3, optimizer=torch.optim.SGD(net.parameters(), lr=math.inf))
    assert compare(tmp_path / "it.trace", tmp_path / "it.trace").equal
