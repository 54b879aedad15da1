"""Encoders: latent variables, teachers, averages of weights, recomputation, several passes."""

from typing import ClassVar

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from . import Case, F, Lit, choices, copy, descend, fit, numbers

IMAGES = [numbers(600 + i, 16, 12) for i in range(5)]
POINTS = [(numbers(700 + i, 16, 6) + 1, choices(750 + i, 0, 3, 16)) for i in range(6)]


def adam(net):
    return torch.optim.Adam(net.parameters(), 1e-2)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


def divergence(mean, log_variance):
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp())


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x, half=0.5):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_variance * half).exp()
        return self.decoder(z), mean, log_variance

    def elbo(self, x, half):
        """The same from outside: the parts are called one by one."""
        made, *latent = Vae.forward(self, x, half)
        return F.mse_loss(made, x) + 0.01 * divergence(*latent).mean()


class DivergenceAsMean(Case):
    source = "podgorskiy/VAE#1"
    mistake = "the divergence is a mean instead of a sum"
    stage, cause = "loss", "One term of the loss has another weight, or another formula"
    build = staticmethod(Vae)

    @staticmethod
    def loss(outputs, x, mean):
        made, *latent = outputs
        terms = divergence(*latent)
        return F.mse_loss(made, x) + (terms.mean() if mean else terms.sum(1).mean())

    def loop(self, net):
        optimizer = adam(net)
        for x in IMAGES:
            descend(optimizer, self.loss(net(x), x, mean=False))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, x):
                return case.loss(self.net(x), x, mean=not self.fixed)

        fit(Port(net, fixed, adam), IMAGES, callbacks)


class PartsOneByOne(Case):
    source = "rachtsingh/ibp_vae#3"
    mistake = "exp(log variance) instead of its half, between parts that are called one by one"
    stage, cause = "output", "Another computation before decoder"
    build = staticmethod(Vae)

    def loop(self, net):
        optimizer = adam(net)
        for x in IMAGES:
            descend(optimizer, net.elbo(x, 0.5))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, x):
                return self.net.elbo(x, 0.5 if self.fixed else 1.0)

        fit(Port(net, fixed, adam), IMAGES, callbacks)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x):
        z = self.encoder(x)
        return z, self.predictor(z.relu())


class StopGradient(Case):
    source = "PatrickHua/SimSiam#39"
    mistake = "a network is called twice in a step, and one branch is not detached"
    stage, cause = "loss", "Frozen or detached on one side"
    build = staticmethod(Siamese)
    pairs: ClassVar = [(x, x + 0.1 * numbers(800 + i, 16, 12)) for i, x in enumerate(IMAGES)]

    @staticmethod
    def loss(net, x, y, stop):
        (z, p), (w, q) = net(x), net(y)
        if stop:
            z, w = z.detach(), w.detach()
        return -(F.cosine_similarity(p, w) + F.cosine_similarity(q, z)).mean() / 2

    def loop(self, net):
        optimizer = sgd(net)
        for x, y in self.pairs:
            descend(optimizer, self.loss(net, x, y, True))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def training_step(self, batch):
                return case.loss(self.net, *batch, self.fixed)

        fit(Port(net, fixed, sgd), self.pairs, callbacks)


class TeacherTrains(Case):
    source = "vrvlive/knowlege-distillation#2"
    mistake = "the teacher beside the network is in train mode: its dropout draws"
    stage, cause = "loss", "Other targets, or another loss"
    network = "student"

    def build(self):
        teacher = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
        return nn.ModuleDict({"teacher": teacher, "student": nn.Linear(6, 3)})

    def watched(self, net):
        return net["student"]

    @staticmethod
    def loss(student, teacher, x):
        with torch.no_grad():
            wanted = (teacher(x) / 2).softmax(1)
        return F.kl_div((student(x) / 2).log_softmax(1), wanted, reduction="batchmean")

    def loop(self, net):
        optimizer = sgd(net["student"])
        net["teacher"].eval()
        for x, _ in POINTS:
            descend(optimizer, self.loss(net["student"], net["teacher"], x))

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def __init__(self, net, fixed):
                super().__init__(nn.Identity(), fixed)
                self.student, self.teacher = net["student"], net["teacher"]
                self.teacher.requires_grad_(False)

            def training_step(self, batch):
                self.teacher.train(not self.fixed)
                return case.loss(self.student, self.teacher, batch[0])

            def configure_optimizers(self):
                return sgd(self.student)

        fit(Port(net, fixed), POINTS, callbacks)


