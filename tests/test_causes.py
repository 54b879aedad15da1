"""Causes of which the two loops differ in one line: the doctor's first word on each."""

import pytest
import torch
import torch.nn.functional as F
from helpers import count
from samebits import Trace, compare
from torch import nn

GENERATOR = torch.Generator().manual_seed(0)
SAMPLES, Y = (
    torch.randn(128, 6, generator=GENERATOR),
    torch.randint(0, 3, (128,), generator=GENERATOR),
)
X = SAMPLES.clone()
ORDERS = (
    torch.randperm(128, generator=GENERATOR),
    torch.randint(0, 128, (128,), generator=GENERATOR),
)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.5)


def rates(first, last):
    """Return what makes an optimizer with a group, and a rate, for each layer."""
    return lambda net: torch.optim.SGD([{"params": net[0].parameters(), "lr": first},
                                        {"params": net[2].parameters(), "lr": last}])  # fmt: skip


def layers():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 1.5


def loop(net, samples=lambda n: slice(16 * n, 16 * n + 16), given=lambda x: x, clip=None,
         moves=1, is_twice=False, loss=F.cross_entropy, make=sgd, rho=0.0,
         times=0.0, resumes="", zeroed=False, skipped=None, prepare=None):  # fmt: skip
    """Train on eight batches of 16 samples, each option as the arguments say."""
    if prepare:
        prepare(net)
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for n in range(8):
        if n == 4 and resumes:
            state, optimizer = optimizer.state_dict(), make(net)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            optimizer.load_state_dict(state | ({"state": {}} if resumes == "no state" else {}))
        x, y = given(X[samples(n)]), Y[samples(n)]
        optimizer.zero_grad()
        value = loss(net(x), y)
        if n == skipped:
            continue
        value.backward()
        if zeroed:
            optimizer.zero_grad(set_to_none=False)
        if rho:  # sharpness-aware minimization: the gradients of weights that lie a step uphill
            optimizer.param_groups[0]["rho"] = rho
            moved = [rho * p.grad for p in net.parameters()]
            torch._foreach_add_([p.data for p in net.parameters()], moved)
            optimizer.zero_grad()
            loss(net(x), y).backward()
            torch._foreach_sub_([p.data for p in net.parameters()], moved)
        if is_twice:  # as sharpness-aware minimization does, without moving the weights
            optimizer.zero_grad()
            F.cross_entropy(net(x), y.flip(0)).backward()
        for parameter in net.parameters() if times else ():  # as an average with another device
            parameter.grad.add_(0.01).mul_(times)
        for part in clip(net) if clip else ():
            nn.utils.clip_grad_norm_(part, 0.01)
        optimizer.step()
        for _ in range(moves):
            schedule.step()


def mixed(x):
    return 0.7 * x + 0.3 * x.flip(0)


