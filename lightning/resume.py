"""Stop anywhere, carry on, reach the same bits: what the Trainer saves, and what it leaves out.

Run it with `make lightning-resume`. Its twin is plain/resume.py (`make plain-resume`).
"""

# %% Imports
from common import checkpoints, resume
from common.options import count_batches
from common.runs import Run, command_line, config_of, read_rows, report

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from callbacks import LitCallbacks
from cifar import ImageDataModule, make_trainer
from fashion import fit_and_test, prepare
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.optim.lr_scheduler import CosineAnnealingLR


# %% Save and load
class SafeIO(TorchCheckpointIO):
    #: The Trainer's own renames a temporary file, too, but does not sync it, and checks nothing.
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        resume.save(Path(path), checkpoint)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        #: A checkpoint of the plain side has no version of Lightning's.
        return {"pytorch-lightning_version": L.__version__} | checkpoints.read(Path(path))


class LitResume(LitCallbacks):
    def __init__(self, model, recipe, settings, batches, stop):
        super().__init__(model, recipe, settings)
        self.batches, self.stop = batches, stop

    def on_save_checkpoint(self, checkpoint):
        trainer, step, size = self.trainer, len(self.losses), self.recipe.batch_size
        reason = trainer.early_stopping_callback.stopping_reason.name.lower().replace("_", " ")
        run = checkpoint["run"] = resume.made_with() | {"reason": reason}
        run |= {"rows": read_rows(trainer.log_dir), "losses": torch.stack(self.losses).cpu()}
        #: The generators that dropout draws from, and the place in the shuffled order.
        run["random"] = resume.random_states()
        order = trainer.train_dataloader.sampler.handed_out
        run["order"] = resume.trained_on(order, step, self.batches, size)

    def on_load_checkpoint(self, checkpoint):
        trainer, run = self.trainer, checkpoint["run"]
        #: What the Trainer would restore, where the plain side wrote it, or the folder has moved.
        resume.fill_in(checkpoint, trainer, self.batches)
        if not trainer.training:
            return  # it is loaded to be tested
        self.losses = list(run["losses"].to(trainer.strategy.root_device))
        self.reason = run["reason"]
        #: The Trainer would go on after early stopping.
        trainer.should_stop = self.reason != "not stopped"
        trainer.datamodule.done = {epoch: order.tolist() for epoch, order in run["order"].items()}
        #: The logger begins a new file. Rows after the checkpoint will be written again.
        for row in run["rows"]:
            self.logger.log_metrics({k: v for k, v in row.items() if k != "step"}, row["step"])
        #: Last, since anything before might draw a random number.
        resume.set_random_states(run["random"])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = CosineAnnealingLR(optimizer, self.recipe.max_epochs * self.batches)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.nll_loss(self.model(images), labels)
        self.losses.append(loss.detach())
        every = self.trainer.log_every_n_steps
        if len(self.losses) % every == 0:
            running = torch.stack(self.losses[-every:]).mean().item()
            #: Not self.log, whose values are written when the step's checkpoint is saved already:
            #: whoever carries on from there would lack this row.
            row = {"epoch": self.current_epoch, "train_loss": running}
            self.logger.log_metrics(row, self.global_step)
        return loss

    def on_validation_start(self):
        #: Again: the Trainer has a handler of its own for SIGTERM, and then ends with status 0.
        self.stop.listen()

    on_train_start = on_test_start = on_validation_start

    def on_train_batch_end(self, outputs, batch, batch_idx):
        trainer, step = self.trainer, self.global_step
        if step % self.batches and (self.stop.asked or step == trainer.max_steps):
            trainer.save_checkpoint(f"{trainer.log_dir}/checkpoints/step_{step:08d}.ckpt")
            self.stop.end_if_asked(step)

    def on_validation_end(self):
        super().on_validation_end()
        if not self.trainer.sanity_checking:
            self.stop.end_if_asked(self.global_step)


# %% Fit
class ResumableData(ImageDataModule):
    done = None

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.sampler.carry_on(self.done or {})
        return loader


def make_callbacks(recipe, folder):
    after = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    best = ModelCheckpoint(folder, "best", monitor="val_loss", **after)
    #: After each epoch's validation; and within the epoch. Why monitor a step? At an epoch's end
    #: it makes `steps` wait for the validation, which whoever carries on would skip otherwise.
    after |= dict(monitor="step", mode="max", save_top_k=-1, auto_insert_metric_name=False)
    epochs = ModelCheckpoint(folder, "step_{step:08d}", **after)
    every = dict(every_n_train_steps=recipe.checkpoint_every_n_steps)
    steps = ModelCheckpoint(folder, "step_{step:08d}", **after, **every)
    stopping = EarlyStopping("val_loss", patience=recipe.patience, check_on_train_epoch_end=False)
    return [stopping, best, epochs, steps]


# %% Run
def run(recipe, options):
    data, net, start = prepare(recipe, options)
    settings = config_of(recipe, options, data)
    folder, path = resume.begin(recipe, options, "lightning", settings)
    datamodule = ResumableData(data, recipe, options)
    batches = count_batches(len(datamodule.train_dataloader()), options.limit_train_batches)
    with resume.Stop(recipe.max_time).listening() as stop:
        model = LitResume(net, recipe, settings, batches, stop)
        more = dict(precision=recipe.precision, plugins=[SafeIO()])
        trainer = make_trainer(recipe, options, folder, **more)
        trainer.callbacks += make_callbacks(recipe, folder / "checkpoints")
        results = fit_and_test(trainer, model, datamodule, best=True, ckpt_path=path)
    best = resume.best_epoch(folder, results[2])
    decisions = report(model.reason, results[2], best, recipe, options)
    return Run("lightning", recipe, options, data, start, *results, decisions)


# %% Command line
def main():
    command_line("resume", run)


if __name__ == "__main__":
    main()