class AveragesStay(Case):
    source = "PKU-YuanGroup/Open-Sora-Plan#186, huggingface/diffusers#7549"
    mistake = "averaged weights are put in for a validation, and the trained ones not put back"
    stage, cause = "weights", "Weights were loaded, averaged or clamped between two steps"

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    @staticmethod
    def validate(net, average, restore):
        trained = copy.deepcopy(net.state_dict())
        net.load_state_dict(average.module.state_dict())
        net.eval()
        with torch.no_grad():
            net(POINTS[0][0])
        net.train()
        if restore:
            net.load_state_dict(trained)

    @staticmethod
    def average(net):
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        return torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=decay)

    def loop(self, net):
        optimizer, average = sgd(net), self.average(net)
        for _ in range(2):
            for x, y in POINTS:
                descend(optimizer, F.cross_entropy(net(x), y))
                average.update_parameters(net)
            self.validate(net, average, True)

    def port(self, net, callbacks, fixed):
        case = self

        class Port(Lit):
            def on_fit_start(self):
                self.averaged = [case.average(self.net)]

            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

            def on_train_batch_end(self, *_):
                self.averaged[0].update_parameters(self.net)

            def on_train_epoch_end(self):
                case.validate(self.net, self.averaged[0], self.fixed)

        fit(Port(net, fixed, sgd), POINTS, callbacks, max_epochs=2)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.recompute = False

    def forward(self, x):
        x = self.first(x)
        if self.recompute:
            return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True))
        return self.head(self.block(x))


class RecomputedAverages(Case):
    source = "pfnet/pytorch-pfn-extras#117"
    mistake = "a checkpoint computes BatchNorm again: its averages move twice"
    stage, cause = "buffers", "The running averages move twice"
    build = staticmethod(Checkpointed)

    def loop(self, net):
        optimizer = sgd(net)
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        net.recompute = not fixed
        fit(Port(net, fixed, sgd), POINTS, callbacks)


class SecondForwardPass(Case):
    source = "m2lines/Samudra#572"
    mistake = "the accuracy is computed by a second forward pass, in train mode"
    stage, cause = "buffers", "A forward pass without a backward pass"

    def build(self):
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def loop(self, net):
        optimizer = sgd(net)
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                logits = self.net(batch[0])
                again = logits if self.fixed else self.net(batch[0])
                accuracy = (again.argmax(1) == batch[1]).float().mean()
                return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": accuracy}

        fit(Port(net, fixed, sgd), POINTS, callbacks)


class SpectralNormAgain(SecondForwardPass):
    source = "pytorch/pytorch#8208"
    mistake = "spectral norm iterates in each forward pass, also in one without gradients"
    cause = "A forward pass without a backward pass"

    def build(self):
        return nn.Sequential(spectral_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def training_step(self, batch):
                logits = self.net(batch[0])
                with torch.no_grad():
                    again = logits if self.fixed else self.net(batch[0])
                accuracy = (again.argmax(1) == batch[1]).float().mean()
                return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": accuracy}

        fit(Port(net, fixed, sgd), POINTS, callbacks)


class Lora(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.base, self.head = nn.Linear(6, 16).requires_grad_(False), nn.Linear(16, 3)
        self.head.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(4, 6) / 4)
        self.B = nn.Parameter(torch.zeros(16, 4))
        self.scale = scale

    def forward(self, x):
        return self.head((self.base(x) + self.scale * x @ self.A.T @ self.B.T).relu())


class LoraScale(Case):
    source = "rasbt/LLMs-from-scratch#821"
    mistake = "a LoRA is scaled by alpha, not by alpha / rank"
    stage, cause = "gradient", "A factor within a layer whose weights are zero"

    def build(self):
        return Lora(2.0)

    def optimizer(self, net):
        return torch.optim.SGD([net.A, net.B], 0.1)

    def loop(self, net):
        optimizer = self.optimizer(net)
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        net.scale *= 1 if fixed else 4

        class Port(Lit):
            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        fit(Port(net, fixed, self.optimizer), POINTS, callbacks)


class FrozenPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        self.encoder.requires_grad_(False)

    def forward(self, x):
        return self.head(self.encoder(x))


class FrozenBatchNorm(Case):
    source = "pgniewko/gt-pyg#112, Lightning-AI/pytorch-lightning#15062"
    mistake = "train() wakes the BatchNorm of a frozen part"
    stage, cause = "mode", "A part of the network is frozen on one side"
    build = staticmethod(FrozenPart)

    def loop(self, net):
        optimizer = sgd(net.head)
        net.train()
        net.encoder.eval()
        for x, y in POINTS:
            descend(optimizer, F.cross_entropy(net(x), y))

    def port(self, net, callbacks, fixed):
        class Port(Lit):
            def on_train_epoch_start(self):
                self.net.train()
                if self.fixed:
                    self.net.encoder.eval()

            def training_step(self, batch):
                return F.cross_entropy(self.net(batch[0]), batch[1])

        fit(Port(net, fixed, lambda n: sgd(n.head)), POINTS, callbacks)
