"""Mistakes in formulas, and in what acts only backward, which the doctor called something else."""

from typing import ClassVar

import torch
from torch import nn

from . import F, Lit, choices, fit, numbers
from .classifiers import POINTS, Simple, adam

BLIND = "a blind trial"


class FocalLoss(Simple):
    source = BLIND
    mistake = "a focal loss of the batch's mean cross entropy, not of each sample's"
    stage, cause = "loss", "Another loss: a focal loss, or another gamma"

    @staticmethod
    def loss(output, target, right):
        each = F.cross_entropy(output, target, reduction="none" if right else "mean")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


class SquaredError(Simple):
    source = BLIND
    mistake = "the squared error instead of smooth L1, with outliers"
    stage, cause = "loss", "Another loss: Huber or smooth L1 in A, squared error in B"
    batches: ClassVar = [(x, 3 * x[:, :3]) for x, _ in POINTS]

    @staticmethod
    def loss(output, target, right):
        return F.smooth_l1_loss(output, target) if right else F.mse_loss(output, target)


class Temperature(Simple):
    source = BLIND
    mistake = "the logits are not divided by a temperature"
    stage, cause = "loss", "Another loss: a temperature, or a scale, of the logits in A"

    @staticmethod
    def loss(output, target, right):
        return F.cross_entropy(output / 0.5 if right else output, target)


class Switched(Simple):
    """A case whose sides differ in what the network does: `net.right`."""

    def port(self, net, callbacks, fixed):
        net.right = fixed
        super().port(net, callbacks, fixed)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class Two(nn.Module):
    """Two layers, and whether what is done between them is right."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.right = True


class Reversal(Two):
    def forward(self, x):
        x = self.features(x)
        return self.head(x.relu() + Reversed.apply(x.tanh(), -0.3 if self.right else 0.2))


class GradientReversal(Switched):
    source = BLIND
    mistake = "a backward pass of one's own, the reversal of gradients, has another factor"
    stage, cause = "gradient", "Another way of the gradients through the network"
    build = staticmethod(Reversal)


class Encoder(Two):
    def forward(self, x):
        return self.head(F.dropout(self.features(x).relu(), 0.3, training=not self.right))


class FunctionalDropout(Switched):
    source = BLIND
    mistake = "F.dropout without training=self.training"
    stage, cause = "output", "Dropout, or other noise, on one side"
    build = staticmethod(Encoder)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 3)
        nn.init.normal_(self.letters.weight)

    def forward(self, x):
        return self.head(self.letters(x).mean(1))


class PaddingTrains(Simple):
    source = BLIND
    mistake = "an embedding without padding_idx: the padding's row trains, too"
    stage, cause = "gradient", "A layer with another setting"
    batches: ClassVar = [(choices(980 + i, 0, 5, 16, 7), y) for i, (_, y) in enumerate(POINTS)]
    build = staticmethod(Embedded)

    def port(self, net, callbacks, fixed):
        net.letters.padding_idx = 0 if fixed else None
        super().port(net, callbacks, fixed)


X = numbers(990, 40, 4)
Y = X.sin().sum(1, keepdim=True)


def closure_of(net, optimizer, backward=torch.Tensor.backward, clears=True):
    def closure():
        if clears:
            optimizer.zero_grad()
        loss = F.mse_loss(net(X), Y)
        backward(loss)
        return loss

    return closure


class ClosureKeepsGradients(Simple):
    source = BLIND
    mistake = "LBFGS: zero_grad stands before step(closure), and not within the closure"
    stage, cause = "clipping", "Left-over gradients: zero_grad is missing in B, in the closure"

    def build(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    @staticmethod
    def optimizer(net):
        return torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4)

    def loop(self, net):
        optimizer = self.optimizer(net)
        for _ in range(3):
            optimizer.step(closure_of(net, optimizer))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            automatic_optimization = False

            def training_step(self, _):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                closure = closure_of(self.net, optimizer, self.manual_backward, self.fixed)
                optimizer.step(closure=closure)

        fit(Port(net, fixed, self.optimizer), range(3), callbacks)


class ClippedWhileScaled(Simple):
    source = BLIND
    mistake = "gradients of a scaled loss are clipped before they are unscaled"
    stage, cause = "clipping", "The gradients are clipped before they are unscaled in B"
    scale = 1024.0

    def one(self, net, optimizer, batch, right):
        optimizer.zero_grad()
        (F.cross_entropy(net(batch[0]), batch[1]) * self.scale).backward()
        for is_clip in (False, True) if right else (True, False):
            if is_clip:
                nn.utils.clip_grad_norm_(net.parameters(), 0.25)
            else:
                for parameter in net.parameters():
                    parameter.grad /= self.scale
        optimizer.step()

    def loop(self, net):
        optimizer = adam(net)
        for batch in POINTS:
            self.one(net, optimizer, batch, True)

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            automatic_optimization = False

            def training_step(self, batch):
                case.one(self.net, self.optimizers(), batch, self.fixed)

        fit(Port(net, fixed, adam), POINTS, callbacks)
