"""When the Trainer validates, looks, saves and stops.

Run it with `make lightning-when`. Its twin is plain/when.py.
"""

# %% Imports
from common.data import Normalize, load_images
from common.models import DropoutNet
from common.run import Options, run

from dataclasses import dataclass

import lightning as L
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger


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
class WhenDataModule(ImageDataModule):
    def val_dataloader(self):
        loader = super().val_dataloader()
        if self.args.shared_generator:
            #: PyTorch's default. Each validation then draws one random number.
            loader.generator = None
        return loader


# %% When it validates
class Moments(L.Callback):
    def __init__(self):
        self.validated = []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_fit_end(self, trainer, module):
        print("Validated after batch", *self.validated)


# %% When it looks
#: EarlyStopping and ModelCheckpoint, in main.


# %% Training
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    L.seed_everything(args.seed, verbose=False)
    model = LitClassifier(DropoutNet(), args, F.nll_loss)
    folder = args.folder / "checkpoints"
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        min_epochs=args.min_epochs,
        max_steps=args.max_steps,
        val_check_interval=args.val_check_interval,
        check_val_every_n_epoch=args.check_val_every_n_epoch,
        num_sanity_val_steps=args.num_sanity_val_steps,
        overfit_batches=args.overfit_batches,
        fast_dev_run=args.fast_dev_run,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[
            #: A trap: 1 == 1.0. With an interval of one batch all three look once an
            #: epoch, as with one of an epoch. strict: else a run that ends before its
            #: first validation ends with an error.
            EarlyStopping("val_loss", patience=args.patience, strict=False),
            ModelCheckpoint(folder, "last", enable_version_counter=False),
            ModelCheckpoint(
                folder, "best", monitor="val_loss", enable_version_counter=False
            ),
            Moments(),
            TQDMProgressBar(args.refresh_rate),
        ],
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    datamodule = WhenDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
