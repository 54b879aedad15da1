"""How a step is made: of which passes, when weights are averaged, when a rate moves."""

from typing import ClassVar

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from . import Batches, Case, F, Lit, choices, copy, descend, fit, numbers

POINTS = [(numbers(1100 + i, 16, 6), choices(1150 + i, 0, 3, 16)) for i in range(6)]


def sgd(net):
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, 0.1, momentum=0.9)


def layers(outputs=3):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.head = layers(8), nn.Linear(8, 8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.head(self.student(x + 0.1)), wanted

    @torch.no_grad()
    def follow(self):
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.lerp_(other, 0.1)


def apart(output, wanted):
    return 2 - 2 * F.cosine_similarity(output, wanted).mean()


class EarlyTeacher(Case):
    source = "NVIDIA/NeMo#5169"
    mistake = "a teacher's average follows before the optimizer's step instead of after it"
    stage, cause = "weights", "Weights were loaded, averaged or clamped between two steps"
    build = staticmethod(Teacher)

    def loop(self, net):
        optimizer = sgd(net)
        for x, _ in POINTS:
            descend(optimizer, apart(*net(x)))
            net.follow()

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                loss = apart(*self.net(batch[0]))
                if not self.fixed:
                    self.net.follow()
                return loss

            def on_train_batch_end(self, *_):
                if self.fixed:
                    self.net.follow()

        fit(Port(net, fixed, sgd), POINTS, callbacks)


class MovedTeacher(EarlyTeacher):
    mistake = "the same, and the teacher does not begin where the student does"
    stage, cause = "update", "Weights were averaged, copied or loaded in B, before the step ended"

    def build(self):
        net = Teacher()
        net.teacher[0].weight.data += 0.1
        return net


class TeacherOfEachBatch(Case):
    source = "Lightning-AI/pytorch-lightning#11688"
    mistake = "a teacher's average follows after each batch, where two batches make a step"
    stage, cause = "weights", "Weights were averaged, copied or loaded in B, between two forward"
    build = MovedTeacher.build

    def loop(self, net):
        optimizer = sgd(net)
        for i, (x, _) in enumerate(POINTS):
            (apart(*net(x)) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
                net.follow()

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return apart(*self.net(batch[0]))

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if not self.fixed or batch_idx % 2:
                    self.net.follow()

        fit(Port(net, fixed, sgd), POINTS, callbacks, accumulate_grad_batches=2)


class Plateau(Case):
    source = "Lightning-AI/pytorch-lightning#2976"
    mistake = "ReduceLROnPlateau watches the training's loss instead of the validation's"
    stage, cause = "update", "A schedule that watches a quantity: another monitor"
    build = staticmethod(layers)

    @staticmethod
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    @staticmethod
    def held_out(net):
        was, _ = net.training, net.eval()
        with torch.no_grad():
            loss = F.cross_entropy(net(numbers(1198, 16, 6)), choices(1199, 0, 3, 16))
        net.train(was)
        return loss

    def loop(self, net):
        optimizer = sgd(net)
        plateau = self.plateau(optimizer)
        for _ in range(6):
            for x, y in POINTS:
                descend(optimizer, F.cross_entropy(net(x), y))
            plateau.step(self.held_out(net))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.log("train_loss", loss, on_epoch=True, on_step=False, batch_size=16)
                return loss

            def on_train_epoch_end(self):
                self.log("val_loss", case.held_out(self.net))

            def configure_optimizers(self):
                optimizer = sgd(self.net)
                monitor = "val_loss" if self.fixed else "train_loss"
                schedule = {"scheduler": case.plateau(optimizer), "monitor": monitor}
                return {"optimizer": optimizer, "lr_scheduler": schedule}

        fit(Port(net, fixed), POINTS, callbacks, max_epochs=6)


class LastWindow(Case):
    source = "Lightning-AI/pytorch-lightning#21808"
    mistake = "six batches, a step of four: the loop carries two over to the next epoch"
    stage, cause = "steps", "The rest of an epoch's batches makes a step in B, and is carried on"
    build = staticmethod(layers)

    def loop(self, net):
        optimizer = sgd(net)
        for i, (x, y) in enumerate(POINTS * 2, start=1):
            (F.cross_entropy(net(x), y) / 4).backward()
            if i % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        batches, epochs = (POINTS * 2, 1) if fixed else (POINTS, 2)
        fit(Port(net, fixed, sgd), batches, callbacks, max_epochs=epochs, accumulate_grad_batches=4)


class ClippedEachTime(Case):
    source = "huggingface/transformers#1563"
    mistake = "the norm is clipped after each backward pass, not once before the step"
    stage, cause = "clipping", "The gradients are clipped after each backward pass in B"
    build = staticmethod(layers)

    def train(self, net, backward, optimizer, right):
        for i, (x, y) in enumerate(POINTS):
            backward(F.cross_entropy(net(3 * x), y) / 3)
            if not right or i % 3 == 2:
                nn.utils.clip_grad_norm_(net.parameters(), 0.2)
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    def loop(self, net):
        self.train(net, torch.Tensor.backward, sgd(net), True)

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            automatic_optimization = False

            def training_step(self, batch):
                case.train(self.net, self.manual_backward, self.optimizers(), self.fixed)

        fit(Port(net, fixed, sgd), [0], callbacks)


class ViewsTogether(Case):
    source = "PatrickHua/SimSiam#1"
    mistake = "two views go through the network in one pass; BatchNorm sees both"
    stage, cause = "batch", "The same samples in another number of forward passes"
    build = staticmethod(layers)

    @staticmethod
    def outputs(net, x, right):
        return (net(x), net(x + 0.1)) if right else net(torch.cat([x, x + 0.1])).chunk(2)

    def loop(self, net):
        optimizer = sgd(net)
        for x, _ in POINTS:
            descend(optimizer, apart(*self.outputs(net, x, True)))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                return apart(*case.outputs(self.net, batch[0], self.fixed))

        fit(Port(net, fixed, sgd), POINTS, callbacks)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = layers()

    def forward(self, labelled, unlabelled):
        return self.body(labelled), self.body(unlabelled)


class TwoLoaders(Case):
    source = "Lightning-AI/pytorch-lightning#11475"
    mistake = "zip ends with the shorter loader; joined loaders go on until the longer one ends"
    stage, cause = "batch", "unlabelled begins again in A: an epoch has another number of batches"
    build = staticmethod(Pair)
    more = numbers(1190, 144, 6)

    @staticmethod
    def loss(net, x, y, other):
        output, free = net(x, other)
        return F.cross_entropy(output, y) + free.softmax(1).square().sum(1).mean()

    def loop(self, net):
        optimizer = sgd(net)
        for _ in range(2):
            for (x, y), other in zip(POINTS, self.more.split(16), strict=False):
                descend(optimizer, self.loss(net, x, y, other))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                return case.loss(self.net, *batch["labelled"], *batch["unlabelled"])

        loaders = {
            "labelled": DataLoader(Batches(POINTS), None, generator=torch.Generator()),
            "unlabelled": DataLoader(TensorDataset(self.more), 16, generator=torch.Generator()),
        }
        both = CombinedLoader(loaders, "min_size" if fixed else "max_size_cycle")
        fit(Port(net, fixed, sgd), both, callbacks, max_epochs=2)


class State(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(6, 16, batch_first=True), nn.Linear(16, 3)
        self.state = None

    def forward(self, x):
        output, state = self.cell(x, self.state)
        self.state = state.detach()
        return self.head(output[:, -1])


class StateOfTheEpoch(Case):
    source = "Lightning-AI/pytorch-lightning#5372"
    mistake = "the state that the network keeps in an attribute is not reset with an epoch"
    stage, cause = "output", "Another computation in the network, or a state that it keeps"
    build = staticmethod(State)
    batches: ClassVar = [(x[:, None].expand(-1, 4, -1), y) for x, y in POINTS]

    def loop(self, net):
        optimizer = sgd(net)
        for _ in range(2):
            net.state = None
            for x, y in self.batches:
                descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def on_train_epoch_start(self):
                if self.fixed:
                    self.net.state = None

            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        fit(Port(net, fixed, sgd), self.batches, callbacks, max_epochs=2)
