"""Classification and regression: losses, targets, heads, and how a step is made of batches."""

from typing import ClassVar

import torch
from torch import nn

from . import Case, F, Lit, choices, descend, fit, numbers

POINTS = [(numbers(900 + i, 16, 6), choices(950 + i, 0, 3, 16)) for i in range(6)]


def adam(net):
    return torch.optim.Adam(net.parameters(), 1e-2)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


class Simple(Case):
    """A case whose sides differ in `loss` alone."""

    batches: ClassVar = POINTS

    def build(self):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    @staticmethod
    def loss(output, target, right):
        return F.cross_entropy(output, target)

    def loop(self, net):
        optimizer = adam(net)
        for x, y in self.batches:
            descend(optimizer, self.loss(net(x), y, True))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                return case.loss(self.net(batch[0]), batch[1], self.fixed)

        fit(Port(net, fixed, adam), self.batches, callbacks)


class BroadcastLoss(Simple):
    source = "pytorch/pytorch#4938"
    mistake = "mean squared error of (n, 1) against (n)"
    stage, cause = "loss", "Shapes broadcast in the loss: (n, 1) against (n)"
    batches: ClassVar = [(x, x.sum(1)) for x, _ in POINTS]

    def build(self):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

    @staticmethod
    def loss(output, target, right):
        return F.mse_loss(output.squeeze(1) if right else output, target)


class Mixup(Simple):
    source = "hongyi-zhang/Fixup#5"
    mistake = "mixup: the share of the other sample is 0 for the inputs, and not for the targets"
    stage, cause = "batch", "The samples of a batch are mixed with each other (mixup)"

    def batch(self, x, y, right):
        share = 0.7
        other = torch.arange(len(x)).roll(3)
        part = share if right else round(share)
        return part * x + (1 - part) * x[other], y, y[other], share

    def mixed(self, net, batch, right):
        x, one, other, share = self.batch(*batch, right)
        output = net(x)
        return share * F.cross_entropy(output, one) + (1 - share) * F.cross_entropy(output, other)

    def loop(self, net):
        optimizer = adam(net)
        for batch in self.batches:
            descend(optimizer, self.mixed(net, batch, True))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                return case.mixed(self.net, batch, self.fixed)

        fit(Port(net, fixed, adam), self.batches, callbacks)


class SigmoidTwice(Simple):
    source = "YXNTU/GeneralDyG#6"
    mistake = "a sigmoid before a loss that takes logits, with several labels a sample"
    stage, cause = "loss", "Another loss: sigmoid is applied twice in B"
    batches: ClassVar = [
        (x, (numbers(970 + i, 16, 3) > 0).float()) for i, (x, _) in enumerate(POINTS)
    ]

    @staticmethod
    def loss(output, target, right):
        logits = output if right else output.sigmoid()
        return F.binary_cross_entropy_with_logits(logits, target)


class ClassWeights(Simple):
    source = "vandit15/Class-balanced-loss-pytorch#2"
    mistake = "the weights of the two classes are not passed"
    stage, cause = "loss", "Another loss: weights of the classes"
    batches: ClassVar = [(x, (y > 1).long()) for x, y in POINTS]

    def build(self):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    @staticmethod
    def loss(output, target, right):
        return F.cross_entropy(output, target, torch.tensor([1.0, 3.0]) if right else None)


class WeightForPosWeight(Simple):
    source = "open-mmlab/mmpretrain#434"
    mistake = "the weights of the positive targets are passed as those of the classes"
    stage, cause = "loss", "Another loss: weights of the classes (weight, pos_weight)"
    batches: ClassVar = SigmoidTwice.batches
    weights = torch.tensor([1.5, 2.0, 5.0])

    @staticmethod
    def loss(output, target, right):
        which = "pos_weight" if right else "weight"
        weights = {which: WeightForPosWeight.weights}
        return F.binary_cross_entropy_with_logits(output, target, **weights)


