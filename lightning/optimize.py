"""What stands around the optimizer's step, by the Trainer's flags.

Run it with `make lightning-optimize`. Its twin is plain/optimize.py (`make plain-optimize`).
"""

# %% Imports
from common.optimizers import diverged, group_weight, make_optimizer, make_scheduler
from common.options import count_batches
from common.runs import Run, command_line, config_of, start_folder

import math
from pathlib import Path

import lightning as L
import torch.nn.functional as F
from callbacks import exact
from cifar import ImageDataModule, LitClassifier
from fashion import fit_and_test, prepare
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.nn.utils import get_total_norm


# %% Clipping
#: By the Trainer: gradient_clip_val and gradient_clip_algorithm, in make_trainer.
def grad_norm(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


# %% Moving average of the weights
#: EMAWeightAveraging, in make_trainer: it swaps the weights for each validation, and back.


# %% Step
class LitOptimize(LitClassifier):
    def __init__(self, model, recipe, settings, images, batches):
        super().__init__(model, recipe, log_every_n_steps=0)
        self.save_hyperparameters(settings, ignore=["model", "recipe"])
        self.images = min(batches * recipe.batch_size, images)
        self.steps = recipe.max_epochs * math.ceil(batches / recipe.accumulate_grad_batches)

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model, self.recipe)
        scheduler = make_scheduler(optimizer, self.recipe, self.steps)
        if scheduler is None:
            return optimizer
        interval = "step" if self.recipe.moves_on == "step" else "epoch"
        #: The interval belongs in here. Beside lr_scheduler it would be ignored, and be an epoch.
        schedule = {"scheduler": scheduler, "interval": interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    #: Under autocast. What comes after it is the Trainer's: the loss is divided by
    #: accumulate_grad_batches and scaled, gradients are cleared where a group begins, backward.
    def training_step(self, batch, batch_idx):
        images, labels = batch
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=smoothing)
        if not loss.isfinite():
            raise self.diverged("loss of", self.global_step + 1, loss)
        self.losses.append(loss.detach())
        if self.due():
            self.log("train_loss", loss)
        return loss * group_weight(batch_idx, len(labels), self.images, self.recipe)

    def diverged(self, what, step, loss):
        return diverged(what, step, loss.item(), Path(self.trainer.log_dir))

    def due(self):
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    #: Gradients are scaled down again, and not yet clipped.
    def on_before_optimizer_step(self, optimizer):
        if self.due():
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self.log("train_lr", optimizer.param_groups[0]["lr"])
            self.log("train_grad_norm", grad_norm(optimizer))
            self.log("train_loss_scale", scaler.get_scale() if scaler else 1.0)

    #: Only to log: without this method the Trainer clips all the same.
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.due():
            self.log("train_grad_norm_clipped", grad_norm(optimizer))

    def validation_step(self, batch, batch_idx, stage="val"):
        images, labels = batch
        logits = self.model(images)
        loss = exact(F.cross_entropy(logits, labels))
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        self.metrics[stage].update(logits, labels)
        self.log_dict(self.metrics[stage])
        if stage == "test":
            self.confusion.update(logits, labels)

    #: Before the checkpoint is written, which shall be the last good one.
    def on_validation_epoch_end(self):
        loss = self.trainer.callback_metrics["val_loss"]
        if not self.trainer.sanity_checking and not loss.isfinite():
            raise self.diverged("validation loss after", self.global_step, loss)


# %% Fit
def make_trainer(recipe, options, folder):
    last = dict(save_on_train_epoch_end=False, enable_version_counter=False)
    callbacks = [TQDMProgressBar(options.refresh_rate)]
    callbacks.append(ModelCheckpoint(folder / "checkpoints", "last", **last))
    if recipe.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=recipe.ema_decay))
    return L.Trainer(
        precision=recipe.precision,
        accumulate_grad_batches=recipe.accumulate_grad_batches,
        gradient_clip_val=recipe.gradient_clip_val,
        gradient_clip_algorithm=recipe.gradient_clip_algorithm,
        callbacks=callbacks,
        max_epochs=recipe.max_epochs,
        max_steps=options.max_steps,
        limit_train_batches=options.limit_train_batches,
        limit_val_batches=options.limit_val_batches,
        limit_test_batches=options.limit_test_batches,
        accelerator=options.accelerator,
        devices=options.devices,
        use_distributed_sampler=False,
        deterministic="warn",
        logger=CSVLogger(folder.parent, folder.name, version="", flush_logs_every_n_steps=1),
        log_every_n_steps=options.log_every_n_steps,
        enable_model_summary=False,
    )


# %% Run
def run(recipe, options):
    data, net, start = prepare(recipe, options)
    settings, datamodule = config_of(recipe, options, data), ImageDataModule(data, recipe, options)
    batches = count_batches(len(datamodule.train_dataloader()), options.limit_train_batches)
    model = LitOptimize(net, recipe, settings, len(data.train), batches)
    trainer = make_trainer(recipe, options, start_folder(options, recipe.lesson, "lightning"))
    results = fit_and_test(trainer, model, datamodule)
    decisions = {"optimizer steps": trainer.global_step}
    return Run("lightning", recipe, options, data, start, *results, decisions)


# %% Command line
def main():
    command_line("optimize", run)


if __name__ == "__main__":
    main()
