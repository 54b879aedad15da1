"""The doctor's negative controls: one change to one side, and what the diagnosis must say.

`python tests/controls.py` runs all of them, and the equal pairs, and writes the tables of
docs/doctor.md. tests/test_doctor.py runs the same (a part in `make test`, all in `make test-slow`).
"""

from common import ROOT
from common.messages import clear_messages
from common.small import traced

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from control import Control, replaced
from controls_fabric import FABRIC
from controls_gan import GANS
from controls_predict import PREDICT
from controls_tokens import TOKENS
from controls_when import WHEN
from helpers import SIDES, Noisy, lessons, network_of, train
from samebits import Diagnosis, compare
from torch import nn

PAGE = ROOT / "docs" / "doctor.md"
# The lesson `optimize` with little of it on: each control changes one thing.
OPTIMIZE = dict(lesson="optimize", schedule="none", gradient_clip_val=0.0, ema_decay=0.0,
                accumulate_grad_batches=1, label_smoothing=0.0)  # fmt: skip
# The lesson whose optimizer is Adam.
ADAM = dict(lesson="callbacks", lr=0.002)


class DrawnBetween(Noisy):
    """The same network, with a random number drawn between its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.rand(1)
        self.head = nn.Linear(self.flattened, 10)


class Drawn(Noisy):
    """Its counterpart: the head is drawn twice, and nothing else is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.flattened, 10)


class OtherInitialization(Noisy):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight *= 4


