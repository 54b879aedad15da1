"""Equal trainings whose steps are written otherwise: other optimizers, closures, gradients."""

import functools

import lightning as L
import torch
from samebits import Trace, callback
from torch import nn

from . import F, Lit, choices, fit
from .pairs import POINTS, Port, by_hand, mlp, pair, sgd, train


@pair(mlp)
def a_closure_that_is_called_often():
    def lbfgs(net):
        return torch.optim.LBFGS(net.parameters(), 0.1, max_iter=3)

    def one(net, path):
        optimizer = lbfgs(net)

        def closure(x, y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        with Trace(net, path=path):
            for batch in POINTS:
                optimizer.step(functools.partial(closure, *batch))

    def other(net, path):
        fit(Port(net, True, lbfgs), POINTS, [callback(L.Callback, path)])

    return one, other


@pair(mlp)
def gradients_set_to_zero_instead_of_none():
    def other(net, path):
        optimizer = sgd(net)
        with Trace(net, path=path):
            for x, y in POINTS:
                optimizer.zero_grad(set_to_none=False)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()

    return by_hand, other


@pair(mlp)
def groups_of_the_same_settings():
    def other(net, path):
        groups = [{"params": list(net[2].parameters())}, {"params": list(net[0].parameters())}]
        with Trace(net, path=path):
            train(net, torch.optim.SGD(groups, 0.1, momentum=0.9))

    return by_hand, other


@pair(mlp)
def accumulated_by_hand():
    def one(net, path):
        optimizer = sgd(net)
        with Trace(net, path=path):
            for i in range(0, 6, 3):
                optimizer.zero_grad()
                for x, y in POINTS[i : i + 3]:
                    (F.cross_entropy(net(x), y) / 3).backward()
                optimizer.step()

    def other(net, path):
        watch = callback(L.Callback, path)
        fit(Port(net, True, sgd), POINTS, [watch], accumulate_grad_batches=3)

    return one, other


@pair(lambda: nn.Sequential(nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, 3)))
def sparse_gradients():
    batches = [(choices(1100 + i, 0, 20, 8, 5), y) for i, (_, y) in enumerate(POINTS)]

    def one(net, path):
        optimizer = torch.optim.SparseAdam(net[0].parameters()), sgd(net[1])
        with Trace(net, path=path):
            for x, y in batches:
                net.zero_grad()
                F.cross_entropy(net(x), y).backward()
                [each.step() for each in optimizer]

    class Both(Lit):
        automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.net[0].parameters()), sgd(self.net[1])

        def training_step(self, batch):
            self.net.zero_grad(set_to_none=False)
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    def other(net, path):
        fit(Both(net, True), batches, [callback(L.Callback, path)])

    return one, other


@pair(mlp)
def weights_loaded_within_the_block():
    def one(net, path):
        net.load_state_dict({n: 0.5 * t for n, t in net.state_dict().items()})
        with Trace(net, path=path):
            train(net)

    def other(net, path):
        with Trace(net, path=path):
            net.load_state_dict({n: 0.5 * t for n, t in net.state_dict().items()})
            train(net)

    return one, other


@pair(mlp)
def gradients_by_functions():
    def other(net, path):
        optimizer = sgd(net)

        def loss(weights, x, y):
            return F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)

        with Trace(net, path=path):
            for x, y in POINTS:
                found = torch.func.grad(loss)({n: p.detach() for n, p in net.named_parameters()},
                                              x, y)  # fmt: skip
                for name, parameter in net.named_parameters():
                    parameter.grad = found[name]
                optimizer.step()

    return by_hand, other


class Twice(torch.optim.SGD):
    """A step that calls another one: PyTorch's hooks tell of both."""

    def step(self, closure=None):
        return super().step(closure)


@pair(mlp)
def a_step_that_calls_that_of_its_parent():
    def other(net, path):
        optimizer = Twice(net.parameters(), 0.1, momentum=0.9)
        with Trace(net, path=path):
            train(net, optimizer)

    return by_hand, other


class Around(torch.optim.Optimizer):
    """An optimizer around another one, as those that spread its work over processes."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner
        inner.param_groups = self.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


@pair(mlp)
def an_optimizer_around_another_one():
    def one(net, path):
        optimizer = Around(sgd(net))
        with Trace(net, path=path):
            train(net, optimizer)

    def other(net, path):
        optimizer = Around(sgd(net))
        with Trace(net, optimizer.inner, path=path):
            train(net, optimizer)

    return one, other


@pair(mlp)
def an_optimizer_around_another_one_or_not():
    def other(net, path):
        optimizer = Around(sgd(net))
        with Trace(net, path=path):
            train(net, optimizer)

    return by_hand, other


@pair(mlp)
def a_step_that_failed_once():
    """What was called when it failed is forgotten."""

    class Failing(Twice):
        fails = True

        def step(self, closure=None):
            if self.fails:
                self.fails = False
                raise ZeroDivisionError
            return super().step(closure)

    def other(net, path):
        optimizer = Failing(net.parameters(), 0.1, momentum=0.9)
        with Trace(net, path=path):
            try:
                optimizer.step()
            except ZeroDivisionError:
                train(net, optimizer)

    return by_hand, other
