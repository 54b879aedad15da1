"""The lesson speed: both sides the same with all its means, and each of them does what it says."""

from common import ROOT
from common.batches import DeviceBatches
from common.data import Images
from common.models import NETWORKS, Airbench, Averaged, Net, SmallNet
from common.optimizers import Muon, orthogonalized, up_and_down
from common.proof.compare import compare_results
from common.run import parse

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SIDES,
    STAGES,
    assert_agree,
    count,
    load_lesson,
    real_data,
    small_data,
    some,
    train,
)
from torch import nn

MEANS = [
    dict(),
    dict(optimizer="sgd", flip="random", translate=2),
    dict(optimizer="adam", precision="bf16-mixed"),
    dict(flip="alternate", max_epochs=3, label_smoothing=0.1),
    dict(translate=1, weight_decay=0.01, threads=2),
    dict(channels_last=False, freeze_at=1.0, batch_size=16),
    dict(freeze_at=0.0),
    dict(limit_train_batches=9, seed=3),
    dict(model=Net, precision="bf16-mixed", flip="random", freeze_at=0.3),
    dict(network="airbench", flip="alternate", translate=2, tta=True, label_smoothing=0.2,
         precision="bf16-mixed", batch_size=8),
    dict(network="small", tta=True, flip="random", precision="bf16-mixed"),
    dict(network="airbench", batch_size=20, max_epochs=1, freeze_at=1.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", some(MEANS, every=3), ids=str)
def test_both_sides_are_the_same_with_every_means(settings, tmp_path, monkeypatch):
    # Where the lesson's own is meant, and not the small one of the tests.
    own = {"model": NETWORKS[settings["network"]]} if "network" in settings else {}
    if settings.get("network") == "airbench":  # which takes long for each image
        own["images"] = small_data(24, 8, 8, lesson="speed")
    results = [train(s, tmp_path, monkeypatch, lesson="speed", **own, **settings) for s in SIDES]
    assert_same(*results)
    count("pairs of speed, bit for bit")


def assert_same(plain, lightning):
    comparison = compare_results(plain, lightning)
    assert_agree(comparison, STAGES)
    assert plain["weights_sha256"] == lightning["weights_sha256"]


NUDGE = "    weight = next(net.parameters()).data[:1, :1, :1, :1]\n" \
        "    weight.copy_(torch.nextafter(weight, weight + 1))\n"  # fmt: skip
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "the schedule told of epochs": (
        "lightning", "steps", ('"interval": "step"', '"interval": "epoch"'),
    ),
    "another order of the images": (
        "plain", "data", ("batches.sampler.set_epoch(epoch)", "pass"),
    ),
    "the first layer goes on": ("plain", "steps", (" freeze_first_layer(net)\n", " pass\n")),
    "no label smoothing": ("plain", "steps", (", label_smoothing=smoothing", "")),
    "another momentum": (
        "lightning", "steps", ("Muon(net, momentum=args.momentum", "Muon(net, momentum=0.8"),
    ),
    "no autocast": (
        "plain", "steps",
        ("torch.bfloat16, args.precision != \"32-true\",", "torch.bfloat16, False,"),
    ),
    "one unit in the last place": (
        "plain", "start",
        ("    optimizer = make_optimizer(net, args)\n",
         NUDGE + "    optimizer = make_optimizer(net, args)\n"),
    ),
    "one unit in the last place, after training": (
        "plain", "weights", ("    tested = Averaged", NUDGE + "    tested = Averaged"),
    ),
}  # fmt: skip
CHANGED = dict(lesson="speed", label_smoothing=0.1, precision="bf16-mixed")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("unchanged")
        results = {side: train(side, folder, monkeypatch, **CHANGED) for side in SIDES}
    assert_same(*results.values())
    return results


@pytest.mark.parametrize("name", [*some([*CHANGES][:-2], every=3), *[*CHANGES][-2:]])
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    changed = train(side, tmp_path, monkeypatch, *changes, **CHANGED)
    (other,) = set(SIDES) - {side}
    first = compare_results(changed, unchanged[other]).first_difference
    assert first.name == stage, first
    count("negative controls")


SANITY = ("        num_sanity_val_steps=0,\n", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_both_sides_are_the_same(tmp_path, monkeypatch):
    """And differ where the Trainer's sanity check has compiled for a batch of its own before.

    It takes the first batch that it sees for what all will be like: another size makes it compile
    once more, for any size, with kernels that round otherwise.
    """
    # Net's kernels round alike for any size; those of SmallNet do not.
    options = dict(lesson="speed", model=SmallNet, batch_size=128, max_epochs=1, lr=0.05)
    options |= dict(images=small_data(512, 60, 60, lesson="speed"))

    def compiled(side, *changes):
        torch.compiler.reset()  # it remembers sizes, also those of another network
        return train(side, tmp_path, monkeypatch, *changes, compile=True, **options)

    plain = compiled("plain")
    assert_same(plain, compiled("lightning"))
    first = compare_results(plain, compiled("lightning", SANITY)).first_difference
    assert first and first.name == "steps", first
    count("negative controls")
    # Not compiled, the check makes no difference.
    checked = train("lightning", tmp_path, monkeypatch, SANITY, **options)
    assert_same(train("plain", tmp_path, monkeypatch, **options), checked)


def test_the_first_layer_rests_in_the_second_half(tmp_path, monkeypatch):
    """Its weights are those of the step before; all others go on."""
    whole = dict(lesson="speed", model=Net, max_epochs=1)
    for side in SIDES:
        before, after = (
            train(side, tmp_path, monkeypatch, freeze_at=freeze_at, **whole)["fingerprints"]
            for freeze_at in (0.0, 0.5)
        )
        start, weights = before["start"], before["weights"]
        still = [name for name in start if start[name] == weights[name]]
        assert still == ["conv1.weight", "conv1.bias"] and len(start) == 10
        assert [name for name in start if start[name] == after["weights"][name]] == []


# The batches.


def batches(size=32, **more):
    return DeviceBatches(small_data().train, size, seed=5, device=torch.device("cpu"), **more)


def test_every_image_comes_once_in_an_epoch_and_is_that_of_the_loader():
    images = small_data().train
    for epoch in range(3):
        loader = batches()
        loader.sampler.set_epoch(epoch)
        parts = list(loader)
        assert [len(labels) for _, labels in parts] == [32, 32, 32, 24] and len(loader) == 4
        order = list(loader.sampler)  # it depends on seed and epoch alone
        assert sorted(order) == list(range(120))
        seen, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        wanted, wanted_labels = images.__getitems__(order)
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-6)
        assert torch.equal(labels, wanted_labels) and seen.dtype == torch.float32
    assert len(list(batches(drop_last=True))) == len(batches(drop_last=True)) == 3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_come_in_the_memory_format(memory_format):
    for images, _ in batches(memory_format=memory_format):
        assert images.is_contiguous(memory_format=memory_format)


def epoch_of(loader, epoch):
    """The images of an epoch in the order of the set."""
    loader.sampler.set_epoch(epoch)
    images = torch.cat([images for images, _ in loader])
    return images[torch.tensor(list(loader.sampler)).argsort()]


def mirrored(images, plain):
    same = [torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(images, plain, strict=True)]
    assert all(a or b for a, b in zip(same, turned, strict=True))
    return torch.tensor(turned)


def test_images_are_mirrored():
    plain = epoch_of(batches(), 0)
    random = [mirrored(epoch_of(batches(flip="random"), epoch), plain) for epoch in (0, 1, 0)]
    assert all(40 < turned.sum() < 80 for turned in random)
    assert torch.equal(random[0], random[2]) and not torch.equal(random[0], random[1])
    alternate = [mirrored(epoch_of(batches(flip="alternate"), e), plain) for e in range(4)]
    assert torch.equal(alternate[0], ~alternate[1]) and torch.equal(alternate[0], alternate[2])
    assert 40 < alternate[0].sum() < 80


def test_images_are_moved():
    plain, moved = epoch_of(batches(), 0), epoch_of(batches(translate=2), 0)
    padded, found = F.pad(plain, (2, 2, 2, 2), "reflect"), set()
    for number, image in enumerate(moved):
        places = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, padded[number, :, down : down + 32, right : right + 32])
        ]
        assert places
        found.add(places[0])
    assert len(found) > 15
    assert torch.equal(moved, epoch_of(batches(translate=2), 0))


