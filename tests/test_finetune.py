"""What the lesson finetune and its page claim: frozen, unfrozen, pretrained, saved and loaded."""

from common import ROOT, checkpoints, pretrained
from common.messages import BadInput
from common.models import Net, Transfer
from common.predict import main as predict
from common.pretrained import load_pretrained
from common.proof import parity, watch
from common.proof.compare import compare_results
from common.proof.fingerprints import code_sha256, fingerprints, versions
from common.proof.sidebyside import cells
from common.run import parse
from common.run import run as run_lesson

import hashlib
import http.server
import importlib
import os
import pickle
import re
import sys
import threading
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import SIDES, Noisy, arguments, count, load_lesson, small_data, some, train
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import models
from torchvision.transforms.functional import to_pil_image

PAGE = (ROOT / "docs" / "finetune.md").read_text()
HEAD = ["head.weight", "head.bias"]
BACKBONE = [f"backbone.{name}" for name, _ in Noisy().backbone.named_parameters()]
# Each backbone: its parameters with the head, those of the head, the name of its own last layer.
BACKBONES = {
    "vgg16": (134_301_514, 40_970, "classifier.6"),
    "resnet18": (11_181_642, 5_130, "fc"),
    "mobilenet_v3_small": (1_528_106, 10_250, "classifier.3"),
}

OPTIMIZER = "torch.optim.SGD(net.head.parameters(), args.lr, args.momentum)"
ADD_GROUP = '    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": lr})\n'
FROZEN = "    net.backbone.requires_grad_(False)\n"
CHANGES = {
    # name: (side, stage that must differ first, (old text, new text), ...)
    "no backbone.eval while frozen": (
        "plain", "steps", ("        net.backbone.eval()\n", "        pass\n"),
    ),
    "no backbone.eval after Lightning's freeze": (
        "lightning", "steps", ("            backbone.eval()\n", "            pass\n"),
    ),
    "dropout off, BatchNorm in train mode": (
        "plain", "steps",
        ("        net.backbone.eval()\n",
         "        for part in net.backbone.modules():\n"
         "            part.train('BatchNorm' in type(part).__name__)\n"),
    ),
    "no backbone.train after unfreezing": (
        "lightning", "steps", ("            backbone.train()\n", ""),
    ),
    "the head's learning rate for the backbone": ("plain", "steps", ("args.lr / 10", "args.lr")),
    "unfrozen one epoch late": (
        "lightning", "start", ("epoch == self.epoch:", "epoch == self.epoch + 1:"),
    ),
    "no add_param_group": ("plain", "start", (ADD_GROUP, "")),
    "all weights to the optimizer": (
        "lightning", "steps", ("self.model.head.parameters()", "self.model.parameters()"),
    ),
    "all weights to the optimizer, none frozen": (
        "plain", "steps",
        (OPTIMIZER, OPTIMIZER.replace("net.head", "net")), (FROZEN, ""), (ADD_GROUP, ""),
    ),
    "a new optimizer at the unfreezing": (
        "plain", "steps",
        ("            unfreeze(net.backbone, optimizer, args.lr / 10)\n",
         f"            optimizer = {OPTIMIZER}\n"
         "            unfreeze(net.backbone, optimizer, args.lr / 10)\n"),
    ),
    "freeze's default, train_bn=True": (
        "lightning", "steps",
        ("module.model.backbone, train_bn=False", "module.model.backbone"),
        ("self.model.head.parameters()", "[p for p in self.parameters() if p.requires_grad]"),
    ),
    "unfrozen without BatchNorm": (
        "lightning", "start", ("optimizer, self.lr)", "optimizer, self.lr, train_bn=False)"),
    ),
    "another new layer": (
        "plain", "start", (FROZEN, FROZEN + "    net.head.reset_parameters()\n"),
    ),
    "unfrozen by requires_grad alone": (
        "lightning", "weights",
        ("self.unfreeze_and_add_param_group(backbone, optimizer, self.lr)",
         "backbone.requires_grad_(True)\n"
         "            weights = list(backbone.parameters())\n"
         "            optimizer.add_param_group({'params': weights, 'lr': self.lr})"),
    ),
    "the backbone's weights in another order": (
        "plain", "optimizer", ("list(backbone.parameters())", "list(backbone.parameters())[::-1]"),
    ),
    "the checkpoint saved before the last epoch": (
        "plain", "checkpoints",
        ("save(path, net, optimizer, args.max_epochs, steps, args)",
         "save(path, net, optimizer, args.max_epochs - 1, steps, args)"),
    ),
    "one weight of the head, one unit in the last place": (
        "plain", "start",
        (FROZEN, FROZEN + "    w = net.head.weight.data.flatten()\n"
         "    i = w.abs().argmax()\n    w[i] = torch.nextafter(w[i], torch.tensor(9.0))\n"),
    ),
}  # fmt: skip

# Changes that change no number, and what there is to say about each.
HARMLESS = {
    # The optimizer has the head alone, and eval does the rest: it only costs time and memory.
    "gradients not frozen": ("plain", (FROZEN, "")),
    # unfreeze_and_add_param_group then takes a tenth of the first group's.
    "the learning rate left to Lightning": ("lightning", ("optimizer, self.lr)", "optimizer)")),
    # The Trainer keeps the modes that it finds, but it warns of them.
    "eval before the training": (
        "lightning",
        ("        self.freeze(", "        module.model.backbone.eval()\n        self.freeze("),
        ("            backbone.eval()\n", "            pass\n"),
    ),
}  # fmt: skip


