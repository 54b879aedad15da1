"""What runs around the loop, by Lightning's callbacks and loggers.

Run it with `make lightning-callbacks`. Its twin is plain/callbacks.py (`make plain-callbacks`).
"""

# %% Imports
from common import figures
from common.runs import Run, command_line, config_of, report, start_folder

import os

import lightning as L
import torch
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier
from fashion import fit_and_test, prepare
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torchmetrics import Accuracy


# %% Loggers and pictures
def make_loggers(folder, kind):
    loggers = [CSVLogger(folder.parent, folder.name, version="", flush_logs_every_n_steps=1)]
    if kind == "tensorboard":
        loggers.append(TensorBoardLogger(folder, kind, version="", default_hp_metric=False))
    if kind == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        loggers.append(WandbLogger(project="callbacks", save_dir=folder, mode=mode))
    return loggers


class ImagePredictionLogger(L.Callback):
    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    #: The last hook before the Trainer goes back to train mode, and without gradients.
    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        epoch, step = trainer.current_epoch, trainer.global_step - 1
        pixels = figures.predictions(module.model, self.data, epoch, self.folder)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("predictions", pixels, step, dataformats="HWC")
            if isinstance(logger, WandbLogger):
                logger.log_image("predictions", [pixels], step)


# %% Early stopping and checkpoints
def make_callbacks(recipe, options, data, folder):
    #: After each validation. By default they look once more where --max-steps cuts an epoch short,
    #: at a val_loss that is one epoch old.
    after = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    stopping = EarlyStopping(
        "val_loss", recipe.min_delta, recipe.patience, check_on_train_epoch_end=False
    )
    #: Two, because save_last=True writes last.ckpt only when there is a new best one.
    best = ModelCheckpoint(folder / "checkpoints", "best", monitor="val_loss", **after)
    last = ModelCheckpoint(folder / "checkpoints", "last", **after)
    pictures, bar = ImagePredictionLogger(data, folder), TQDMProgressBar(options.refresh_rate)
    return [stopping, best, last, pictures, bar]


# %% Fit
def exact(loss):
    #: In float64, since the Trainer's mean adds up in the type that it gets, and what is decided
    #: by a loss must not depend on rounding. MPS has no float64.
    return loss if loss.device.type == "mps" else loss.double()


class LitCallbacks(LitClassifier):
    def __init__(self, model, recipe, settings):
        super().__init__(model, recipe, log_every_n_steps=0)
        #: Into every checkpoint and to every logger.
        self.save_hyperparameters(settings, ignore=["model", "recipe"])
        self.train_accuracy = Accuracy(task="multiclass", num_classes=10, average="micro")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        output = self.model(images)
        #: The network ends with log_softmax; cross_entropy is nll_loss of log_softmax.
        loss = F.nll_loss(output, labels)
        self.losses.append(loss.detach())
        self.train_accuracy(output, labels)
        #: Both at once: train_loss_step in every n-th step, train_loss_epoch at the epoch's end.
        both = dict(on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("train_loss", exact(loss), **both)
        self.log("train_accuracy", self.train_accuracy, **both)
        return loss

    def on_train_end(self):
        #: Now, since to test the best checkpoint sets the callbacks back to what they were then.
        reason = self.trainer.early_stopping_callback.stopping_reason
        self.reason = reason.name.lower().replace("_", " ")

    def validation_step(self, batch, batch_idx, stage="val"):
        images, labels = batch
        output = self.model(images)
        loss = exact(F.nll_loss(output, labels))
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        self.metrics[stage].update(output, labels)
        self.log_dict(self.metrics[stage])
        if stage == "test":
            self.confusion.update(output, labels)


def make_trainer(recipe, options, data, folder):
    return L.Trainer(
        max_epochs=recipe.max_epochs,
        max_steps=options.max_steps,
        limit_train_batches=options.limit_train_batches,
        limit_val_batches=options.limit_val_batches,
        limit_test_batches=options.limit_test_batches,
        accelerator=options.accelerator,
        devices=options.devices,
        use_distributed_sampler=False,
        deterministic="warn",
        logger=make_loggers(folder, recipe.logger),
        log_every_n_steps=options.log_every_n_steps,
        callbacks=make_callbacks(recipe, options, data, folder),
        enable_model_summary=False,
    )


# %% Run
def run(recipe, options):
    data, net, start = prepare(recipe, options)
    model = LitCallbacks(net, recipe, config_of(recipe, options, data))
    datamodule = ImageDataModule(data, recipe, options)
    trainer = make_trainer(recipe, options, data, start_folder(options, recipe.lesson, "lightning"))
    results = fit_and_test(trainer, model, datamodule, best=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    val, best = results[2], trainer.checkpoint_callback.best_model_path
    best = torch.load(best, weights_only=True)["epoch"] if best else None
    decisions = report(model.reason, val, best, recipe, options)
    return Run("lightning", recipe, options, data, start, *results, decisions)


# %% Command line
def main():
    command_line("callbacks", run)


if __name__ == "__main__":
    main()