def test_grey_images_without_a_transform():
    grey = Images(torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8), torch.arange(4), None)
    [(images, _)] = DeviceBatches(grey, 4, seed=0, device=torch.device("cpu"))
    assert images.min() == 0 and images.max() == 1


# The networks.


def test_whitened_patches_have_independent_values_of_the_same_spread():
    images = small_data().train.__getitems__(range(120))[0]
    net = Airbench()
    net.whiten(images)
    values = F.conv2d(images, net.whitening.weight[:12]).permute(1, 0, 2, 3).flatten(1)
    covariance = values @ values.T / values.shape[1]
    # But for the components that are next to nothing, which are not blown up.
    strong = covariance.diag() > 0.9
    assert strong.sum() >= 6
    torch.testing.assert_close(
        covariance[strong][:, strong], torch.eye(int(strong.sum())), rtol=0, atol=0.1
    )
    assert torch.equal(net.whitening.weight[12:], -net.whitening.weight[:12])


def test_the_networks_sizes():
    sizes = {net: sum(p.numel() for p in net().parameters()) for net in (SmallNet, Airbench)}
    assert sizes[SmallNet] == 136_288
    assert 1.9e6 < sizes[Airbench] < 2.1e6
    for net in sizes:
        assert net()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_average_is_that_of_six_views():
    seen = []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((1, 2, 3))[:, None] * torch.ones(10)

    image = torch.randn(2, 3, 32, 32)
    answer = Averaged(Sees())(image)
    assert len(seen) == 6 and torch.equal(seen[0], image) and torch.equal(seen[1], image.flip(3))
    assert torch.equal(seen[2][:, :, 1:, 1:], image[:, :, :-1, :-1])
    assert torch.equal(seen[4][:, :, :-1, :-1], image[:, :, 1:, 1:])
    means = [view.mean((1, 2, 3)) for view in seen[::2]]
    torch.testing.assert_close(answer[:, 0], means[0] / 2 + (means[1] + means[2]) / 4)