def equal(a, b):
    """Tell whether two state_dicts have the same names, and tensors equal to the bit."""
    return fingerprints(a) == fingerprints(b)


def both(tmp_path, monkeypatch, **settings):
    """Train both sides; they must agree."""
    runs = [train(side, tmp_path, monkeypatch, lesson="finetune", **settings) for side in SIDES]
    comparison = compare_results(*runs)
    assert comparison.agree, comparison.first_difference
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]  # weights.pt, byte for byte
    count("pairs of fine-tunings, bit for bit")
    return runs


# Frozen means frozen.


def watched(side, tmp_path, monkeypatch, **settings):
    """Train one side; return the result, what it began with, and what the backbone did in each
    step."""
    nets, start, seen, steps = [], {}, {}, []

    def before_forward(module, args):
        if isinstance(module, Noisy):
            nets[:] = [module]
            start.update(start or fingerprints(module.state_dict()))

    def after_forward(module, args, output):
        if not torch.is_grad_enabled():
            return  # no step of the training
        if isinstance(module, nn.Dropout):
            seen["dropped"] = not torch.equal(output, args[0])
        elif isinstance(module, nn.BatchNorm2d):
            averages = module.running_mean, module.running_var, module.weight, module.bias
            seen["batch's averages"] = not torch.equal(output, F.batch_norm(args[0], *averages))

    def after_step(optimizer, args, kwargs):
        name_of = {weight: name for name, weight in nets[0].named_parameters()}
        backbone = nets[0].backbone
        steps.append(
            {
                **seen,
                "state": fingerprints(backbone.state_dict()),
                "gradients": [p.grad is not None for p in backbone.parameters()],
                "groups": [
                    (group["lr"], [name_of[weight] for weight in group["params"]])
                    for group in optimizer.param_groups
                ],
            }
        )

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(before_forward),
        nn.modules.module.register_module_forward_hook(after_forward),
        register_optimizer_step_post_hook(after_step),
    ]
    try:
        run = train(side, tmp_path, monkeypatch, lesson="finetune", **settings)
        return run, start, steps
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("side", SIDES)
def test_frozen_means_frozen_until_it_is_unfrozen(side, first, tmp_path, monkeypatch):
    run, begun, steps = watched(side, tmp_path, monkeypatch, unfreeze_at_epoch=first, lr=0.03)
    start = {
        name.removeprefix("backbone."): value
        for name, value in begun.items()
        if name.startswith("backbone.")
    }
    assert len(steps) == 30 and len(start) == 7
    frozen, free = steps[: 15 * first], steps[15 * first :]
    for step in frozen:
        assert step["state"] == start
        assert not step["dropped"] and not step["batch's averages"] and not any(step["gradients"])
        assert step["groups"] == [(0.03, HEAD)]
        count("frozen steps")
    for step in free:
        assert step["dropped"] and step["batch's averages"] and all(step["gradients"])
        assert step["groups"] == [(0.03, HEAD), (0.03 / 10, BACKBONE)]
        count("unfrozen steps")
    # The next step moves everything but, perhaps, the bias before BatchNorm: its gradient is 0 but
    # for rounding, and on some processors it stays 0.
    before = start
    for step in free:
        same = {name for name in before if step["state"][name] == before[name]}
        assert same <= {"0.bias"}, same
        before = step["state"]
    end = fingerprints(run.net.backbone.state_dict())
    assert end == steps[-1]["state"]
    moved = {name for name in start if end[name] != start[name]}
    assert moved | {"0.bias"} == set(start) if free else not moved
    batches_seen = run.net.backbone[1].num_batches_tracked.item()
    assert batches_seen == len(free)
    assert fingerprints(run.net.head.state_dict())["weight"] != begun["head.weight"]


def test_the_second_group_is_the_same_on_both_sides(tmp_path, monkeypatch):
    runs = both(tmp_path, monkeypatch, lr=0.007, limit_train_batches=3)
    groups = [run.optimizer.param_groups for run in runs]
    for ours, theirs in zip(*groups, strict=True):
        assert len(ours.pop("params")) == len(theirs.pop("params"))
        assert ours == theirs
    assert [group["lr"] for group in groups[0]] == [0.007, 0.007 / 10]


# What goes wrong otherwise.


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = both(tmp_path_factory.mktemp("unchanged"), monkeypatch)
    return {run["side"]: run for run in runs}


def compare_changed(side, changes, unchanged, tmp_path, monkeypatch):
    changed = train(side, tmp_path, monkeypatch, *changes, lesson="finetune")
    (other,) = set(SIDES) - {side}
    return compare_results(changed, unchanged[other]).first_difference


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("name", some(CHANGES))
def test_one_change_is_found(name, unchanged, tmp_path, monkeypatch):
    side, stage, *changes = CHANGES[name]
    difference = compare_changed(side, changes, unchanged, tmp_path, monkeypatch)
    assert difference and difference.name == stage, difference
    count("negative controls")


