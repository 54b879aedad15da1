"""What stands around the optimizer's step, by the Trainer's flags.

Run it with `make lightning-optimize`. Its twin is plain/optimize.py.
"""

# %% Imports
from common.data import Normalize, load_images
from common.models import NormNet
from common.optimizers import diverged, group_weight, make_schedule
from common.run import Options, run

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import get_total_norm


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
#: EMAWeightAveraging, in main: it swaps the weights for each validation, and back.


# %% Training
class LitOptimize(LitClassifier):
    def __init__(self, model, args):
        super().__init__(model, args)
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model, self.hparams)
        #: It counts optimizer steps, not batches: the Trainer has divided.
        steps = self.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, self.hparams, steps)
        plateau = self.hparams.schedule == "plateau"
        #: The interval belongs in here. Beside lr_scheduler it would be ignored.
        interval = "epoch" if plateau else self.hparams.interval
        config = {"scheduler": schedule, "interval": interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    #: Under autocast. What comes after it is the Trainer's: the loss is divided by
    #: accumulate_grad_batches and scaled, gradients are cleared where a group begins.
    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.train_loss(self.model(images), labels)
        if not loss.isfinite():
            folder = Path(self.trainer.log_dir)
            raise diverged("loss of", self.global_step + 1, loss.item(), folder)
        self.log("train_loss", loss)
        samples = len(self.trainer.train_dataloader.sampler)
        return loss * group_weight(batch_idx, len(labels), samples, self.hparams)

    #: Gradients are scaled down again, and not yet clipped.
    def on_before_optimizer_step(self, optimizer):
        #: A norm takes time: only in those steps that are written.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            parameters = [
                p for group in optimizer.param_groups for p in group["params"]
            ]
            norm = get_total_norm([p.grad for p in parameters])
            self.log("train_grad_norm", norm)
            self.log("train_lr", optimizer.param_groups[0]["lr"])

    #: Before the checkpoint is written, which shall be the last good one.
    def on_validation_epoch_end(self):
        loss = self.trainer.callback_metrics["val_loss"].item()
        if not self.trainer.sanity_checking and not math.isfinite(loss):
            folder = Path(self.trainer.log_dir)
            raise diverged("validation loss after", self.global_step, loss, folder)


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    L.seed_everything(args.seed, verbose=False)
    model = LitOptimize(NormNet(), args)
    #: After each validation, where the weights are those of the average.
    after = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    callbacks = [ModelCheckpoint(args.folder / "checkpoints", "last", **after)]
    if args.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=args.ema_decay))
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        precision=args.precision,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip_val,
        gradient_clip_algorithm=args.gradient_clip_algorithm,
        callbacks=[*callbacks, TQDMProgressBar(args.refresh_rate)],
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
