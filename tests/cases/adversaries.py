"""Two networks that train against each other, and optimizers that take turns."""

import torch
from torch import nn

from . import Case, F, Lit, fit, numbers


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.d = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def g_loss(self, i):
        return F.binary_cross_entropy_with_logits(self.d(self.fake(i)), torch.ones(16, 1))

    def d_loss(self, i):
        real, fake = self.d(numbers(i, 16, 2) + 2), self.d(self.fake(i).detach())
        bce = F.binary_cross_entropy_with_logits
        return bce(real, torch.ones(16, 1)) + bce(fake, torch.zeros(16, 1))

    def fake(self, i):
        return self.g(numbers(100 + i, 16, 4))

    def optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.g, self.d)]


def train_gan(net, schedules=False):
    optimizers = net.optimizers()
    decays = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in optimizers] if schedules else []
    for i in range(8):
        for optimizer, loss in zip(optimizers, (net.g_loss, net.d_loss), strict=True):
            optimizer.zero_grad()
            loss(i).backward()
            optimizer.step()
        for decay in decays:
            decay.step()


class LitGan(Lit):
    automatic_optimization = False

    def __init__(self, net, fixed):
        super().__init__(net, fixed)

    def configure_optimizers(self):
        return self.net.optimizers()


class LeftOverGradients(Case):
    source = "Lightning-AI/pytorch-lightning#591"
    mistake = "each optimizer clears its own gradients alone, after its step"
    stage, cause = "clipping", "Left-over gradients: zero_grad is missing in B"
    build = staticmethod(Gan)

    def loop(self, net):
        train_gan(net)

    def port(self, net, callbacks, fixed):
        class Port(LitGan):
            def training_step(self, i):
                losses = self.net.g_loss, self.net.d_loss
                for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                    if self.fixed:
                        optimizer.zero_grad()
                    self.manual_backward(loss(i))
                    optimizer.step()
                    if not self.fixed:
                        optimizer.zero_grad()

        fit(Port(net, fixed), range(8), callbacks)


class ToggledOptimizers(Case):
    source = "Lightning-AI/pytorch-lightning#18740"
    mistake = "none: toggle_optimizer keeps gradients from the other network, which nobody uses"
    build = staticmethod(Gan)

    def loop(self, net):
        train_gan(net)

    def port(self, net, callbacks, fixed):
        class Port(LitGan):
            def training_step(self, i):
                losses = self.net.g_loss, self.net.d_loss
                for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                    self.toggle_optimizer(optimizer)
                    self.manual_backward(loss(i))
                    optimizer.step()
                    optimizer.zero_grad()
                    self.untoggle_optimizer(optimizer)

        fit(Port(net, fixed), range(8), callbacks)


class ScheduleByHand(Case):
    source = "voicepaw/so-vits-svc-fork#291"
    mistake = "in manual optimization nobody moves the schedules of two optimizers"
    stage, cause = "update", "A schedule on one side only"
    build = staticmethod(Gan)

    def loop(self, net):
        train_gan(net, schedules=True)

    def port(self, net, callbacks, fixed):
        class Port(LitGan):
            def configure_optimizers(self):
                optimizers = self.net.optimizers()
                decay = torch.optim.lr_scheduler.StepLR
                return optimizers, [decay(o, 3, 0.5) for o in optimizers]

            def training_step(self, i):
                losses = self.net.g_loss, self.net.d_loss
                for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                    optimizer.zero_grad()
                    self.manual_backward(loss(i))
                    optimizer.step()
                for schedule in self.lr_schedulers() if self.fixed else ():
                    schedule.step()

        fit(Port(net, fixed), range(8), callbacks)


class TargetNetwork(Case):
    source = "pytorch/tutorials#181"
    mistake = "the target network of Q-learning is never brought up to date"
    stage, cause = "loss", "Other targets, or another loss"

    def build(self):
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    @staticmethod
    def loss(net, target, i):
        states, following = numbers(i, 16, 4), numbers(50 + i, 16, 4)
        actions = (numbers(100 + i, 16, 1) > 0).long()
        with torch.no_grad():
            wanted = numbers(150 + i, 16) + 0.9 * target(following).max(1).values
        return F.smooth_l1_loss(net(states).gather(1, actions).squeeze(1), wanted)

    def loop(self, net):
        target = self.build()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for i in range(12):
            if i % 4 == 0:
                target.load_state_dict(net.state_dict())
            optimizer.zero_grad()
            self.loss(net, target, i).backward()
            optimizer.step()

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def __init__(self, *args):
                super().__init__(*args)
                self.target = case.build()
                self.target.load_state_dict(self.net.state_dict())

            def training_step(self, i):
                if self.fixed and i % 4 == 0:
                    self.target.load_state_dict(self.net.state_dict())
                return case.loss(self.net, self.target, i)

        make = lambda n: torch.optim.Adam(n.parameters(), 1e-2)  # noqa: E731
        fit(Port(net, fixed, make), range(12), callbacks)
