"""What runs around the loop, by hand: loggers, early stopping, checkpoints, pictures.

Run it with `make plain-callbacks`. Its twin is lightning/callbacks.py.
"""

# %% Imports
from common import checkpoints, figures
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import DeepNet
from common.run import Options, run

import importlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from cifar import choose_device, evaluate, seed_everything
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 2e-4  # learning rate of Adam
    batch_size: int = 32  # images in one batch
    max_epochs: int = 50  # passes over the training set, at most
    patience: int = 3  # epochs without improvement after which it stops
    min_delta: float = 0.0  # what counts as improvement: more than this
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"  # where values go


# %% Loggers and pictures
class Logger:
    def __init__(self, args):
        folder, settings = args.folder, args.settings()
        self.csv, self.writer, self.wandb = CSVLogger(folder), None, None
        #: Imported where they are asked for: both are extras.
        if args.logger == "tensorboard":
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self.writer = tensorboard.SummaryWriter(folder / "tensorboard")
        if args.logger == "wandb":
            self.wandb = importlib.import_module("wandb")
            self.wandb.init(project="callbacks", dir=folder, config=settings)

    def log_metrics(self, metrics, step):
        self.csv.log_metrics(metrics, step)
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics | {"trainer/global_step": step})

    def log_picture(self, pixels, step):
        if self.writer:
            self.writer.add_image("predictions", pixels, step, dataformats="HWC")
        if self.wandb:
            picture = [self.wandb.Image(pixels)]
            self.wandb.log({"predictions": picture, "trainer/global_step": step})

    def close(self):
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


# %% Early stopping
class EarlyStopping:
    def __init__(self, patience, min_delta=0.0):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.wait, self.stopped = math.inf, 0, False

    def update(self, val_loss):
        #: A tie is no improvement. A gain of exactly min_delta is none either.
        better = val_loss + self.min_delta < self.best
        self.best, self.wait = (val_loss, 0) if better else (self.best, self.wait + 1)
        self.stopped = self.wait >= self.patience or not math.isfinite(val_loss)


# %% Checkpoints
def save(name, net, optimizer, epoch, step, args):
    ckpt = {"epoch": epoch, "global_step": step, "hyper_parameters": args.settings()}
    ckpt["state_dict"] = net.state_dict()
    ckpt["optimizer_states"] = [optimizer.state_dict()]
    checkpoints.save(args.folder / "checkpoints" / f"{name}.ckpt", ckpt)


# %% Training
def train_epoch(net, loader, optimizer, device, epoch, logger, every):
    net.train()
    losses, hits = [], []
    bar = tqdm(loader, f"Epoch {epoch}", disable=None)
    for step, (images, labels) in enumerate(bar, start=epoch * len(loader)):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        output = net(images)
        #: The network ends with log_softmax; cross_entropy is nll_loss of log_softmax.
        loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        hits.append((output.argmax(1) == labels).float())
        if (step + 1) % every == 0:
            now = {"epoch": epoch, "train_loss_step": loss.item()}
            now["train_accuracy_step"] = hits[-1].mean().item()
            logger.log_metrics(now, step)
    #: Weighted by the batch size, as in validation.
    sizes = torch.tensor([len(each) for each in hits]).double()
    loss = torch.stack(losses).cpu().double() @ sizes / sizes.sum()
    accuracy = torch.cat(hits).mean()
    return {"train_loss_epoch": loss.item(), "train_accuracy_epoch": accuracy.item()}


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = DeepNet().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    logger, stopping = Logger(args), EarlyStopping(args.patience, args.min_delta)
    best, folder, every = math.inf, args.folder, args.log_every_n_steps
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        train = train_epoch(net, train_loader, optimizer, device, epoch, logger, every)
        steps = (epoch + 1) * len(train_loader)
        val = evaluate(net, val_loader, device, "val", F.nll_loss)
        logger.log_metrics({"epoch": epoch, **val}, steps - 1)
        logger.log_picture(figures.predictions(net, data, epoch, folder), steps - 1)
        if epoch == 0 or val["val_loss"] < best:
            best = val["val_loss"]
            save("best", net, optimizer, epoch, steps, args)
        save("last", net, optimizer, epoch, steps, args)
        logger.log_metrics({"epoch": epoch, **train}, steps - 1)
        stopping.update(val["val_loss"])
        if stopping.stopped:
            break
    #: The best weights are tested, not the last ones.
    checkpoints.load(net, folder / "checkpoints/best.ckpt")
    test = evaluate(net, test_loader, device, "test", F.nll_loss)
    logger.log_metrics({"epoch": epoch + 1, **test}, steps)
    logger.close()
    return net


if __name__ == "__main__":
    run(main, Args)
