"""The tutorial's CNN once more: as good as in `cifar`, in a tenth of the CPU time.

Run it with `make lightning-speed`. Its twin is plain/speed.py. docs/speed.md tells what
each of the means gives, measured.
"""

# %% Imports
from common.batches import DeviceBatches
from common.data import CIFAR10_MEAN, CIFAR10_STD, Normalize, load_images, make_loaders
from common.models import NETWORKS, Averaged
from common.optimizers import Muon, up_and_down
from common.run import Options, run

from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from cifar import LitClassifier
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger


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
class LitFast(LitClassifier):
    def configure_optimizers(self):
        self.steps = self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.model, self.hparams)
        #: Up in the first tenth of the steps, then down to 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, up_and_down(self.steps))
        #: Without the interval it moves once an epoch, and stays near its beginning.
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == int(self.hparams.freeze_at * self.steps):
            freeze_first_layer(self.model)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits, smoothing = self.model(images), self.hparams.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        #: self.log takes time also where nothing is written: here only when it is due.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train_loss", loss)
        return loss


def main(args):
    data = load_images("cifar10", args, Normalize(CIFAR10_MEAN, CIFAR10_STD))
    _, val_loader, test_loader = make_loaders(data, args)
    L.seed_everything(args.seed, verbose=False)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = make_network(args, data.train).to(memory_format=layout)
    #: Compiling takes longer than a short training: it pays for long ones, and on GPUs.
    if args.compile:
        net.compile()
    model = LitFast(net, args)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=1,
        deterministic="warn",
        precision=args.precision,
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[TQDMProgressBar(args.refresh_rate)],
        enable_checkpointing=False,
        enable_model_summary=False,
        #: torch.compile goes by the first batch: let it be one to train on.
        num_sanity_val_steps=0,
    )
    #: No DataLoader: the Trainer takes any iterable with a length, and calls set_epoch
    #: of its `sampler`. All images lie on the device as bytes.
    batches = DeviceBatches(
        data.train, args.batch_size, args.seed, trainer.strategy.root_device,
        flip=args.flip, translate=args.translate, memory_format=layout,
        limit=args.limit_train_batches,
    )  # fmt: skip
    trainer.fit(model, batches, val_loader)
    model.model = Averaged(net) if args.tta else net
    trainer.test(model, test_loader, verbose=False)
    return net


if __name__ == "__main__":
    run(main, Args)