def test_there_are_enough_changes():
    assert len(CHANGES) >= 16
    stages = {stage for _, stage, *_ in CHANGES.values()}
    assert stages == {"start", "steps", "weights", "optimizer", "checkpoints"}
    assert {side for side, *_ in CHANGES.values()} == set(SIDES)


@pytest.mark.parametrize("name", HARMLESS)
def test_some_changes_change_no_number(name, unchanged, tmp_path, monkeypatch):
    side, *changes = HARMLESS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compare_changed(side, changes, unchanged, tmp_path, monkeypatch) is None
    warned = [str(warning.message) for warning in caught]
    eval_mode = any("module(s) in eval mode at the start of training" in text for text in warned)
    assert eval_mode is (name == "eval before the training")
    count("changes without effect")


def test_no_weight_may_be_in_two_groups(tmp_path, monkeypatch):
    """The plain side of "all weights to the optimizer": PyTorch itself refuses."""
    change = (OPTIMIZER, OPTIMIZER.replace("net.head", "net"))
    with pytest.raises(ValueError, match="more than one parameter group"):
        train("plain", tmp_path, monkeypatch, change, lesson="finetune")


# What BaseFinetuning does, and what it does not.


def test_lightnings_freeze_leaves_dropout_dropping_and_batchnorm_on_the_batchs_averages():
    torch.manual_seed(0)
    backbone, images = Noisy().backbone, torch.randn(8, 3, 32, 32)
    BaseFinetuning.freeze(backbone, train_bn=False)
    assert not any(weight.requires_grad for weight in backbone.parameters())
    assert all(part.training for part in backbone.modules())
    before = fingerprints(backbone.state_dict())
    once, again = backbone(images), backbone(images)
    assert not torch.equal(once, again)  # dropout
    convolved, norm = backbone[0](images), backbone[1]
    of_the_batch = F.batch_norm(convolved, None, None, norm.weight, norm.bias, training=True)
    assert torch.equal(norm(convolved), of_the_batch)
    # One thing more than requires_grad_(False) does: the running averages stand still.
    assert fingerprints(backbone.state_dict()) == before
    by_hand = Noisy().backbone.requires_grad_(False)
    by_hand(images)
    assert by_hand[1].num_batches_tracked == 1 and by_hand[1].running_mean.any()
    # eval is what does it.
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))
    assert not torch.equal(norm(convolved), of_the_batch)


def test_freeze_leaves_batchnorm_trainable_by_default():
    backbone = Noisy().backbone
    BaseFinetuning.freeze(backbone)
    trainable = [name for name, weight in backbone.named_parameters() if weight.requires_grad]
    assert trainable == ["1.weight", "1.bias"]


def test_the_callback_freezes_again_for_the_test(tmp_path, monkeypatch):
    """`setup` comes before each stage, and BaseFinetuning freezes there."""
    runs = both(tmp_path, monkeypatch, limit_train_batches=2)
    ends = {}
    for run in runs:
        weights = [weight.requires_grad for weight in run.net.backbone.parameters()]
        ends[run["side"]] = {*weights, run.net.backbone[1].track_running_stats}
    assert ends == {"plain": {True}, "lightning": {False}}


def test_filter_on_optimizer_compares_values_and_not_identity():
    ours, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="already exist within another group"):
        assert BaseFinetuning.filter_on_optimizer(optimizer, other.parameters()) == []
    # So it leaves out a layer that happens to be equal, and no step ever moves it.
    BaseFinetuning.freeze(other)
    with pytest.warns(UserWarning, match="already exist within another group"):
        BaseFinetuning.unfreeze_and_add_param_group(other, optimizer)
    assert len(optimizer.param_groups) == 1
    # With one number changed in its weight, that is taken, and the bias still is not.
    other.weight.data[0, 0] += 1
    with pytest.warns(UserWarning, match="already exist within another group"):
        taken = BaseFinetuning.filter_on_optimizer(optimizer, other.parameters())
    assert len(taken) == 1 and taken[0] is other.weight


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_weight_of_a_backbone_can_equal_one_of_the_head(backbone):
    """Why the lesson may use unfreeze_and_add_param_group: not even the shapes are the same."""
    with torch.device("meta"):
        net = Transfer(backbone)
    of_the_head = {tuple(weight.shape) for weight in net.head.parameters()}
    assert len(of_the_head) == 2
    assert not of_the_head & {tuple(weight.shape) for weight in net.backbone.parameters()}


# Pretrained weights, without a network.


def nobody(name):
    return f"http://127.0.0.1:9/{name}"


