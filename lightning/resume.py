"""Stop anywhere, resume, reach the same bits: what the Trainer saves, and leaves out.

Run it with `make lightning-resume`, stop or kill it, and resume with
ARGS="--ckpt-path last". Its twin is plain/resume.py.
"""

# %% Imports
from common import checkpoints, resume
from common.data import Normalize, load_images, make_loaders
from common.models import DropoutNet
from common.run import Options, run

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch.nn.functional as F
from cifar import LitClassifier
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.optim.lr_scheduler import CosineAnnealingLR


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
class SafeIO(TorchCheckpointIO):
    #: The Trainer's own writer does not sync, and may use another disk's folder.
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        checkpoints.save(Path(path), checkpoint)


class LitResume(LitClassifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    #: The Trainer saves weights, optimizers, schedules, scaler, callbacks and its own
    #: counters. It leaves out the generators that dropout draws from.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = resume.random_states()

    def on_load_checkpoint(self, checkpoint):
        if self.trainer.training:  # not where it is loaded to be tested
            resume.set_random_states(checkpoint["random"])
        #: ModelCheckpoint forgets what was best where its folder has another path now.
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:
                state["dirpath"] = self.trainer.checkpoint_callback.dirpath

    def on_train_epoch_end(self):
        #: Resumed after early stopping, the Trainer would go on.
        stopping = self.trainer.early_stopping_callback
        self.trainer.should_stop = stopping.stopping_reason.value > 0


def skip_done(model, path, loader, batch_size):
    #: The Trainer resumes within the epoch, and the loader begins at its start: the
    #: images of this epoch that were trained on already are left out here. The weights
    #: are loaded to refuse what does not fit; the Trainer loads them again.
    step = checkpoints.load(model, path)["global_step"]
    epoch, done = divmod(step, len(loader))
    loader.sampler.skip(epoch, done * batch_size)


# %% Training
#: A Checkpoint, since the Trainer calls these last: when all others have saved.
class EndWhenAsked(L.pytorch.callbacks.Checkpoint):
    def __init__(self, stop, folder):
        self.stop, self.folder = stop, folder

    def on_train_start(self, trainer, module):
        #: Again: the Trainer has its own handler for SIGTERM, and ends with status 0.
        self.stop.listen()

    on_validation_start = on_train_start

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.stop.asked and batch_idx + 1 < trainer.num_training_batches:
            step = trainer.global_step
            trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt")
            self.stop.end_if_asked(step)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.stop.end_if_asked(trainer.global_step)


def make_callbacks(args, folder, stop):
    then = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    best = ModelCheckpoint(folder, "best", monitor="val_loss", **then)
    #: After each validation, and within the epoch. Why monitor a step? The last three
    #: are kept, and at an epoch's end `steps` waits for the validation.
    then |= dict(monitor="step", mode="max", save_top_k=3)
    then |= dict(filename="step_{step:08d}", auto_insert_metric_name=False)
    epochs = ModelCheckpoint(folder, **then)
    every = dict(every_n_train_steps=args.checkpoint_every_n_steps)
    steps = ModelCheckpoint(folder, **then, **every)
    early = EarlyStopping("val_loss", 0, args.patience, check_on_train_epoch_end=False)
    bar = TQDMProgressBar(args.refresh_rate)
    return [early, best, epochs, steps, EndWhenAsked(stop, folder), bar]


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    L.seed_everything(args.seed, verbose=False)
    model, path = LitResume(DropoutNet(), args, F.nll_loss), args.ckpt_path
    if path:
        skip_done(model.model, path, train_loader, args.batch_size)
    folder = args.folder / "checkpoints"
    #: Each row at once: a run that is killed keeps them.
    csv = dict(version="", flush_logs_every_n_steps=1)
    #: Ctrl-C and SIGTERM strike anywhere. They are noted, and a callback asks for them.
    with resume.Stop(args.max_time).listening() as stop:
        trainer = L.Trainer(
            max_epochs=args.max_epochs,
            accelerator=args.accelerator,
            devices=args.devices,
            deterministic="warn",
            precision=args.precision,
            plugins=[SafeIO()],
            callbacks=make_callbacks(args, folder, stop),
            logger=CSVLogger(args.folder.parent, args.folder.name, **csv),
            log_every_n_steps=args.log_every_n_steps,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
        trainer.fit(model, train_loader, val_loader, ckpt_path=path)
    trainer.test(model, test_loader, ckpt_path=folder / "best.ckpt", verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
