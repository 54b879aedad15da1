"""Stop anywhere, resume, reach the same bits: save all that changes in training.

Run it with `make plain-resume`, stop or kill it, and resume with
ARGS="--ckpt-path last". Its twin is lightning/resume.py.
"""

# %% Imports
from common import checkpoints, resume
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import DropoutNet
from common.run import Options, run

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from callbacks import EarlyStopping
from cifar import choose_device, evaluate, seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 1e-2  # learning rate at the start
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch
    max_epochs: int = 5  # passes over the training set, at most
    patience: int = 3  # epochs without improvement after which it stops
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # 16: for GPUs
    checkpoint_every_n_steps: int = 500  # steps from one checkpoint to the next
    ckpt_path: Path | None = None  # to resume from: last, best, or a file
    max_time: str = ""  # save and end after this time: DD:HH:MM:SS


# %% Save and load
class Training:
    #: All that changes while it trains. What is left out here is lost with the process.
    def __init__(self, net, args, steps, device):
        self.net, self.args, self.step, self.best = net, args, 0, math.inf
        #: The settings at the start: a schedule changes them, so they are saved, too.
        self.optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
        self.schedule = CosineAnnealingLR(self.optimizer, steps)
        #: The scale of the loss, with --precision 16-mixed.
        half = args.precision == "16-mixed"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.stopping = EarlyStopping(args.patience)

    def save(self, name, epoch):
        ckpt = {"epoch": epoch, "global_step": self.step, "best": self.best}
        ckpt["state_dict"] = self.net.state_dict()
        ckpt["optimizer_states"] = [self.optimizer.state_dict()]
        ckpt["lr_schedulers"] = [self.schedule.state_dict()]
        ckpt["MixedPrecision"] = self.scaler.state_dict()
        ckpt["stopping"] = vars(self.stopping)
        ckpt["hyper_parameters"] = self.args.settings()
        #: The generators that dropout draws from. The order of the images need not be
        #: saved: it follows from seed, epoch and step.
        ckpt["random"] = resume.random_states()
        #: Under a temporary name, synced, renamed: a kill leaves no half file.
        resume.save(self.args.folder / "checkpoints" / f"{name}.ckpt", ckpt)

    def load(self, path, sampler, batches):
        ckpt = checkpoints.load(self.net, path)
        self.step, self.best = ckpt["global_step"], ckpt["best"]
        self.optimizer.load_state_dict(ckpt["optimizer_states"][0])
        self.schedule.load_state_dict(ckpt["lr_schedulers"][0])
        self.scaler.load_state_dict(ckpt["MixedPrecision"])
        vars(self.stopping).update(ckpt["stopping"])
        #: The images of this epoch that were trained on already.
        epoch, done = divmod(self.step, batches)
        sampler.skip(epoch, done * self.args.batch_size)
        #: Last, since anything before might draw a random number.
        resume.set_random_states(ckpt["random"])


# %% Training
def train_epoch(t, loader, device, autocast, epoch, logger, stop):
    t.net.train()
    args, done, count = t.args, t.step % len(loader), len(loader)
    for images, labels in tqdm(
        loader, f"Epoch {epoch}", count, initial=done, disable=None
    ):
        images, labels = images.to(device), labels.to(device)
        t.optimizer.zero_grad()
        with autocast:
            loss = F.nll_loss(t.net(images), labels)
        t.scaler.scale(loss).backward()
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.schedule.step()
        if (t.step + 1) % args.log_every_n_steps == 0:
            logger.log_metrics({"epoch": epoch, "train_loss": loss.item()}, t.step)
        t.step += 1
        due = t.step % args.checkpoint_every_n_steps == 0
        #: At the end of an epoch only after its validation: resuming would skip it.
        if t.step % len(loader) and (due or stop.asked):
            t.save(f"step_{t.step:08d}", epoch)
            stop.end_if_asked(t.step)


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    half = torch.float16 if args.precision == "16-mixed" else torch.bfloat16
    mixed = args.precision != "32-true"
    autocast = torch.autocast(device.type, half, mixed, cache_enabled=False)
    steps = args.max_epochs * len(train_loader)
    t = Training(DropoutNet().to(device), args, steps, device)
    if args.ckpt_path:
        t.load(args.ckpt_path, train_loader.sampler, len(train_loader))
    #: After it was loaded: what does not fit is refused before anything is written.
    logger = CSVLogger(args.folder)
    #: Ctrl-C and SIGTERM strike anywhere. They are noted, and the loop asks for them.
    with resume.Stop(args.max_time).listening() as stop:
        while t.step < steps and not t.stopping.stopped:
            epoch = t.step // len(train_loader)
            train_loader.sampler.set_epoch(epoch)
            train_epoch(t, train_loader, device, autocast, epoch, logger, stop)
            with autocast:
                val = evaluate(t.net, val_loader, device, "val", F.nll_loss)
            logger.log_metrics({"epoch": epoch, **val}, t.step - 1)
            t.stopping.update(val["val_loss"])
            if epoch == 0 or val["val_loss"] < t.best:
                t.best = val["val_loss"]
                t.save("best", epoch)
            t.save(f"step_{t.step:08d}", epoch)
            stop.end_if_asked(t.step)
    checkpoints.load(t.net, args.folder / "checkpoints" / "best.ckpt")
    with autocast:
        test = evaluate(t.net, test_loader, device, "test", F.nll_loss)
    logger.log_metrics({"epoch": t.step // len(train_loader), **test}, t.step)
    return t.net


if __name__ == "__main__":
    run(main, Args)