def official(monkeypatch, url):
    """Let torchvision name this address for the weights."""
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url))
    monkeypatch.setattr(models, "get_model_weights", lambda backbone: weights)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of weights as torchvision's, in name and content, but for their being random."""
    torch.manual_seed(7)
    net = models.get_model("mobilenet_v3_small", weights=None)
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))  # so that the running averages are not the initial ones
    path = tmp_path_factory.mktemp("official") / "weights"
    torch.save(net.state_dict(), path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"mobilenet_v3_small-{digits}.pth"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the weights lie, in a TORCH_HOME of our own. It is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def here(folder, weights_file, monkeypatch):
    """The weights are on this machine, and there is no network."""
    official(monkeypatch, nobody(weights_file.name))
    folder.mkdir(parents=True)
    path = folder / weights_file.name
    path.write_bytes(weights_file.read_bytes())
    return path


def small(seed=0):
    torch.manual_seed(seed)
    return Transfer("mobilenet_v3_small")


def assert_pretrained(net, path):
    """All but the last layer is the file's, to the bit."""
    theirs = torch.load(path)
    ours = net.backbone.state_dict()
    assert theirs.keys() - ours.keys() == {"classifier.3.weight", "classifier.3.bias"}
    assert len(ours) == 242 and equal(ours, {name: theirs[name] for name in ours})
    count("pretrained tensors", len(ours))


@pytest.mark.parametrize("choice", ["imagenet", "auto"])
def test_weights_that_are_here_are_taken(choice, here, capsys):
    net = small()
    assert not equal(net.backbone.state_dict(), small(1).backbone.state_dict())
    assert load_pretrained(net, "mobilenet_v3_small", choice) == "imagenet"
    assert_pretrained(net, here)
    assert equal(net.head.state_dict(), small().head.state_dict())
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_random_weights_stay_and_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(models, "get_model_weights", lambda *a: pytest.fail("looked"))
    net = small()
    assert load_pretrained(net, "mobilenet_v3_small", "random") == "random"
    assert equal(net.state_dict(), small().state_dict())


@pytest.mark.parametrize("choice", ["imagenet", "auto"])
@pytest.mark.parametrize("damage", ["cut short", "altered", "empty"])
def test_damaged_weights_are_refused_by_name(damage, choice, here):
    content = bytearray(here.read_bytes())
    content[len(content) // 2] ^= 1
    here.write_bytes({"altered": content, "cut short": content[:-1], "empty": b""}[damage])
    net = small()
    with pytest.raises(BadInput, match=re.escape(f"'{here}' is cut short or altered")) as caught:
        load_pretrained(net, "mobilenet_v3_small", choice)
    assert "\n" not in str(caught.value)
    assert equal(net.state_dict(), small().state_dict())
    count("damaged files")


def test_without_network_imagenet_is_refused(folder, monkeypatch):
    official(monkeypatch, nobody("mobilenet_v3_small-0123abcd.pth"))
    with pytest.raises(BadInput, match=r"not in .* and could not be downloaded") as caught:
        load_pretrained(small(), "mobilenet_v3_small", "imagenet")
    said = str(caught.value)
    assert str(folder) in said and "put mobilenet_v3_small-0123abcd.pth there" in said
    assert "\n" not in said and not folder.exists()


def test_without_network_auto_begins_with_random_weights_and_says_so(folder, monkeypatch, capsys):
    official(monkeypatch, nobody("mobilenet_v3_small-0123abcd.pth"))
    net = small()
    assert load_pretrained(net, "mobilenet_v3_small", "auto") == "random"
    assert equal(net.state_dict(), small().state_dict())
    said = capsys.readouterr()
    assert "THIS MOBILENET_V3_SMALL IS NOT PRETRAINED" in said.err and said.out == ""
    assert str(folder / "mobilenet_v3_small-0123abcd.pth") in said.err
    assert not folder.exists()


@pytest.fixture
def server(weights_file, folder, monkeypatch):
    """A server on this machine that has the weights; `server.cut` makes it break off."""
    content = weights_file.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        cut, asked = False, []

        def do_HEAD(self):
            self.asked.append(self.command)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content[: 100_000 if Handler.cut else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        port = httpd.server_address[1]
        official(monkeypatch, f"http://127.0.0.1:{port}/models/{weights_file.name}")
        yield Handler
        httpd.shutdown()


def test_weights_are_downloaded_whole_and_once(server, folder, weights_file):
    for seed in range(3):
        net = small(seed)
        assert load_pretrained(net, "mobilenet_v3_small", "imagenet") == "imagenet"
        assert_pretrained(net, weights_file)
    assert server.asked == ["HEAD", "GET"]
    assert [path.name for path in folder.iterdir()] == [weights_file.name]
    assert (folder / weights_file.name).read_bytes() == weights_file.read_bytes()


@pytest.mark.parametrize("choice", ["imagenet", "auto"])
def test_a_download_that_breaks_off_leaves_nothing(choice, server, folder, capsys):
    server.cut = True
    net = small()
    if choice == "imagenet":
        with pytest.raises(BadInput, match="the download broke off"):
            load_pretrained(net, "mobilenet_v3_small", choice)
    else:
        assert load_pretrained(net, "mobilenet_v3_small", choice) == "random"
        assert "the download broke off" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert equal(net.state_dict(), small().state_dict())
    server.cut = False  # and the next time it succeeds
    assert load_pretrained(net, "mobilenet_v3_small", choice) == "imagenet"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_torchvisions_names_end_with_the_digits_of_the_sum(backbone):
    url = models.get_model_weights(backbone).IMAGENET1K_V1.url
    name = url.rsplit("/", 1)[-1]
    assert url.startswith("https://") and re.fullmatch(rf"{backbone}-[0-9a-f]{{8}}\.pth", name)
    assert f"`{name}`" in PAGE


# A real network, with BatchNorm and dropout, from the weights to the picture.


@pytest.fixture(scope="module")
def real_runs(weights_file, tmp_path_factory):
    """Both sides with pretrained weights, two steps frozen and two unfrozen."""
    base = tmp_path_factory.mktemp("real")
    folder = base / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / weights_file.name).write_bytes(weights_file.read_bytes())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCH_HOME", str(base / "torch"))
        official(monkeypatch, nobody(weights_file.name))
        runs = both(base / "runs", monkeypatch, model=Transfer, backbone="mobilenet_v3_small",
                    weights="imagenet", limit_train_batches=2, limit_val_batches=1,
                    limit_test_batches=1)  # fmt: skip
    return base / "runs" / "finetune", runs


def test_both_sides_begin_with_the_pretrained_weights(real_runs, weights_file):
    theirs = fingerprints(torch.load(weights_file))
    for run in real_runs[1]:
        start, end = run["fingerprints"]["start"], run["fingerprints"]["weights"]
        kinds = {type(part).__name__ for part in run.net.modules()}
        assert {"BatchNorm2d", "Dropout"} <= kinds
        assert len(run["train_loss"]) == 4 and len(start) == 142  # parameters, without buffers
        for name, value in start.items():
            if name.startswith("backbone."):
                assert value == theirs[name.removeprefix("backbone.")]
        assert sum(end[name] != start[name] for name in start) > 120


@pytest.mark.parametrize("side", SIDES)
def test_the_checkpoint_says_what_is_on_a_picture(side, real_runs, tmp_path, capsys):
    image = tmp_path / "photo.png"
    to_pil_image(small_data().test.images[0]).save(image)
    predict([str(real_runs[0] / side / "checkpoints" / "last.ckpt"), str(image)])
    said = capsys.readouterr().out
    assert said.startswith("finetune: photo.png") and "Most likely: " in said
    assert "trained on shapes" in said or "trained on cifar10" in said


# Saved and loaded, on both sides and across them.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both sides, one epoch each, from different seeds: {side: (weights, [its two files])}."""
    base, found = tmp_path_factory.mktemp("trained"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for seed, side in enumerate(SIDES, start=1):
            run = train(side, base, monkeypatch, lesson="finetune", seed=seed,
                        max_epochs=1, unfreeze_at_epoch=0)  # fmt: skip
            folder = base / "finetune" / side
            files = {"last.ckpt": folder / "checkpoints" / "last.ckpt",
                     "weights.pt": folder / "weights.pt"}  # fmt: skip
            found[side] = run.net.state_dict(), files
    assert not equal(found["plain"][0], found["lightning"][0])
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_epochs": 1}, {"limit_train_batches": 7}, {"unfreeze_at_epoch": 2}],
    ids=str,
)  # fmt: skip
def test_every_key_of_both_checkpoints(settings, tmp_path, monkeypatch):
    both(tmp_path, monkeypatch, **settings)
    plain, lightning = (
        torch.load(tmp_path / "finetune" / side / "checkpoints" / "last.ckpt") for side in SIDES
    )
    common = ["epoch", "global_step", "hyper_parameters", "optimizer_states", "state_dict"]
    assert sorted(plain) == common
    more = ["callbacks", "hparams_name", "loops", "lr_schedulers", "pytorch-lightning_version"]
    assert sorted(lightning) == sorted(common + more)
    weights = {f"model.{name}": tensor for name, tensor in plain["state_dict"].items()}
    assert list(lightning["state_dict"]) == list(weights)
    assert equal(lightning["state_dict"], weights)
    for name in ("epoch", "global_step", "hyper_parameters"):
        assert plain[name] == lightning[name], name
    epochs = settings.get("max_epochs", 2)
    assert plain["epoch"] == epochs
    assert plain["global_step"] == epochs * settings.get("limit_train_batches", 15)
    (ours,), (theirs,) = plain["optimizer_states"], lightning["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() and len(ours["state"]) > 0
    for index in ours["state"]:
        tensors = [
            {name: torch.as_tensor(value) for name, value in state["state"][index].items()}
            for state in (ours, theirs)
        ]
        assert equal(*tensors)
    assert f"`{'`, `'.join(more)}`" in PAGE
    count("keys of checkpoints", len(common + more))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("written_by", SIDES)
@pytest.mark.parametrize("file", ["last.ckpt", "weights.pt"])
def test_each_side_loads_what_either_wrote(file, written_by, side, trained, tmp_path, monkeypatch):
    weights, files = trained[written_by]
    net = Noisy()
    lesson = load_lesson(side, "finetune")
    monkeypatch.setattr(lesson, "Transfer", lambda backbone: net)
    assert lesson.make_network(lesson.Args(start_from=files[file])) is net
    assert equal(net.state_dict(), weights)
    count("files loaded across the sides")


@pytest.mark.parametrize("written_by", SIDES)
@pytest.mark.parametrize("file", ["last.ckpt", "weights.pt"])
def test_both_sides_start_from_what_either_wrote(file, written_by, trained, tmp_path, monkeypatch):
    weights, files = trained[written_by]
    path, begun = files[file], fingerprints(weights)
    for result in both(tmp_path, monkeypatch, start_from=path, limit_train_batches=3):
        start = result["fingerprints"]["start"]
        assert start == {name: begun[name] for name in start} and len(start) == 6
        assert result["hyperparameters"]["start_from"].startswith(f"{path}, sha256 ")
    count("starts from the other side's file" if file == "last.ckpt" else "starts from weights.pt")


def blocks_to_run():
    """The page's Python that stands in no lesson, as code to run."""
    quoted = {code for _, code in quotations()}
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return [code for code in found if code not in quoted]


def run_block(word, **names):
    """Run the page's block that has `word` in it; return what it defined."""
    (code,) = [code for code in blocks_to_run() if word in code]
    exec(compile(code, "docs/finetune.md", "exec"), {"torch": torch}, names)
    count("blocks of the page run")
    return names


def test_lightnings_names_do_not_fit_the_bare_network(trained):
    path = trained["lightning"][1]["last.ckpt"]
    with pytest.raises(RuntimeError) as caught:
        Noisy().load_state_dict(torch.load(path)["state_dict"])
    assert 'Missing key(s) in state_dict: "backbone.0.weight"' in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "model.backbone.0.weight"' in str(caught.value)


def test_the_prefix_taken_off_by_hand(trained):
    weights, files = trained["lightning"]
    net = Noisy()
    run_block("removeprefix", net=net, path=files["last.ckpt"])
    assert equal(net.state_dict(), weights)


def test_the_plain_checkpoint_in_the_module(trained):
    weights, files = trained["plain"]
    lesson = load_lesson("lightning", "finetune")
    args = lesson.Args()
    settings = dict(args=args, path=files["last.ckpt"], LitFinetune=lesson.LitFinetune)
    # Neither way that belongs to the module takes it.
    with pytest.raises(KeyError, match="pytorch-lightning_version"):
        lesson.LitFinetune.load_from_checkpoint(files["last.ckpt"], model=Noisy(), args=args)
    with pytest.raises(RuntimeError, match=r'Missing key.*"model\.backbone'):
        state = torch.load(files["last.ckpt"])["state_dict"]
        lesson.LitFinetune(Noisy(), args).load_state_dict(state)
    module = run_block("module.model.load_state_dict", net=Noisy(), **settings)["module"]
    assert equal(module.model.state_dict(), weights)


def test_load_from_checkpoint(trained):
    weights, files = trained["lightning"]
    lesson, net = load_lesson("lightning", "finetune"), Noisy()
    args = lesson.Args()
    settings = dict(args=args, path=files["last.ckpt"], LitFinetune=lesson.LitFinetune)
    module = run_block("load_from_checkpoint", net=net, **settings)["module"]
    assert module.model is net and equal(net.state_dict(), weights)
    assert module.hparams["momentum"] == 0.9
    stored = torch.load(files["last.ckpt"])["hyper_parameters"]
    assert stored["lesson"] == "finetune" and len(stored["classes"]) == 10


class Settings(L.LightningModule):
    """A module as people write them: it receives its network, and saves its settings."""

    def __init__(self, model, settings=None):
        super().__init__()
        self.model = model
        self.save_hyperparameters(settings)

    def save(self, path):
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(self)
        trainer.save_checkpoint(path)


def test_what_is_given_to_load_from_checkpoint_becomes_a_setting(tmp_path):
    """Such a module can save a file that torch.load then refuses."""
    path = tmp_path / "last.ckpt"
    Settings(Noisy(), {"lr": 0.3}).save(path)
    assert torch.load(path)["hyper_parameters"] == {"lr": 0.3}
    with pytest.warns(UserWarning, match="Attribute 'model' is an instance of"):
        module = Settings.load_from_checkpoint(path, model=Noisy())
    assert module.hparams["lr"] == 0.3 and isinstance(module.hparams["model"], Noisy)
    module.save(path)
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL common\.small\.Noisy"):
        torch.load(path)


def test_an_optimizers_state_needs_both_groups(trained):
    for side in SIDES:
        _, files = trained[side]
        (state,) = torch.load(files["last.ckpt"])["optimizer_states"]
        net = Noisy()
        optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0, momentum=0.9)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state)
        optimizer.add_param_group({"params": list(net.backbone.parameters())})
        optimizer.load_state_dict(state)
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.002]
        assert len(optimizer.state) == 6


@pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of", "ignore:Found keys")
def test_strict_false_loads_nothing_and_says_nothing(trained, tmp_path):
    weights, files = trained["lightning"]
    net = Noisy()
    before = fingerprints(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = net.load_state_dict(torch.load(files["last.ckpt"])["state_dict"], strict=False)
    assert fingerprints(net.state_dict()) == before
    # Only the return value tells: every weight is missing, every weight is unexpected.
    assert set(told.unexpected_keys) == {f"model.{name}" for name in weights}
    assert set(told.missing_keys) >= {*BACKBONE, *HEAD}
    # Lightning's own way has the same argument, and warns.
    content = torch.load(files["last.ckpt"])
    content["state_dict"] = {name.removeprefix("model."): weights[name] for name in weights}
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    lesson = load_lesson("lightning", "finetune")
    with pytest.warns(UserWarning, match="in the model state dict but not in the checkpoint"):
        lesson.LitFinetune.load_from_checkpoint(path, model=net, args=lesson.Args(), strict=False)
    assert fingerprints(net.state_dict()) == before


# The whole model.


def test_a_whole_network_is_refused_since_pytorch_2_6(tmp_path):
    path = tmp_path / "net.pt"
    net = small()
    torch.save(net, path)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(path)
    assert "In PyTorch 2.6, we changed the default value" in str(caught.value)
    (quoted,) = re.findall(r"^UnpicklingError: (.+?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for part in quoted.replace("\n", " ").split(" [...] "):
        assert part.strip() in str(caught.value), part
    assert "GLOBAL common.models.Transfer" in quoted
    assert equal(torch.load(path, weights_only=False).state_dict(), net.state_dict())


def test_a_whole_network_needs_its_class_where_it_was(tmp_path, monkeypatch):
    source = "from torch import nn\n\n\nclass Small(nn.Linear):\n    pass\n"
    (tmp_path / "mynets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    net = importlib.import_module("mynets").Small(2, 3)
    torch.save(net, tmp_path / "net.pt")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    load = lambda: torch.load(tmp_path / "net.pt", weights_only=False)  # noqa: E731
    assert equal(load().state_dict(), net.state_dict())
    # The class gets another name.
    del sys.modules["mynets"]
    (tmp_path / "mynets.py").write_text(source.replace("Small", "Renamed"))
    importlib.invalidate_caches()
    with pytest.raises(AttributeError, match="Small"):
        load()
    other = sys.modules["mynets"].Renamed(2, 3)
    # The file moves, or the other program never had it.
    del sys.modules["mynets"]
    (tmp_path / "mynets.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="mynets"):
        load()
    # A state_dict asks for names and shapes alone.
    assert not equal(other.state_dict(), net.state_dict())
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert equal(other.state_dict(), net.state_dict())


# Files for --start-from that are none.


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def bad_file(name, path, trace):
    """Write the file of that name; return what the sentence must say."""
    good = {"state_dict": small().state_dict(), "epoch": 1}
    if name == "a pickle that runs a command":
        path.write_bytes(pickle.dumps(Touch(trace)))
        return f"would call {os.system.__module__}.system"
    if name == "weights, and beside them a command":
        torch.save({**good, "hyper_parameters": Touch(trace)}, path)
        return f"would call {os.system.__module__}.system"
    if name == "a whole network":
        torch.save(small(), path)
        return "would call common.models.Transfer"
    if name == "another network":
        checkpoints.save(path, {"state_dict": Net().state_dict()})
        return "does not fit Transfer: 244 missing"
    if name == "one weight missing":
        del good["state_dict"]["head.bias"]
        checkpoints.save(path, good)
        return "1 missing (the first: 'head.bias')"
    if name == "not there":
        return "cannot be read (No such file or directory)"
    if name == "a text":
        path.write_text("epoch,loss\n1,2.3\n")
        return "is not a checkpoint at all"
    checkpoints.save(path, good)
    content = bytearray(path.read_bytes())
    if name == "cut short":
        path.write_bytes(content[:-1000])
    if name == "one bit altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return {"good": None}.get(name, "is cut short or altered")


BAD = [
    "a pickle that runs a command", "weights, and beside them a command", "a whole network",
    "another network", "one weight missing", "not there", "a text", "cut short", "one bit altered",
]  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_ends_with_one_sentence(name, side, tmp_path, monkeypatch, capsys):
    trace, path = tmp_path / "trace", tmp_path / "start.ckpt"
    expected = bad_file(name, path, trace)
    kept = tmp_path / "runs" / "finetune" / side / "result.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier result")
    monkeypatch.chdir(tmp_path)
    module = load_lesson(side, "finetune")
    monkeypatch.setattr(module, "load_images", lambda *a: small_data(lesson="finetune"))
    arguments = ["--backbone", "mobilenet_v3_small", "--accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments, "--start-from", "start.ckpt"])
    with pytest.raises(SystemExit) as exit_:
        run_lesson(module.main, module.Args)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the checkpoint 'start.ckpt' ") and said.count("\n") == 1, said
    assert expected in said, said
    assert not trace.exists()
    assert kept.read_text() == "an earlier result"
    if "command" in name:  # the file is a real one: this runs it
        if name.startswith("weights"):
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert trace.exists()
    count("bad files refused")


# The backbones.


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gets_a_new_last_layer(name):
    parameters, of_the_head, last_name = BACKBONES[name]
    images = torch.zeros(2, 3, 32, 32)
    with torch.device("meta"):  # shapes without numbers: VGG16's would take half a gigabyte
        net, theirs = Transfer(name), models.get_model(name, weights=None)
    assert sum(weight.numel() for weight in net.parameters()) == parameters
    assert sum(weight.numel() for weight in net.head.parameters()) == of_the_head
    kinds = {type(part).__name__ for part in net.modules()}
    has = " | ".join("yes" if kind in kinds else "no" for kind in ("BatchNorm2d", "Dropout"))
    assert f"| `{name}` | {parameters:,} | {of_the_head:,} | {has} |" in PAGE
    assert net(images.to("meta")).shape == (2, 10)
    # torchvision's network, with nothing in place of its last layer.
    assert net.last_name == last_name and isinstance(theirs.get_submodule(last_name), nn.Linear)
    assert isinstance(net.backbone.get_submodule(last_name), nn.Identity)
    last = [f"{last_name}.weight", f"{last_name}.bias"]
    assert [*net.backbone.state_dict()] == [n for n in theirs.state_dict() if n not in last]
    assert theirs.get_submodule(last_name).in_features == net.head.in_features
    if name != "vgg16":
        assert Transfer(name).eval()(images).shape == (2, 10)
    count("backbones")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_batchnorm_cannot_train_on_one_picture(name):
    """Of 32 pixels a side, one is left at the end."""
    net, image = Transfer(name), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"Expected more than 1 value.*, 1, 1\]"):
        net(image)
    assert net.eval()(image).shape == (1, 10)
    if name == "resnet18":
        assert net.train()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_these_are_all_backbones():
    hints = typing.get_type_hints(load_lesson("plain", "finetune").Args)
    assert typing.get_args(hints["backbone"]) == tuple(BACKBONES)


# The page.


def quotations():
    """The code that the page quotes from a lesson: (path, code)."""
    return re.findall(
        r"\[((?:plain|lightning)/finetune\.py)\][^\n]*\n\n```python\n(.*?)```", PAGE, re.DOTALL
    )


def test_the_quoted_code_stands_in_the_lessons():
    assert len(quotations()) >= 4
    for path, code in quotations():
        source = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        place = 0
        for line in code.splitlines():
            place = source.index(line.strip(), place) + 1  # in this order
            count("lines of code on pages")


def test_the_code_of_the_page_is_run():
    assert len(blocks_to_run()) == 3
    by_hand = next(code for code in blocks_to_run() if "removeprefix" in code)
    assert by_hand.count("\n") == 3


def test_the_cells_are_those_of_the_lesson():
    titles = re.findall(r"^\| ([A-Z][^|]+?) \|", PAGE, re.MULTILINE)
    for side in SIDES:
        source = (ROOT / side / "finetune.py").read_text()
        assert titles == [title for title in cells(source) if title]


def test_the_exercises_are_tested_changes():
    rows = re.findall(r"^\| (.+) \| (plain|lightning) \| (\w+) \|$", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(CHANGES)
    for name, side, stage in rows:
        assert CHANGES[name][:2] == (side, stage), name
        count("exercises")


def test_the_options_of_the_page_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r'make \w+-finetune ARGS="([^"]+)"', PAGE)
    assert len(found) >= 4
    for typed in found:
        module = load_lesson("plain", "finetune")
        args = parse(module.Args, ROOT / "plain" / "finetune.py", typed.split())
        assert args != module.Args()


def test_links_and_tests_that_the_page_names_are_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert Path(ROOT / "docs" / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert name in globals(), name


@pytest.mark.parametrize("side", SIDES)
def test_a_batch_of_one_image_is_refused(side, tmp_path, monkeypatch, capsys):
    """BatchNorm would raise an error in the middle of the training."""
    for size in ("1", "17"):  # 45,000 = 17 * 2,647 + 1
        monkeypatch.setattr(
            sys, "argv",
            ["finetune.py", "--data", "shapes", "--backbone", "resnet18", "--batch-size", size,
             "--runs-dir", str(tmp_path)],
        )  # fmt: skip
        module = load_lesson(side, "finetune")
        with pytest.raises(SystemExit) as exit_:
            run_lesson(module.main, module.Args)
        said = capsys.readouterr().err
        assert exit_.value.code == 2 and said.count("\n") == 1
        assert f"--batch-size {size} makes a batch of one image" in said
        count("bad inputs")


def test_parity_does_not_start_from_what_it_moves_away(tmp_path):
    start = str(tmp_path / "finetune" / "plain" / "checkpoints" / "last.ckpt")
    with pytest.raises(BadInput, match="copy the file elsewhere and name the copy"):
        parity.main(["finetune", "--start-from", start, "--runs-dir", str(tmp_path)])


def test_another_start_file_of_the_same_name_makes_another_run(tmp_path):
    start = tmp_path / "start.ckpt"
    found = []
    for content in (b"one", b"two"):
        start.write_bytes(content)
        args = settings_of(tmp_path, start_from=start)
        found.append(watch.hyperparameters(args)["start_from"])
    assert found[0] != found[1] and all(str(start) in text for text in found)


def settings_of(runs_dir, **settings):
    return arguments(load_lesson("plain", "finetune"), "plain", "finetune", runs_dir, **settings)


def test_random_weights_that_stood_in_are_not_reused(weights_file, tmp_path, monkeypatch):
    args = settings_of(tmp_path, weights="auto", backbone="mobilenet_v3_small")
    path = tmp_path / "finetune" / "plain" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    result = {
        "data": "cifar10",
        "seed": args.seed,
        "hyperparameters": watch.hyperparameters(args),
        "versions": versions(),
        "threads": 1,
        "code_sha256": code_sha256("plain"),
    }
    come = tmp_path / weights_file.name
    monkeypatch.setattr(pretrained, "_place", lambda backbone: ("", come))
    assert parity.why_run(result, "plain", args) == ""
    come.write_bytes(b"the pretrained weights, which came later")
    os.utime(path, (1, 1))
    assert "Random weights stood in" in parity.why_run(result, "plain", args)
