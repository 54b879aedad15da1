"""The tutorial's CNN once more: as good as in `cifar`, in a tenth of the CPU time.

Run it with `make plain-speed`. Its twin is lightning/speed.py. docs/speed.md tells what
each of the means gives, measured.
"""

# %% Imports
from common.batches import DeviceBatches
from common.data import CIFAR10_MEAN, CIFAR10_STD, Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import NETWORKS, Averaged
from common.optimizers import Muon, up_and_down
from common.run import Options, run

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from cifar import choose_device, evaluate, seed_everything
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    network: Literal["net", "small", "airbench"] = "net"
    """net: the tutorial's; small: for a processor; airbench: for a GPU"""
    optimizer: Literal["muon", "adam", "sgd"] = "muon"  # adam: AdamW; sgd: Nesterov's
    lr: float = 0.05  # learning rate, at its highest
    momentum: float = 0.9  # of Muon and SGD
    weight_decay: float = 0.0  # pulls all parameters towards 0
    label_smoothing: float = 0.0  # of the training's targets; others have none
    batch_size: int = 128  # images in one batch
    max_epochs: int = 1  # passes over the training set
    limit_train_batches: int | float = 190  # batches of an epoch: half of the images
    flip: Literal["none", "random", "alternate"] = "none"
    """mirrored images: random, or those that were not mirrored in the epoch before"""
    translate: int = 0  # pixels by which an image is moved, at most
    channels_last: bool = True  # keep a pixel's channels next to each other in memory
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # bf16: autocast
    freeze_at: float = 0.5  # share of the steps after which the first layer rests
    tta: bool = False  # test each image six times, mirrored and moved by a pixel
    compile: bool = False  # compile the network, which takes a while
    threads: int | None = 1  # CPU threads; None: 1 below batch size 128, else up to 8
    log_every_n_steps: int = 10  # steps from one logged training loss to the next


# %% Network
def make_network(args, images):
    net = NETWORKS[args.network]()
    if args.network == "airbench":
        #: Its first layer is computed from the images, and not trained.
        some = range(min(5000, len(images)))
        net.whiten(images.__getitems__(some)[0])
    return net


#: What the first layer sees settles first. Its backward pass is the most expensive of
#: all: it works on the largest images, and without it nothing has to go back that far.
def freeze_first_layer(net):
    for parameter in list(net.parameters())[:2]:
        parameter.requires_grad_(False)


# %% Optimizer
def make_optimizer(net, args):
    usual = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adam":
        return torch.optim.AdamW(net.parameters(), fused=True, **usual)
    if args.optimizer == "sgd":
        sgd = dict(momentum=args.momentum, nesterov=True, fused=True)
        return torch.optim.SGD(net.parameters(), **sgd, **usual)
    return Muon(net, momentum=args.momentum, **usual)


# %% Training
def main(args):
    data = load_images("cifar10", args, Normalize(CIFAR10_MEAN, CIFAR10_STD))
    _, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    #: All images lie on the device as bytes. A batch is taken, normalized and augmented
    #: in one go, and there is nothing to move.
    batches = DeviceBatches(
        data.train, args.batch_size, args.seed, device, flip=args.flip,
        translate=args.translate, memory_format=layout, limit=args.limit_train_batches,
    )  # fmt: skip
    net = make_network(args, data.train).to(device, memory_format=layout)
    #: Compiling takes longer than a short training: it pays for long ones, and on GPUs.
    model = torch.compile(net) if args.compile else net
    optimizer = make_optimizer(net, args)
    #: Up in the first tenth of the steps, then down to 0. It must know their number.
    steps, step = args.max_epochs * len(batches), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, up_and_down(steps))
    #: No cache of weights in bfloat16: the Trainer has none (docs/pitfalls.md).
    autocast = torch.autocast(
        device.type, torch.bfloat16, args.precision != "32-true", cache_enabled=False
    )
    logger = CSVLogger(args.folder)
    for epoch in range(args.max_epochs):
        batches.sampler.set_epoch(epoch)
        model.train()
        for images, labels in tqdm(batches, f"Epoch {epoch}", disable=None):
            if step == int(args.freeze_at * steps):
                freeze_first_layer(net)
            with autocast:
                logits, smoothing = model(images), args.label_smoothing
                loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % args.log_every_n_steps == 0:
                logger.log_metrics({"epoch": epoch, "train_loss": loss.item()}, step)
            step += 1
        with autocast:
            val = evaluate(model, val_loader, device, "val")
        logger.log_metrics({"epoch": epoch, **val}, step - 1)
    tested = Averaged(model) if args.tta else model
    with autocast:
        test = evaluate(tested, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, step)
    return net


if __name__ == "__main__":
    run(main, Args)
