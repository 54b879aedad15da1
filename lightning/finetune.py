"""A network that others trained, with a new last layer: frozen first, then trained.

Run it with `make lightning-finetune` or `python lightning/finetune.py`. Its twin is
plain/finetune.py.
"""

# %% Imports
from common import checkpoints
from common.data import IMAGENET_MEAN, IMAGENET_STD, Normalize, load_images
from common.models import Transfer
from common.pretrained import load_pretrained
from common.run import Options, run

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import BaseFinetuning, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger


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
#: To save, trainer.save_checkpoint, in main: everything in one call. Each name in the
#: state_dict begins with "model.", since it is that of the LightningModule.


def make_network(args):
    net = Transfer(args.backbone)
    if args.start_from:
        #: Into the network itself, which has the same names on both sides.
        #: checkpoints.load takes the "model." off, and refuses what does not fit.
        checkpoints.load(net, args.start_from)
    else:
        load_pretrained(net, args.backbone, args.weights)
    return net


# %% Freeze and unfreeze
class Unfreeze(BaseFinetuning):
    def __init__(self, epoch, lr):
        super().__init__()
        self.epoch, self.lr = epoch, lr

    def freeze_before_training(self, module):
        self.freeze(module.model.backbone, train_bn=False)

    def finetune_function(self, module, epoch, optimizer):
        backbone = module.model.backbone
        if epoch < self.epoch:
            #: freeze leaves train mode on: dropout would drop, and BatchNorm would move
            #: its averages. The Trainer keeps the mode that it finds.
            backbone.eval()
        if epoch == self.epoch:
            backbone.train()
            #: A group of its own, with a small learning rate.
            self.unfreeze_and_add_param_group(backbone, optimizer, self.lr)


# %% Training
class LitFinetune(LitClassifier):
    def configure_optimizers(self):
        lr, momentum = self.hparams.lr, self.hparams.momentum
        #: The head alone: the backbone comes later, with its own learning rate.
        return torch.optim.SGD(self.model.head.parameters(), lr, momentum)


# %% Run
def main(args):
    data = load_images("cifar10", args, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    L.seed_everything(args.seed, verbose=False)
    model = LitFinetune(make_network(args), args)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[
            Unfreeze(args.unfreeze_at_epoch, args.lr / 10),
            TQDMProgressBar(args.refresh_rate),
        ],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.save_checkpoint(args.folder / "checkpoints" / "last.ckpt")
    trainer.test(model, datamodule, verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