class Losses(nn.Module):
    """A network that computes its losses itself, as those that detect objects do."""

    def __init__(self):
        super().__init__()
        self.body, self.kind, self.box = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x, y):
        hidden = self.body(x).relu()
        box = self.box(hidden)
        return {
            "loss_class": F.cross_entropy(self.kind(hidden), y),
            "loss_box": (box - x[:, :1]).abs().mean(),
            "loss_size": box.square().mean(),
        }


class LeftOutLoss(Simple):
    source = "facebookresearch/detectron2#5024"
    mistake = "the sum leaves out one of the losses that the network returns"
    stage, cause = "loss", "A term of the loss is missing on one side"
    build = staticmethod(Losses)

    def loop(self, net):
        optimizer = adam(net)
        for x, y in self.batches:
            descend(optimizer, sum(net(x, y).values()))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                losses = self.net(*batch)
                if not self.fixed:
                    del losses["loss_box"]
                return sum(losses.values())

        fit(Port(net, fixed, adam), self.batches, callbacks)


class NoLogarithm(Simple):
    source = "AnubhavGupta3377/Text-Classification-Models-Pytorch#9"
    mistake = "nll_loss of probabilities, without their logarithm"
    stage, cause = "loss", "Another loss: probabilities without their logarithm in B"

    @staticmethod
    def loss(output, target, right):
        return F.nll_loss(output.log_softmax(1) if right else output.softmax(1), target)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.a(hidden), self.b(hidden)


class TwoBackwardPasses(Case):
    source = "SRFBN#4"
    mistake = "two backward passes become one of the sum, in which one term counts half"
    stage, cause = "loss", "One term of the loss has another weight, or another formula"
    rounding = True
    build = staticmethod(TwoHeads)

    @staticmethod
    def losses(net, x, y):
        first, second = net(x)
        return F.cross_entropy(first, y), (
            second - x[:, :1]
        ).square().mean() + first.square().mean()

    def loop(self, net):
        optimizer = sgd(net)
        for x, y in POINTS:
            one, other = self.losses(net, x, y)
            optimizer.zero_grad()
            one.backward(retain_graph=True)
            other.backward()
            optimizer.step()

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                one, other = case.losses(self.net, *batch)
                return one + other if self.fixed else one + 0.5 * other

        fit(Port(net, fixed, sgd), POINTS, callbacks)


class ClearedTooOften(Case):
    source = "bytetriper/RAE#67"
    mistake = "gradients are cleared before each batch of those that make one step"
    stage, cause = "clipping", "Gradients were cleared between the backward passes in B"

    def build(self):
        return Simple.build(self)

    def loop(self, net):
        optimizer = adam(net)
        for first in range(0, 6, 3):
            optimizer.zero_grad()
            for x, y in POINTS[first : first + 3]:
                (F.cross_entropy(net(x), y) / 3).backward()
            optimizer.step()

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                if batch_idx % 3 == 0 or not self.fixed:
                    optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 3)
                if batch_idx % 3 == 2:
                    optimizer.step()

        fit(Port(net, fixed, adam), POINTS, callbacks)


class NewHead(Case):
    source = "huggingface/pytorch-openai-transformer-lm#6"
    mistake = "the optimizer is made before the network gets its head, and does not hold it"
    stage, cause = "update", "Parameters that the optimizer was not given"

    def build(self):
        return Simple.build(self)

    def loop(self, net):
        optimizer = sgd(net)
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        held = list(net.parameters()) if fixed else list(net[0].parameters())

        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        fit(Port(net, fixed, lambda _: torch.optim.SGD(held, 0.1)), POINTS, callbacks)


class FitTwice(Case):
    source = "Lightning-AI/pytorch-lightning#12789, #5007"
    mistake = "fit is called twice: the optimizer is made anew"
    stage, cause = "update", "The optimizer was made anew in B"

    def build(self):
        return Simple.build(self)

    def loop(self, net):
        optimizer = adam(net)
        for _ in range(2):
            for x, y in POINTS:
                descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        module = Port(net, fixed, adam)
        for _ in range(1 if fixed else 2):
            fit(module, POINTS, callbacks, max_epochs=2 if fixed else 1)