class MoreDropout(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[4].p = 0.4


class LeakyNoisy(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[2] = nn.LeakyReLU(0.1)


class ScaledNoisy(Noisy):
    def forward(self, x):
        return self.head(1.01 * self.backbone(x)).log_softmax(1)


class DetachedNoisy(Noisy):
    def forward(self, x):
        return self.head(self.backbone(x).detach()).log_softmax(1)


class FrozenNoisy(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[0].requires_grad_(False)


TO_DEVICE = (
    "        #: The model went to its device once; each batch has to follow it.\n"
    "        images, labels = images.to(device), labels.to(device)\n"
)
LOSS = "loss = F.cross_entropy(model(images), labels)"
STEP = "        optimizer.step()\n"
MAIN = "    net = Net().to(device)\n"
LOADERS = "make_loaders(data, args)\n"
SGD = "torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)"
LIT_SGD = "torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)"


CONTROLS: dict[str, Control] = {
    "another seed": replaced(
        "plain", "start", "Another seed",
        "seed_everything(args.seed)", "seed_everything(args.seed + 1)"),
    "a layer built before the network": replaced(
        "lightning", "start", "Another seed, or random numbers drawn before",
        "    model = LitClassifier(", "    torch.nn.Linear(2, 2)\n    model = LitClassifier("),
    "a number drawn between two layers": Control(
        "plain", "start", "Random numbers drawn between", model=DrawnBetween,
        settings=dict(model=Drawn)),
    "another initialization": Control(
        "plain", "start", "Another initialization", model=OtherInitialization),
    "no set_epoch": replaced(
        "plain", "batch", "set_epoch is missing in",
        "        train_loader.sampler.set_epoch(epoch)\n", ""),
    "another shuffle": replaced(
        "plain", "batch", "Shuffled with another seed",
        "sampler.set_epoch(epoch)", "sampler.set_epoch(epoch + 7)"),
    "the first batch left out": replaced(
        "plain", "batch", "A batch was left out",
        "bar = tqdm(loader,", "bar = tqdm(list(loader)[1:],"),
    "another batch size": Control(
        "plain", "batch", "Another batch size", own=dict(batch_size=12)),
    "the short last batch dropped": replaced(
        "plain", "batch", "The last batch of an epoch is dropped",
        LOADERS, LOADERS + "    train_loader.sampler.first = 112\n", batch_size=16),
    "images not normalized": replaced(
        "plain", "batch", "Another scaling", TO_DEVICE, TO_DEVICE + "        images = images"
        " / 2 + 0.5\n"),
    "images left at 0 to 255": replaced(
        "plain", "batch", "Another scaling", TO_DEVICE, TO_DEVICE + "        images = (images"
        " / 2 + 0.5) * 255\n"),
    "normalized per channel on one side": replaced(
        "plain", "batch", "Another scaling", TO_DEVICE, TO_DEVICE + "        images = (images"
        " - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.4\n"),
    "images flipped": replaced(
        "plain", "batch", "The same values in other places",
        TO_DEVICE, TO_DEVICE + "        images = images.flip(3)\n"),
    "colour channels exchanged": replaced(
        "plain", "batch", "The same values in other places",
        TO_DEVICE, TO_DEVICE + "        images = images.flip(1)\n"),
    "noise on half of the images": replaced(
        "plain", "batch", "Some samples are changed",
        TO_DEVICE, TO_DEVICE + "        images[::2] += 0.1 * images[::2] ** 2\n"),
    "no train() after validation": replaced(
        "plain", "mode", "model.train() is missing", "    model.train()\n", ""),
    "a part put into eval mode": replaced(
        "plain", "mode", "A part of the network is frozen",
        "    model.train()\n", "    model.train()\n    model.backbone[1].eval()\n"),
    "no eval() before validation": replaced(
        "plain", "weights", "model.eval() is missing", "    model.eval()\n", ""),
    "a summary after the seed": replaced(
        "lightning", "weights", "A forward pass without a backward pass",
        "    trainer = L.Trainer(", "    summary(model.model, (3, 32, 32), device='cpu')\n"
        "    trainer = L.Trainer("),
    "a second forward pass for the accuracy": replaced(
        "plain", "buffers", "A forward pass without a backward pass", STEP,
        "        model(images)\n" + STEP),
    "weights clamped after each step": replaced(
        "plain", "weights", "Weights were loaded, averaged or clamped", STEP,
        STEP + "        with torch.no_grad():\n"
        "            model.head.weight.clamp_(-0.04, 0.04)\n"),
    "a random number drawn before training": replaced(
        "plain", "random", "Random numbers",
        "    for epoch in range(args.max_epochs):", "    torch.rand(1)\n"
        "    for epoch in range(args.max_epochs):"),
    "another dropout": Control(
        "plain", "output", "A layer with another setting", model=MoreDropout),
    "another activation": Control(
        "plain", "output", "A layer with another setting", model=LeakyNoisy),
    "a factor in forward": Control(
        "plain", "output", "Another computation", model=ScaledNoisy),
    "autocast on one side": Control(
        "lightning", "output", "Another precision", own=dict(precision="bf16-mixed"),
        settings=OPTIMIZE),
    "sum instead of mean": replaced(
        "plain", "loss", "reduction='sum'", LOSS,
        "loss = F.cross_entropy(model(images), labels, reduction='sum')"),
    "the loss divided by 4": replaced(
        "plain", "loss", "The loss is divided by 4", LOSS, LOSS + " / 4"),
    "label smoothing on one side": replaced(
        "plain", "loss", "Another loss", LOSS,
        "loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)"),
    "softmax applied twice": replaced(
        "plain", "loss", "Another loss", LOSS,
        "loss = F.cross_entropy(model(images).softmax(1), labels)"),
    "labels shifted by one": replaced(
        "plain", "loss", "Other targets", LOSS,
        "loss = F.cross_entropy(model(images), (labels + 1) % 10)"),
    "one label wrong": replaced(
        "plain", "loss", "Other targets", TO_DEVICE,
        TO_DEVICE + "        labels[0] = (labels[0] + 3) % 10\n"),
    "a layer frozen": Control("lightning", "gradient", "Frozen or detached", model=FrozenNoisy),
    "a part detached": Control("plain", "gradient", "Frozen or detached", model=DetachedNoisy),
    "a penalty on the weights": replaced(
        "plain", "gradient", "A term of the loss", LOSS,
        LOSS + " + 1e-3 * model.head.weight.square().sum()"),
    "no zero_grad": replaced(
        "plain", "clipping", "Left-over gradients", "        optimizer.zero_grad()\n", ""),
    "gradients clipped by norm": replaced(
        "plain", "clipping", "The gradients' norm is clipped", STEP,
        "        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n" + STEP),
    "gradients clipped by value": replaced(
        "plain", "clipping", "The gradients' values are clipped", STEP,
        "        torch.nn.utils.clip_grad_value_(model.parameters(), 0.001)\n" + STEP),
    "gradients divided by 2": replaced(
        "plain", "clipping", "The gradients are divided by 2", STEP,
        "        [p.grad.div_(2) for p in model.parameters()]\n" + STEP),
    "another limit for the norm": Control(
        "lightning", "clipping", "The gradients' norm is clipped", own=dict(gradient_clip_val=0.05),
        settings=OPTIMIZE | dict(gradient_clip_val=0.1)),
    "another learning rate": replaced(
        "plain", "update", "Another learning rate", "lr=args.lr, m", "lr=1.001 * args.lr, m"),
    "weight decay on one side": replaced(
        "lightning", "update", "Another weight decay", LIT_SGD,
        LIT_SGD.replace("momentum)", "momentum, weight_decay=1e-4)")),
    "no momentum": replaced(
        "plain", "update", "Another setting of the optimizer: momentum",
        "momentum=args.momentum", "momentum=0"),
    "Nesterov's momentum": replaced(
        "lightning", "update", "Another setting of the optimizer: nesterov",
        LIT_SGD, LIT_SGD.replace("momentum)", "momentum, nesterov=True)")),
    "AdamW for Adam": replaced(
        "plain", "update", "Another optimizer", "torch.optim.Adam(", "torch.optim.AdamW(", **ADAM),
    "another epsilon": replaced(
        "plain", "update", "Another setting of the optimizer: eps", "torch.optim.Adam("
        "net.parameters(), lr=args.lr)", "torch.optim.Adam(net.parameters(), lr=args.lr, "
        "eps=1e-6)", **ADAM),
    "the optimizer made anew in each epoch": replaced(
        "plain", "update", "The optimizer was made anew", "        #: Without set_epoch",
        f"        optimizer = {SGD}\n        #: Without set_epoch"),
    "Adam made anew in each epoch": replaced(
        "plain", "update", "The optimizer was made anew",
        "        train_loader.sampler.set_epoch(epoch)\n",
        "        train_loader.sampler.set_epoch(epoch)\n"
        "        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)\n", **ADAM),
    "parameters not given to the optimizer": replaced(
        "plain", "update", "Parameters that the optimizer was not given",
        "torch.optim.SGD(net.parameters()", "torch.optim.SGD(net.head.parameters()"),
    "weight decay for biases, too": replaced(
        "plain", "update", "Other groups of parameters",
        "    optimizer = make_optimizer(net, args)\n",
        "    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr,"
        " momentum=args.momentum, weight_decay=args.weight_decay)\n", **OPTIMIZE),
    "the schedule told of epochs": replaced(
        "lightning", "update", "The schedule moves by step",
        'interval = "epoch" if plateau else self.hparams.interval', 'interval = "epoch"',
        **OPTIMIZE | dict(schedule="onecycle", max_epochs=3)),
    "the schedule's entry forgotten": replaced(
        "lightning", "update", "A schedule on one side only",
        '        return {"optimizer": optimizer, "lr_scheduler": config}',
        "        return optimizer", **OPTIMIZE | dict(schedule="cosine", interval="step")),
    "the schedule before the step": Control(
        "plain", "update", "The schedule moves before", (
            ('            if args.interval == "step" and args.schedule != "plateau":\n'
             "                schedule.step()\n", ""),
            ("            scaler.step(optimizer)\n",
             "            schedule.step()\n            scaler.step(optimizer)\n"),
        ), settings=OPTIMIZE | dict(schedule="cosine", interval="step")),
    "another length of the schedule": replaced(
        "lightning", "update", "Another schedule", "make_schedule(optimizer, self.hparams, "
        "steps)", "make_schedule(optimizer, self.hparams, 2 * steps)",
        **OPTIMIZE | dict(schedule="cosine", interval="step")),
    "gradients accumulated on one side": Control(
        "lightning", "loss", "Gradients of several batches", settings=OPTIMIZE,
        own=dict(accumulate_grad_batches=2)),
    "accumulated on one side, and not divided": Control(
        "plain", "steps", "Gradients of several batches",
        (("loss * weight / group", "loss * weight"),),
        own=dict(accumulate_grad_batches=2), settings=OPTIMIZE),
    "accumulated, but not divided": replaced(
        "plain", "loss", "The loss is divided by 2", "loss * weight / group",
        "loss * weight", **OPTIMIZE | dict(accumulate_grad_batches=2)),
    "the last step taken twice": replaced(
        "plain", "steps", "optimizer.step() is called", STEP,
        STEP + "        if step + 1 == 2 * len(loader):\n            optimizer.step()\n"),
    "one batch less": replaced(
        "plain", "steps", "More epochs or batches", "bar = tqdm(loader,",
        "bar = tqdm(list(loader)[: len(loader) - epoch],"),
    "one epoch more": Control(
        "lightning", "steps", "More epochs or batches", own=dict(max_epochs=3)),
    "weights loaded after the training": replaced(
        "plain", "weights", "Weights were loaded after the last step",
        "    return net\n", "    net.head.bias.data.zero_()\n    return net\n"),
    **WHEN,
    **FABRIC,
    **PREDICT,
    **GANS,
    **TOKENS,
}  # fmt: skip

# Equal runs, of both sides of a lesson: the doctor must find nothing.
EQUAL: list[dict[str, Any]] = [
    *(dict(lesson=lesson) for lesson in lessons()),
    *(dict(lesson="cifar", seed=seed) for seed in (1, 2, 3)),
    ADAM,
    dict(lesson="cifar", threads=2),
    dict(lesson="fashion", threads=2, batch_size=64),
    dict(lesson="cifar", batch_size=16, seed=4),
    dict(lesson="cifar", max_epochs=3, limit_val_batches=1),
    dict(lesson="resume", lr=0.05),
    dict(**ADAM, threads=2),
    dict(lesson="optimize", schedule="onecycle"),
    dict(lesson="optimize", schedule="cosine", interval="step", gradient_clip_algorithm="value"),
    dict(lesson="optimize", precision="bf16-mixed"),
    dict(lesson="optimize", accumulate_grad_batches=4, exact_accumulation=True, seed=5),
    dict(lesson="optimize", schedule="plateau", lr=0.05),
    dict(lesson="finetune", seed=6),
]


def trace(side: str, path: Path, monkeypatch, *changes, model=None, lesson="cifar", **settings):
    """Train one side as `helpers.train` does, with a trace around it; nothing in it changes."""
    with traced(model or network_of(lesson), path) as build:
        return train(side, path.with_suffix(""), monkeypatch, *changes, model=build,
                     lesson=lesson, **settings)  # fmt: skip


def diagnose(control: Control, folder: Path) -> Diagnosis:
    """Trace both sides, of which one is changed, and compare: A is plain, B lightning."""
    for side in SIDES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            changed = side == control.side
            settings = dict(control.settings) | (control.own if changed else {})
            if changed and control.model:
                settings["model"] = control.model
            changes = control.changes if changed else ()
            trace(side, folder / f"{side}.trace", monkeypatch, *changes, **settings)
    return compare(folder / "plain.trace", folder / "lightning.trace")


def equal(settings: dict[str, Any], folder: Path) -> Diagnosis:
    for side in SIDES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            trace(side, folder / f"{side}.trace", monkeypatch, **settings)
    return compare(folder / "plain.trace", folder / "lightning.trace")


def row(name: str, control: Control, diagnosis: Diagnosis) -> str:
    """Return a line of the table: the change, the first difference, the verdict."""
    more = f" and {diagnosis.others} more" if diagnosis.others else ""
    first = f"step {diagnosis.step}, {diagnosis.stage}: {diagnosis.what}{more}"
    right = diagnosis.stage == control.stage
    named = bool(diagnosis.causes) and diagnosis.causes[0].name.startswith(control.cause)
    cause = diagnosis.causes[0].name if diagnosis.causes else "none"
    words = {True: "right", False: "**wrong**"}
    return f"| {name} ({control.side}) | {first} | {cause} | {words[right]}, {words[named]} |"


def tables() -> str:
    """Run everything and return what docs/doctor.md shows."""
    rows, alarms = [], []
    for name, control in CONTROLS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, control, quietly(diagnose, control, Path(folder))))
        print(rows[-1], flush=True)
    for settings in EQUAL:
        with tempfile.TemporaryDirectory() as folder:
            diagnosis = quietly(equal, settings, Path(folder))
        if not diagnosis.equal:
            alarms.append(f"{settings}: {diagnosis}")
        print(settings, "equal" if diagnosis.equal else diagnosis, flush=True)
    stages = sum("| right, " in line for line in rows)
    causes = sum(line.endswith(", right |") for line in rows)
    return "\n".join([
        "| change (side) | first difference | first cause named | stage, cause |",
        "| --- | --- | --- | --- |", *rows, "",
        f"{len(rows)} changes: the right stage for {stages}, the right cause first for {causes}. "
        f"{len(EQUAL)} pairs of equal runs: {len(alarms)} false alarms.",
    ])  # fmt: skip


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def main() -> None:
    # As torchrun does it. Else Lightning's DDP, in the lesson parallel, takes as many as there are
    # cores: the doctor found it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    made = tables()
    written(PAGE, "made by make controls", made)
    print(made.splitlines()[-1])


def written(page: Path, mark: str, made: str) -> None:
    """Write into a page what a command made, between its mark and the end."""
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    temporary = page.with_suffix(".part")
    temporary.write_text(f"{before}<!-- {mark} -->\n{made}\n{end}{after}")
    temporary.replace(page)


if __name__ == "__main__":
    with clear_messages():
        sys.exit(main())
