"""The same training on the Trainer, which takes the loop, too: the third rung.

Run it with `make trainer-fabric DEVICES=2`. Its twins are plain/fabric.py and fabric.py
beside it.
"""

# %% Imports
from common import processes
from common.data import Normalize, load_images
from common.launch import Processes
from common.models import DropoutNet
from common.run import run

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import lightning as L
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy


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
#: By validation_step and test_step of LitClassifier.


# %% Training
class LitFabric(LitClassifier):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss_function(self.model(images), labels)
        #: sync_dist sends messages at each call: only where the Trainer writes it.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss


def main(args):
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    #: One seed for all: they begin with the same weights.
    L.seed_everything(args.seed, verbose=False)
    net = DropoutNet()
    model = LitFabric(net, args, F.nll_loss)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=DDPStrategy(timeout=timedelta(seconds=args.timeout)),
        precision=args.precision,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip_val,
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[TQDMProgressBar(args.refresh_rate)],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    return net


if __name__ == "__main__":
    run(main, Args)
