"""A loop that knows its devices: processes, precision, accumulation, clipping, by hand.

Run it with `make plain-fabric DEVICES=2`. Its twin is lightning/fabric.py, the same
loop on Lightning Fabric; lightning/fabric_trainer.py gives the loop away, too.
"""

# %% Imports
from common import processes
from common.data import Normalize, load_images, make_loaders
from common.launch import Processes
from common.logger import CSVLogger
from common.models import DropoutNet
from common.run import run

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cifar import choose_device, compute_metrics, count, seed_everything
from parallel import start_process
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Processes):
    lr: float = 0.05  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch, over all devices together
    max_epochs: int = 2  # passes over the training set
    accumulate_grad_batches: int = 2  # batches whose gradients add up to one step
    gradient_clip_val: float = 1.0  # what their norm is clipped to; 0: not
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # bf16: in half precision


# %% Evaluation
def evaluate(model, loader, device, stage, autocast):
    with autocast:
        sums = count(model, loader, device, F.nll_loss)
    #: Sums, not means: some processes may have an image less.
    return compute_metrics(*[processes.add_up(each, device) for each in sums], stage)


# %% Training
def main(args):
    device = choose_device(args.accelerator)
    start_process(args, device)
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    train_loader, val_loader, test_loader = make_loaders(data, args)
    #: One seed for all: they begin with the same weights.
    seed_everything(args.seed)
    net = DropoutNet().to(device)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
    model = DistributedDataParallel(net)
    mixed = args.precision == "bf16-mixed"
    autocast = torch.autocast(device.type, torch.bfloat16, mixed)
    rank, group, step = dist.get_rank(), args.accumulate_grad_batches, 0
    log = CSVLogger(args.folder).log_metrics if rank == 0 else lambda *_: None
    #: As the Trainer does with several processes: dropout begins from the seed.
    seed_everything(args.seed)
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        model.train()
        bar = tqdm(train_loader, f"Epoch {epoch}", disable=rank > 0 or None)
        for batch, (images, labels) in enumerate(bar, start=1):
            images, labels = images.to(device), labels.to(device)
            due = batch % group == 0 or batch == len(train_loader)
            #: Where no step follows, gradients add up where they are: sending costs.
            with contextlib.nullcontext() if due else model.no_sync():
                with autocast:
                    output = model(images)
                loss = F.nll_loss(output.float(), labels)
                (loss / group).backward()
            if not due:
                continue
            if args.gradient_clip_val:
                clip_grad_norm_(net.parameters(), args.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.log_every_n_steps == 0:
                #: Each process has the loss of its own images.
                mean = processes.add_up(loss.item(), device) / dist.get_world_size()
                log({"epoch": epoch, "train_loss": mean}, step - 1)
        val = evaluate(model, val_loader, device, "val", autocast)
        log({"epoch": epoch, **val}, step - 1)
    seed_everything(args.seed)
    test = evaluate(model, test_loader, device, "test", autocast)
    log({"epoch": args.max_epochs, **test}, step)
    return net


if __name__ == "__main__":
    run(main, Args)