# Muon.


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    for shape in ((16, 150), (120, 400), (84, 84), (400, 120)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert values.max() < 1.3 and values.median() > 0.6, values


def test_muon_steps_as_pytorchs_own_does():
    """On matrices; PyTorch iterates in bfloat16, so that it is near and not equal."""
    torch.manual_seed(0)
    start = torch.randn(30, 20)
    ours = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 2, bias=False))
    ours[0].weight.data = start.clone()
    theirs = nn.Parameter(start.clone())
    a = Muon(ours, lr=0.05, momentum=0.9, weight_decay=0.01)
    b = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.01, ns_steps=3)
    for _ in range(5):
        gradient = torch.randn(30, 20)
        ours[0].weight.grad, theirs.grad = gradient.clone(), gradient
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours[0].weight - theirs).norm() < 0.02 * moved


def test_what_is_no_hidden_matrix_steps_by_adamw():
    torch.manual_seed(0)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    a = Muon(net, lr=0.05, weight_decay=0.01)
    names = {id(p): name for name, p in net.named_parameters()}
    muon, adam = ([names[id(p)] for p in group["params"]] for group in a.param_groups)
    assert muon == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert set(adam) == set(names.values()) - set(muon) and "fc3.weight" in adam
    b = torch.optim.AdamW(twin.parameters(), lr=0.005, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(5):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
    for name in adam:
        torch.testing.assert_close(net.state_dict()[name], twin.state_dict()[name])
    for name in muon:
        assert not torch.allclose(net.state_dict()[name], twin.state_dict()[name], rtol=1e-2)


def test_the_learning_rate_goes_up_and_down():
    factors = [up_and_down(200)(step) for step in range(201)]
    assert factors[20] == 1 == max(factors) and factors[200] == 0 and factors[0] == 1 / 21
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert all(0 <= up_and_down(steps)(step) <= 1 for steps in (1, 2, 3) for step in range(5))


def test_its_command_line(tmp_path):
    for side in SIDES:
        script, own = ROOT / side / "speed.py", ["--runs-dir", str(tmp_path)]
        of = load_lesson(side, "speed").Args
        args = parse(of, script, [*own, "--no-channels-last", "--optimizer", "adam"])
        assert not args.channels_last and args.optimizer == "adam" and args.threads == 1
        args = parse(of, script, [*own, "--limit-train-batches", "0.5"])
        assert args.optimizer == "muon" and args.limit_train_batches == 0.5
        assert parse(of, script, own).limit_train_batches == 190
    with pytest.raises(SystemExit):  # no other lesson has it
        parse(load_lesson("plain", "cifar").Args, ROOT / "plain/cifar.py", ["--optimizer", "muon"])


@pytest.mark.slow
@pytest.mark.skipif(real_data() is None, reason="needs the real CIFAR-10 in DATA_DIR")
def test_it_reaches_the_tutorials_accuracy(tmp_path):
    """One seed; docs/speed.md has five."""
    command = [sys.executable, "plain/speed.py", "--runs-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "speed/plain/result.json").read_text())
    assert result["data"] == "cifar10" and result["test_accuracy"] > 0.53
