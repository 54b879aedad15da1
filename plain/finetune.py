"""A network that others trained, with a new last layer: frozen first, then trained.

Run it with `make plain-finetune` or `python plain/finetune.py`. Its twin is
lightning/finetune.py.
"""

# %% Imports
from common import checkpoints
from common.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalize,
    load_images,
    make_loaders,
)
from common.logger import CSVLogger
from common.models import Transfer
from common.pretrained import load_pretrained
from common.run import Options, run

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from cifar import choose_device, evaluate, seed_everything
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    backbone: Literal["vgg16", "resnet18", "mobilenet_v3_small"] = "vgg16"
    """torchvision's; the two others take a tenth of the time"""
    weights: Literal["auto", "imagenet", "random"] = "auto"
    """imagenet: the pretrained ones or an error; random: none; auto: imagenet where
    they are here or can be downloaded, else random"""
    start_from: Path | None = None  # a checkpoint or weights.pt of either side
    lr: float = 1e-2  # learning rate of the new layer; the backbone's is a tenth of it
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch
    max_epochs: int = 2  # passes over the training set
    unfreeze_at_epoch: int = 1  # the first epoch, from 0, that trains the backbone, too
    limit_train_batches: int | float = 50  # few images, as one has to fine-tune with
    limit_val_batches: int | float = 1  # the same for each validation
    limit_test_batches: int | float = 2  # the same for the test
    log_every_n_steps: int = 10  # steps from one logged training loss to the next


# %% Save and load
def save(path, net, optimizer, epoch, step, args):
    #: Weights by name, and plain values. Not torch.save(net): that stores the object.
    #: To load it means to run code, and torch.load refuses to since PyTorch 2.6.
    ckpt = {"epoch": epoch, "global_step": step, "hyper_parameters": args.settings()}
    ckpt["state_dict"] = net.state_dict()
    ckpt["optimizer_states"] = [optimizer.state_dict()]
    checkpoints.save(path, ckpt)


def make_network(args):
    net = Transfer(args.backbone)
    if args.start_from:
        #: In Lightning's checkpoint each name begins with "model.", its attribute.
        #: checkpoints.load takes that off, and refuses what does not fit.
        checkpoints.load(net, args.start_from)
    else:
        load_pretrained(net, args.backbone, args.weights)
    return net


# %% Freeze and unfreeze
def train_mode(net, frozen):
    net.train()
    if frozen:
        #: Without gradients BatchNorm still moves its averages, dropout still drops.
        net.backbone.eval()


def unfreeze(backbone, optimizer, lr):
    backbone.requires_grad_(True)
    #: A group of its own, with a small learning rate: it must not forget.
    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": lr})


# %% Training
def train_epoch(model, loader, optimizer, device, epoch, logger, every):
    bar = tqdm(loader, f"Epoch {epoch}", disable=None)
    for step, (images, labels) in enumerate(bar, start=epoch * len(loader)):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            bar.set_postfix(train_loss=loss.item())
            logger.log_metrics({"epoch": epoch, "train_loss": loss.item()}, step)


# %% Run
def main(args):
    data = load_images("cifar10", args, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = make_network(args).to(device)
    net.backbone.requires_grad_(False)
    #: The head alone: the backbone comes later, as a group with its own learning rate.
    optimizer = torch.optim.SGD(net.head.parameters(), args.lr, args.momentum)
    model = net
    if args.devices > 1:
        model = torch.nn.DataParallel(net, range(args.devices))
    logger, every = CSVLogger(args.folder), args.log_every_n_steps
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        if epoch == args.unfreeze_at_epoch:
            unfreeze(net.backbone, optimizer, args.lr / 10)
        train_mode(net, frozen=epoch < args.unfreeze_at_epoch)
        train_epoch(model, train_loader, optimizer, device, epoch, logger, every)
        val = evaluate(model, val_loader, device, "val")
        print(f"Epoch {epoch}:", ", ".join(f"{k} {v:.4f}" for k, v in val.items()))
        steps = (epoch + 1) * len(train_loader)
        logger.log_metrics({"epoch": epoch, **val}, steps - 1)
    path = args.folder / "checkpoints" / "last.ckpt"
    save(path, net, optimizer, args.max_epochs, steps, args)
    test = evaluate(model, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, steps)
    return net


if __name__ == "__main__":
    run(main, Args)