CAUSES = {
    "mixed samples": (
        dict(given=mixed), {}, "batch", "The samples of a batch are mixed with each other"),
    "half precision and back": (
        dict(given=lambda x: x.half().float()), {}, "batch", "The same samples with"),
    "with replacement": (
        dict(samples=lambda n: ORDERS[1][16 * n :][:16]),
        dict(samples=lambda n: ORDERS[0][16 * n :][:16]),
        "batch", "The samples are drawn with replacement in A"),
    "a part is clipped": (
        dict(clip=lambda net: [net[2].parameters()]), dict(clip=lambda net: [net.parameters()]),
        "clipping", "A part of the gradients alone is scaled or clipped in A"),
    "parts are clipped one by one": (
        dict(clip=lambda net: [net[0].parameters(), net[2].parameters()]),
        dict(clip=lambda net: [net.parameters()]),
        "clipping", "The gradients of 2 parts of the network are each scaled or clipped by itself "
        "in A"),
    "tensors are clipped one by one": (
        dict(clip=lambda net: [[p] for p in net.parameters()]),
        dict(clip=lambda net: [net.parameters()]),
        "clipping", "Each tensor's gradient is scaled or clipped by itself in A"),
    "a loss in double precision": (
        dict(loss=lambda z, y: F.cross_entropy(z.double(), y)), {},
        "loss", "The loss is computed in another type of number"),
    "noise from another state": (
        dict(given=lambda x: x + torch.randn(x.shape)),
        dict(given=lambda x: x + (torch.rand(1), torch.randn(x.shape))[1]),
        "batch", "Random numbers from another state, in the batch"),
    "sequences cut elsewhere": (
        dict(given=lambda x: torch.cat([x, 2 * x], 1)[:, 2:8]), {},
        "batch", "The sequences are shifted by 2 in A, or cut elsewhere"),
    "rates exchanged": (
        dict(make=rates(0.1, 0.01)), dict(make=rates(0.01, 0.1)),
        "update", "Other groups of parameters"),
    "another radius of SAM": (
        dict(rho=0.05), dict(rho=0.1), "update", "Another setting of the optimizer: rho"),
    "a factor after all layers": (
        dict(build=lambda: Scaled(*layers())), {},
        "output", "Another computation in the network, after its layers"),
    "an average that is clipped": (
        dict(times=1.0, clip=lambda net: [net.parameters()]), dict(times=1.0),
        "clipping", "The gradients' norm is clipped in A"),
    "an average that is divided": (
        dict(times=1.0), dict(times=0.25),
        "clipping", "The gradients are multiplied by a number on one side"),
    "zero_grad before the step": (
        dict(zeroed=True), {}, "clipping", "zero_grad comes between the backward pass and the step "
        "in A"),
    "a batch that is skipped": (
        dict(skipped=4), {}, "batch", "A batch makes no step in A"),
    "a batch that is left out": (
        dict(samples=lambda n: slice(16 * (n + (n > 3)) % 128, 16 * (n + (n > 3)) % 128 + 16)), {},
        "batch", "A batch was left out"),
    "an initialization within the block": (
        dict(build=layers, prepare=lambda net: net[0].weight.data.mul_(2)),
        dict(prepare=lambda net: net[0].weight.data.mul_(3)),
        "weights", "Other weights before the first step"),
    "changed in place": (
        dict(samples=lambda n: slice(16 * (n % 4), 16 * (n % 4) + 16), given=lambda x: x.add_(1)),
        dict(samples=lambda n: slice(16 * (n % 4), 16 * (n % 4) + 16), given=lambda x: x + 1),
        "batch", "Samples that come again are others in A"),
    "a state that is not loaded": (
        dict(resumes="no state"), dict(resumes="with state"),
        "update", "The optimizer was made anew in A, and lost its state"),
    "a schedule that moves twice": (
        dict(moves=2), {}, "update", "The schedule moves 2 times as fast in A"),
    "two passes for a step": (
        dict(is_twice=True), {}, "steps", "Several passes of one batch make a step in A"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
@pytest.mark.parametrize("turned", [False, True], ids=["A", "B"])
def test_the_first_cause(name, turned, tmp_path):
    """Whichever of the two is A, the words say which run has it."""
    *ways, stage, cause = CAUSES[name]
    if turned:
        ways, cause = ways[::-1], cause.replace(" in A", " in B")
    paths = [tmp_path / f"{side}.trace" for side in "ab"]
    for path, way in zip(paths, ways, strict=True):
        torch.manual_seed(0)
        net = way.get("build", layers)()
        X.copy_(SAMPLES)
        with Trace(net, path=path):
            loop(net, **{name: value for name, value in way.items() if name != "build"})
    diagnosis = compare(*paths)
    assert diagnosis.stage == stage, str(diagnosis)
    assert not diagnosis.rounding or stage == "loss", str(diagnosis)
    assert diagnosis.causes[0].name.startswith(cause), str(diagnosis)
    count("first causes")
