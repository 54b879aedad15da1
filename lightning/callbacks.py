"""What runs around the loop, by Lightning's callbacks and loggers.

Run it with `make lightning-callbacks`. Its twin is plain/callbacks.py.
"""

# %% Imports
from common import figures
from common.data import Normalize, load_images
from common.models import DeepNet
from common.run import Options, run

from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torchmetrics import Accuracy


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
def make_loggers(args):
    loggers = [CSVLogger(args.folder.parent, args.folder.name, version="")]
    if args.logger == "tensorboard":
        folder = dict(name="tensorboard", version="")
        loggers.append(
            TensorBoardLogger(args.folder, **folder, default_hp_metric=False)
        )
    if args.logger == "wandb":
        loggers.append(WandbLogger(project="callbacks", save_dir=args.folder))
    return loggers


class ImagePredictionLogger(L.Callback):
    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    #: The last hook before the Trainer goes back to train mode, and without gradients.
    def on_validation_end(self, trainer, module):
        #: Before it trains, the Trainer tries out two validation batches.
        if trainer.sanity_checking:
            return
        epoch, step = trainer.current_epoch, trainer.global_step - 1
        pixels = figures.predictions(module.model, self.data, epoch, self.folder)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                writer.add_image("predictions", pixels, step, dataformats="HWC")
            if isinstance(logger, WandbLogger):
                logger.log_image("predictions", [pixels], step)


# %% Early stopping
#: EarlyStopping, in main.


# %% Checkpoints
#: ModelCheckpoint, in main. It saves weights, optimizers, callbacks, loops and
#: hyperparameters.


# %% Training
class LitCallbacks(LitClassifier):
    def __init__(self, model, args):
        #: The network ends with log_softmax; cross_entropy is nll_loss of log_softmax.
        super().__init__(model, args, F.nll_loss)
        self.train_accuracy = Accuracy(
            task="multiclass", num_classes=10, average="micro"
        )

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), lr=self.hparams.lr)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        output = self.model(images)
        loss = self.loss_function(output, labels)
        self.train_accuracy(output, labels)
        #: Both at once: train_loss_step in every n-th step, and train_loss_epoch, the
        #: mean over the epoch, at its end.
        both = dict(on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("train_loss", loss, **both)
        self.log("train_accuracy", self.train_accuracy, **both)
        return loss


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    L.seed_everything(args.seed, verbose=False)
    model = LitCallbacks(DeepNet(), args)
    folder = args.folder / "checkpoints"
    #: After each validation. By default it is at the end of the training epoch.
    after = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        logger=make_loggers(args),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[
            EarlyStopping("val_loss", args.min_delta, args.patience),
            ModelCheckpoint(folder, "best", monitor="val_loss", **after),
            #: Its own: save_last=True writes last.ckpt only where another one is saved.
            ModelCheckpoint(folder, "last", **after),
            ImagePredictionLogger(data, args.folder),
            TQDMProgressBar(args.refresh_rate),
        ],
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    #: The best weights are tested, not the last ones.
    best = folder / "best.ckpt"
    trainer.test(model, datamodule, ckpt_path=best, verbose=False)
    if args.logger == "wandb":
        trainer.loggers[-1].experiment.finish()
    return model.model


if __name__ == "__main__":
    run(main, Args)
