"""The tutorial's CNN on CIFAR-10, trained by Lightning's Trainer.

Run it with `make lightning-cifar`. Its twin is plain/cifar.py, run with `make plain-cifar`.
`make diff-cifar` shows the two side by side, `make parity-cifar` proves that they do the same.
"""

# %% Imports
from common.data import eval_loader, load_data, train_loader
from common.runs import Run, command_line, fingerprints, print_epoch, read_metrics, start_folder

import time

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks, loggers
from torchmetrics import Accuracy, ConfusionMatrix, F1Score, MetricCollection
from torchsummary import summary

# %% Seed and device
#: In run: L.seed_everything; and the Trainer, which moves model and batches to its accelerator.


# %% Data
class ImageDataModule(L.LightningDataModule):
    def __init__(self, data, recipe, options):
        super().__init__()
        self.data, self.recipe, self.options = data, recipe, options

    def train_dataloader(self):
        return train_loader(self.data.train, self.recipe, self.options)

    def val_dataloader(self):
        return eval_loader(self.data.val, self.recipe, self.options)

    def test_dataloader(self):
        return eval_loader(self.data.test, self.recipe, self.options)


# %% Metrics
def make_metrics(stage):
    ten = dict(task="multiclass", num_classes=10)
    #: Say which average: Accuracy and F1Score take micro by default, MulticlassAccuracy macro.
    scores = {"accuracy": Accuracy(**ten, average="micro"), "f1": F1Score(**ten, average="macro")}
    return MetricCollection(scores, prefix=f"{stage}_")


# %% Loss, optimizer and evaluation
class LitClassifier(L.LightningModule):
    def __init__(self, model, recipe, log_every_n_steps):
        super().__init__()
        self.model, self.recipe, self.every, self.losses = model, recipe, log_every_n_steps, []
        #: Separate objects for each stage: shared ones would add up the counts of both.
        self.metrics = torch.nn.ModuleDict({s: make_metrics(s) for s in ("val", "test")})
        self.confusion = ConfusionMatrix(task="multiclass", num_classes=10)

    def configure_optimizers(self):
        if self.recipe.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.recipe.lr)
        return torch.optim.SGD(self.parameters(), lr=self.recipe.lr, momentum=self.recipe.momentum)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.detach())
        #: self.log takes time even where nothing is written: call it when the value is due.
        if len(self.losses) % self.every == 0:
            running = torch.stack(self.losses[-self.every :]).mean()
            self.log("train_loss", running, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx, stage="val"):
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        #: Averaged over the epoch and all processes; a batch_size without float is rounded down.
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        self.metrics[stage].update(logits, labels)
        #: The objects, not their values: then they are computed once, over all samples.
        self.log_dict(self.metrics[stage])
        if stage == "test":
            self.confusion.update(logits, labels)

    def on_validation_end(self):
        #: Before it trains, the Trainer tries out two validation batches. They are no epoch.
        if not self.trainer.sanity_checking:
            print_epoch(self.current_epoch, self.trainer.callback_metrics, "val_")

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx, stage="test")


# %% Fit
#: The Trainer calls set_epoch, train, zero_grad, backward, step, eval and no_grad by itself.
def make_trainer(recipe, options, folder, **more):
    return L.Trainer(
        max_epochs=recipe.max_epochs,
        max_steps=options.max_steps,
        limit_train_batches=options.limit_train_batches,
        limit_val_batches=options.limit_val_batches,
        limit_test_batches=options.limit_test_batches,
        #: Spelled out: left to itself, the Trainer takes every GPU, and a sampler of its own.
        accelerator=options.accelerator,
        devices=options.devices,
        use_distributed_sampler=False,
        deterministic="warn",
        logger=loggers.CSVLogger(folder.parent, folder.name, "", flush_logs_every_n_steps=1),
        log_every_n_steps=options.log_every_n_steps,
        callbacks=[callbacks.TQDMProgressBar(refresh_rate=options.refresh_rate)],
        enable_model_summary=False,
        enable_checkpointing=False,
        **more,
    )


# %% Run
def run(recipe, options):
    torch.set_num_threads(options.threads)
    data = load_data(recipe, options)
    #: Before the seed: torchsummary draws random numbers for the forward pass that it makes.
    summary(recipe.model(), tuple(data.train.images.shape[1:]), device="cpu")
    L.seed_everything(recipe.seed, verbose=False)
    net = recipe.model()
    start = fingerprints(net.state_dict())
    model = LitClassifier(net, recipe, options.log_every_n_steps)
    datamodule = ImageDataModule(data, recipe, options)
    trainer = make_trainer(recipe, options, start_folder(options, recipe.lesson, "lightning"))
    began = time.perf_counter()
    trainer.fit(model, datamodule)
    fitted = time.perf_counter()
    order = trainer.train_dataloader.sampler.handed_out
    losses = trainer.strategy.reduce(torch.stack(model.losses), reduce_op="mean").tolist()
    #: With the model given, test uses its weights as they are; without, those of a checkpoint.
    trainer.test(model, datamodule, verbose=False)
    seconds = (fitted - began, time.perf_counter() - fitted)
    val, (test,) = read_metrics(trainer.log_dir, "val"), read_metrics(trainer.log_dir, "test")
    confusion = model.confusion.compute()
    test["confusion"] = confusion.tolist()
    test["accuracy_per_class"] = (confusion.diag() / confusion.sum(1).clamp(min=1)).tolist()
    trained = (net, trainer.optimizers[0], trainer.strategy.root_device, seconds)
    return Run("lightning", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("cifar", run)


if __name__ == "__main__":
    main()
