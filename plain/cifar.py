"""The tutorial's CNN on CIFAR-10, trained by a loop written by hand.

Run it with `make plain-cifar` or `.venv/bin/python plain/cifar.py`. Its twin is
lightning/cifar.py.
"""

# %% Imports
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import Net
from common.run import Options, run

import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchsummary import summary
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 1e-3  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 4  # images in one batch
    max_epochs: int = 2  # passes over the training set
    log_every_n_steps: int = 2000  # steps from one logged training loss to the next


# %% Seed and device
def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the CPU's generator and those of all GPUs
    #: Some GPU kernels add up in whatever order their threads arrive. The CPU's do not.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)


def choose_device(accelerator):
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# %% Data
#: No data module: main makes the DataLoaders and hands them on.


# %% Training and evaluation
def train_epoch(model, loader, optimizer, device, epoch, logger, every):
    #: Dropout on, BatchNorm learns. Without it the last evaluation's mode stays.
    model.train()
    bar = tqdm(loader, f"Epoch {epoch}", disable=None)
    for step, (images, labels) in enumerate(bar, start=epoch * len(loader)):
        #: The model went to its device once; each batch has to follow it.
        images, labels = images.to(device), labels.to(device)
        #: Gradients add up until they are cleared.
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            #: item() makes the CPU wait for the GPU: once in many steps is cheap.
            bar.set_postfix(train_loss=loss.item())
            logger.log_metrics({"epoch": epoch, "train_loss": loss.item()}, step)


@torch.no_grad()
def count(model, loader, device, loss_function=F.cross_entropy):
    #: Dropout off, BatchNorm uses its running averages. PyTorch does not warn you
    #: if you forget this line.
    model.eval()
    total_loss, confusion = 0.0, torch.zeros(10, 10, dtype=torch.long)
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        #: Times the batch size: the last batch is shorter, and counts less.
        total_loss += loss_function(logits, labels).item() * len(labels)
        pairs = 10 * labels + logits.argmax(1)  # from 0 to 99 for (true, predicted)
        confusion += torch.bincount(pairs.cpu(), minlength=100).reshape(10, 10)
    return total_loss, confusion


def compute_metrics(total_loss, confusion, stage):
    #: All follows from counts[true class, predicted class]. An absent class has no F1.
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    f1 = (2 * right / (true + predicted))[true + predicted > 0].mean()
    return {
        f"{stage}_loss": total_loss / true.sum().item(),
        f"{stage}_accuracy": (right.sum() / true.sum()).item(),
        f"{stage}_f1": f1.item(),
    }


def evaluate(model, loader, device, stage, loss_function=F.cross_entropy):
    return compute_metrics(*count(model, loader, device, loss_function), stage)


# %% Run
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    #: Before the seed: torchsummary makes a forward pass of random numbers.
    summary(Net(), (3, 32, 32), device="cpu")
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)
    model = net
    if args.devices > 1:
        #: Its state_dict has "module." before every name; that of `net` has not.
        model = torch.nn.DataParallel(net, range(args.devices))
    logger, every = CSVLogger(args.folder), args.log_every_n_steps
    for epoch in range(args.max_epochs):
        #: Without set_epoch every epoch has the same order.
        train_loader.sampler.set_epoch(epoch)
        train_epoch(model, train_loader, optimizer, device, epoch, logger, every)
        val = evaluate(model, val_loader, device, "val")
        print(f"Epoch {epoch}:", ", ".join(f"{k} {v:.4f}" for k, v in val.items()))
        steps = (epoch + 1) * len(train_loader)
        logger.log_metrics({"epoch": epoch, **val}, steps - 1)
    test = evaluate(model, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, steps)
    return net


if __name__ == "__main__":
    run(main, Args)
