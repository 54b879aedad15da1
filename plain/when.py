"""When it validates, looks, saves and stops: every moment foretold by hand.

Run it with `make plain-when`. Its twin is lightning/when.py.
"""

# %% Imports
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import DropoutNet
from common.run import Options, run

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from callbacks import EarlyStopping, save
from cifar import choose_device, evaluate, seed_everything
from torch.utils.data import DataLoader
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 0.02  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch
    max_epochs: int = 3  # passes over the training set, at most
    min_epochs: int = 0  # passes before which nothing but --max-steps stops it
    max_steps: int = -1  # optimizer steps, at most; -1: no limit
    val_check_interval: int | float = (
        0.25  # a share of an epoch, or a number of batches
    )
    check_val_every_n_epoch: int | None = 1  # None: count batches over the whole run
    num_sanity_val_steps: int = 2  # validation batches that are tried out at the start
    patience: int = 5  # validations without improvement after which it stops
    overfit_batches: int | float = 0.0  # train on this few batches, always the same
    fast_dev_run: int = 0  # try all code with so many batches, and write nothing
    shared_generator: bool = False  # validation draws from the global generator


# %% Data
def unshuffled(loader):
    samples = range(len(loader.sampler))
    same = dict(collate_fn=loader.collate_fn, generator=loader.generator)
    return DataLoader(loader.dataset, loader.batch_size, sampler=samples, **same)


# %% When it validates
def moments(batches, args):
    interval, n = args.val_check_interval, args.check_val_every_n_epoch
    if args.fast_dev_run:
        return [batches]
    #: A float is a share, rounded down; an int counts batches. 1 is no 1.0 here.
    if isinstance(interval, float):
        interval = max(1, int(batches * interval))
    found, step = [], 0
    for epoch in range(args.max_epochs):
        for batch in range(1, batches + 1):
            step += 1
            #: Counted over the whole run, or anew in each n-th epoch.
            counted = step if n is None else batch
            if counted % interval == 0 and (n is None or (epoch + 1) % n == 0):
                found.append(step)
    return found


# %% When it looks
class Callbacks:
    def __init__(self, net, optimizer, args):
        self.net, self.optimizer, self.args = net, optimizer, args
        self.stopping, self.best = EarlyStopping(args.patience), None
        self.stopped = False

    def look(self, val, epoch, step):
        if self.args.fast_dev_run:
            return
        save("last", self.net, self.optimizer, epoch, step, self.args)
        #: A run can end before its first validation.
        if val is None:
            return
        self.stopping.update(val["val_loss"])
        #: A wish to stop stays, also where min_epochs lets it improve once more.
        self.stopped = self.stopped or self.stopping.stopped
        if self.best is None or val["val_loss"] < self.best:
            self.best = val["val_loss"]
            save("best", self.net, self.optimizer, epoch, step, self.args)


# %% Training
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    if args.overfit_batches:
        train_loader = unshuffled(train_loader)
    if args.shared_generator:
        #: PyTorch's default. Each validation then draws one random number.
        val_loader.generator = None
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = DropoutNet().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum)
    validates = moments(len(train_loader), args)
    few_steps = min(args.fast_dev_run, len(train_loader))
    max_steps = few_steps or args.max_steps
    #: A trap: 1 == 1.0, so that an interval of one batch looks once an epoch, too.
    once_an_epoch = args.val_check_interval == 1.0 and args.check_val_every_n_epoch == 1
    logger = None if args.fast_dev_run else CSVLogger(args.folder)
    callbacks, val, step = Callbacks(net, optimizer, args), None, 0
    #: A mistake in the validation shows before an epoch is over. It must draw nothing.
    with torch.random.fork_rng():
        n = 0 if args.fast_dev_run else args.num_sanity_val_steps
        if few := [b for _, b in zip(range(n), val_loader, strict=False)]:
            evaluate(net, few, device, "val", F.nll_loss)
    for epoch in range(args.max_epochs):
        if not args.overfit_batches:
            train_loader.sampler.set_epoch(epoch)
        for images, labels in tqdm(train_loader, f"Epoch {epoch}", disable=None):
            net.train()
            optimizer.zero_grad()
            loss = F.nll_loss(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            step += 1
            if logger and step % args.log_every_n_steps == 0:
                now = {"epoch": epoch, "train_loss": loss.item()}
                logger.log_metrics(now, step - 1)
            if step in validates:
                val = evaluate(net, val_loader, device, "val", F.nll_loss)
                if logger:
                    logger.log_metrics({"epoch": epoch, **val}, step - 1)
                if not once_an_epoch:
                    callbacks.look(val, epoch, step)
            #: An epoch counts for min_epochs once it is over.
            if step == max_steps or (callbacks.stopped and epoch >= args.min_epochs):
                break
        if once_an_epoch:
            callbacks.look(val, epoch, step)
        if step == max_steps or (callbacks.stopped and epoch + 1 >= args.min_epochs):
            break
    print("Validated after batch", *[each for each in validates if each <= step])
    test = evaluate(net, test_loader, device, "test", F.nll_loss)
    if logger:
        logger.log_metrics({"epoch": epoch + 1, **test}, step)
    return net


if __name__ == "__main__":
    run(main, Args)
