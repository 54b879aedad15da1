"""Equal trainings that are written otherwise: the doctor must find nothing in them.

Each pair is a network and two functions that train it; both get the network, the trace's path, and
open the trace as a stranger would.
"""

from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import pytorch_lightning as pl
import torch
import torch.utils.checkpoint
from samebits import Trace, callback
from torch import nn
from torch.utils.data import DataLoader

from . import Batches, F, Lit, choices, copy, descend, fit, numbers

PAIRS = {}
POINTS = [(numbers(1000 + i, 8, 6), choices(1050 + i, 0, 3, 8)) for i in range(6)]


def pair(build):
    """Add a function that gives the two ways of training the network that `build` makes."""

    def add(ways):
        PAIRS[ways.__name__] = (build, *ways())
        return ways

    return add


def sgd(net, **more):
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, **more)


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def noisy():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(12, 3))  # fmt: skip


def train(net, optimizer=None, call=None, epochs=1):
    optimizer = optimizer or sgd(net)
    for _ in range(epochs):
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy((call or net)(x), y))


def by_hand(net, path):
    with Trace(net, path=path):
        train(net)


class Port(Lit):
    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pair(noisy)
def compiled():
    def other(net, path):
        with Trace(net, path=path):
            train(net, call=torch.compile(net, backend="eager"))

    return by_hand, other


@pair(noisy)
def compiled_in_place():
    def other(net, path):
        with Trace(net, path=path):
            net.compile(backend="eager")
            train(net)

    return by_hand, other


@pair(noisy)
def with_fabric():
    def other(net, path):
        fabric = L.Fabric(accelerator="cpu", devices=1)
        with Trace(net, path=path):
            model, optimizer = fabric.setup(net, sgd(net))
            for x, y in POINTS:
                optimizer.zero_grad()
                fabric.backward(F.cross_entropy(model(x), y))
                optimizer.step()

    return by_hand, other


@pair(noisy)
def with_the_old_name_of_lightning():
    class Old(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self.net)

    def other(net, path):
        loader = DataLoader(Batches(POINTS), batch_size=None, generator=torch.Generator())
        pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False,
                   callbacks=[callback(pl.Callback, path)], enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False,
                   ).fit(Old(net), loader)  # fmt: skip

    return by_hand, other


class ComplexNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


@pair(ComplexNet)
def complex_weights():
    def other(net, path):
        fit(Port(net, True, sgd), POINTS, [callback(L.Callback, path)])

    return by_hand, other


class Recomputing(nn.Module):
    recompute = False

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        if self.recompute:
            hidden = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            hidden = self.block(x)
        return self.head(hidden)


@pair(Recomputing)
def a_checkpoint_with_dropout():
    def other(net, path):
        net.recompute = True
        with Trace(net, path=path):
            train(net)

    return by_hand, other


@pair(noisy)
def opened_twice():
    def one(net, path):
        with Trace(net, path=path):
            train(net, epochs=2)

    def other(net, path):
        trace, optimizer = Trace(net, path=path), sgd(net)
        for _ in range(2):
            with trace:
                train(net, optimizer)

    return one, other


@pair(noisy)
def an_average_of_weights_beside_it():
    def other(net, path):
        average = torch.optim.swa_utils.AveragedModel(net)
        with Trace(net, path=path):
            optimizer = sgd(net)
            for x, y in POINTS:
                descend(optimizer, F.cross_entropy(net(x), y))
                average.update_parameters(net)
                average.eval()(x)

    return by_hand, other


Spoken = namedtuple("Spoken", "logits hidden")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return Spoken(self.out(self.lstm(packed)[1][0][0]), packed)


@pair(Packed)
def packed_sequences():
    batches = [(x[:, :, None], y + 2, y) for x, y in POINTS]

    def one(net, path):
        optimizer = sgd(net)
        with Trace(net, path=path):
            for x, lengths, y in batches:
                descend(optimizer, F.cross_entropy(net(x, lengths).logits, y))

    class Speech(Lit):
        def training_step(self, batch):
            return F.cross_entropy(self.net(lengths=batch[1], x=batch[0])[0], batch[2])

    def other(net, path):
        fit(Speech(net, True, sgd), batches, [callback(L.Callback, path)])

    return one, other


@pair(mlp)
def one_optimizer_or_two():
    def other(net, path):
        optimizers = [sgd(net[0]), sgd(net[2])]
        with Trace(net, path=path):
            for x, y in POINTS:
                net.zero_grad()
                F.cross_entropy(net(x), y).backward()
                for optimizer in optimizers:
                    optimizer.step()

    return by_hand, other


class InParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.encoder(x).relu())


@pair(InParts)
def parts_instead_of_the_whole():
    def other(net, path):
        with Trace(net, path=path):
            train(net, call=lambda x: net.head(net.encoder(x).relu()))

    return by_hand, other


@pair(noisy)
def a_teacher_beside_it():
    class Taught(Port):
        def __init__(self, *args):
            super().__init__(*args)
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch):
            with torch.no_grad():
                self.teacher.eval()(batch[0])
            return super().training_step(batch)

        def configure_optimizers(self):
            return sgd(self.net)

    def other(net, path):
        watch = callback(L.Callback, path, network=lambda module: module)
        fit(Taught(net, True), POINTS, [watch])

    return by_hand, other


@pair(noisy)
def an_evaluation_on_one_side():
    def other(net, path):
        optimizer = sgd(net)
        with Trace(net, path=path):
            for x, y in POINTS:
                descend(optimizer, F.cross_entropy(net(x), y))
                net.eval()
                net(x)  # even without no_grad
                net.train()

    return by_hand, other


@pair(InParts)
def frozen_or_not_given_to_the_optimizer():
    def one(net, path):
        net.encoder.requires_grad_(False)
        with Trace(net, path=path):
            train(net, sgd(net.head))

    def other(net, path):
        with Trace(net, path=path):
            optimizer = sgd(net.head)
            for x, y in POINTS:
                net.zero_grad()
                descend(optimizer, F.cross_entropy(net(x), y))

    return one, other


@dataclass
class Answer:
    logits: torch.Tensor
    seconds: float = 0.0


class Answering(nn.Module):
    answer = Answer

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.count = self.count + 1  # another tensor each time
        return self.answer(scale * self.net(x))


@pair(Answering)
def outputs_of_another_kind():
    def one(net, path):
        with Trace(net, path=path):
            train(net, call=lambda x: net(x).logits)

    def other(net, path):
        net.answer = lambda logits: {"result": logits}
        with Trace(net, path=path):
            train(net, call=lambda x: net(x, scale=1.0)["result"])

    return one, other


@pair(lambda: nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3)))
def lazy_modules_that_get_their_weights_before_or_within():
    def one(net, path):
        net(POINTS[0][0])
        by_hand(net, path)

    def other(net, path):
        with Trace(net, path=path):
            net(POINTS[0][0])
            train(net)

    return one, other
