"""What stands around the optimizer's step, by hand, in the order that makes it right.

Run it with `make plain-optimize`. Its twin is lightning/optimize.py.
"""

# %% Imports
from common import checkpoints
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import NormNet
from common.optimizers import diverged, group_weight, make_schedule
from common.run import Options, run

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from cifar import choose_device, evaluate, seed_everything
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 0.05  # learning rate, at its highest
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of weights, not of biases and norms
    batch_size: int = 32  # images in one batch
    max_epochs: int = 5  # passes over the training set
    schedule: Literal["none", "cosine", "onecycle", "plateau"] = "cosine"
    """of the learning rate; plateau: a tenth where the validation loss does not fall"""
    interval: Literal["step", "epoch"] = "step"  # how often the schedule moves on
    accumulate_grad_batches: int = 2  # batches whose gradients add up to one step
    exact_accumulation: bool = False  # each image counts the same
    gradient_clip_val: float = 1.5  # what gradients are clipped to; 0: not
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"  # of all; of each number
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # 16: for GPUs
    label_smoothing: float = 0.1  # share of a label that is spread over all classes
    ema_decay: float = 0.99  # of the moving average of the weights; 0: none


# %% Optimizer
def make_optimizer(net, args):
    #: Weight decay pulls towards 0. Biases and scales of norms need not be small.
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others},
    ]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)


# %% Moving average of the weights
@torch.no_grad()
def update_average(average, net, decay, first):
    now = net.state_dict()
    for name, mean in average.state_dict().items():
        #: A copy at first: the random weights are no part of the average.
        mean.copy_(now[name] if first else decay * mean + (1 - decay) * now[name])


# %% Training
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = NormNet().to(device)
    average = copy.deepcopy(net) if args.ema_decay else net
    optimizer = make_optimizer(net, args)
    loss_function = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    #: In the optimizer's order: the last bits of their norm depend on it.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clips = {"norm": clip_grad_norm_, "value": clip_grad_value_}
    #: The schedule must know how often it moves: once for each group of batches.
    group = args.accumulate_grad_batches
    steps = args.max_epochs * math.ceil(len(train_loader) / group)
    schedule = make_schedule(optimizer, args, steps)
    #: No cache of weights in half precision: the Trainer has none (docs/pitfalls.md).
    mixed, float16 = args.precision != "32-true", args.precision == "16-mixed"
    half = torch.float16 if float16 else torch.bfloat16
    autocast = torch.autocast(device.type, half, mixed, cache_enabled=False)
    #: float16 loses small gradients: the loss is scaled up, the gradients down again.
    scaler = torch.amp.GradScaler(device.type, enabled=float16)
    logger, step = CSVLogger(args.folder), 0
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        net.train()
        bar = tqdm(train_loader, f"Epoch {epoch}", disable=None)
        for batch, (images, labels) in enumerate(bar):
            images, labels = images.to(device), labels.to(device)
            #: The forward pass and the loss, no more: backward follows what they did.
            with autocast:
                loss = loss_function(net(images), labels)
            #: A NaN would spread to every weight. To look makes the CPU wait.
            if not loss.isfinite():
                raise diverged("loss of", step + 1, loss.item(), args.folder)
            if batch % group == 0:
                optimizer.zero_grad()
            #: Gradients add up: for their mean each loss gets its share of the group.
            weight = group_weight(batch, len(labels), len(train_loader.sampler), args)
            scaler.scale(loss * weight / group).backward()
            if (batch + 1) % group and batch + 1 < len(train_loader):
                continue
            #: Before clipping, which would otherwise see gradients that are scaled up.
            scaler.unscale_(optimizer)
            if (step + 1) % args.log_every_n_steps == 0:
                norm = get_total_norm([p.grad for p in parameters])
                now = {"epoch": epoch, "train_lr": optimizer.param_groups[0]["lr"]}
                now |= {"train_loss": loss.item(), "train_grad_norm": norm.item()}
                logger.log_metrics(now, step)
            if args.gradient_clip_val:
                clips[args.gradient_clip_algorithm](parameters, args.gradient_clip_val)
            #: Left out where a gradient is infinite; then the scale gets smaller.
            scaler.step(optimizer)
            scaler.update()
            if args.interval == "step" and args.schedule != "plateau":
                schedule.step()
            if args.ema_decay:
                update_average(average, net, args.ema_decay, first=step == 0)
            step += 1
        #: The average is validated and saved; the training goes on without it.
        with autocast:
            val = evaluate(average, val_loader, device, "val")
        if not math.isfinite(val["val_loss"]):
            raise diverged("validation loss after", step, val["val_loss"], args.folder)
        logger.log_metrics({"epoch": epoch, **val}, step - 1)
        ckpt = {"state_dict": average.state_dict(), "hyper_parameters": args.settings()}
        ckpt |= {"epoch": epoch, "global_step": step}
        checkpoints.save(args.folder / "checkpoints" / "last.ckpt", ckpt)
        if args.schedule == "plateau":
            schedule.step(val["val_loss"])
        elif args.interval == "epoch":
            schedule.step()
    net.load_state_dict(average.state_dict())
    with autocast:
        test = evaluate(net, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, step)
    return net


if __name__ == "__main__":
    run(main, Args)
