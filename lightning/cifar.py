"""The tutorial's CNN on CIFAR-10, trained by Lightning's Trainer.

Run it with `make lightning-cifar` or `.venv/bin/python lightning/cifar.py`. Its twin is
plain/cifar.py.
"""

# %% Imports
from common.data import Normalize, load_images, make_loader
from common.models import Net
from common.run import Options, run

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import Accuracy, F1Score, MetricCollection
from torchsummary import summary


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 1e-3  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 4  # images in one batch
    max_epochs: int = 2  # passes over the training set
    log_every_n_steps: int = 2000  # steps from one logged training loss to the next


# %% Seed and device
#: In main: L.seed_everything. The Trainer moves model and batches to its accelerator.


# %% Data
class ImageDataModule(L.LightningDataModule):
    def __init__(self, data, args):
        super().__init__()
        self.data, self.args = data, args

    def train_dataloader(self):
        return make_loader(self.data.train, self.args)

    def val_dataloader(self):
        return make_loader(self.data.val, self.args)

    def test_dataloader(self):
        return make_loader(self.data.test, self.args)


# %% Training and evaluation
class LitClassifier(L.LightningModule):
    def __init__(self, model, args, loss_function=F.cross_entropy):
        super().__init__()
        #: Into self.hparams, and into every checkpoint.
        self.save_hyperparameters(args.settings())
        self.model, self.loss_function = model, loss_function
        #: An object for each stage: a shared one would add up the counts of both.
        self.val_metrics = make_metrics("val_")
        self.test_metrics = make_metrics("test_")

    def configure_optimizers(self):
        lr, momentum = self.hparams.lr, self.hparams.momentum
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    #: The Trainer clears the gradients, calls backward and steps. It moves the batch.
    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss_function(self.model(images), labels)
        #: Written in every log_every_n_steps-th step; the call takes its time in each.
        self.log("train_loss", loss, prog_bar=True)
        return loss

    #: The Trainer calls eval() and switches gradients off. Afterwards it gives each
    #: part of the module back the mode that it had before; it never calls train().
    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test", self.test_metrics)

    def evaluate(self, batch, stage, metrics):
        images, labels = batch
        logits = self.model(images)
        loss = self.loss_function(logits, labels)
        #: The Trainer's mean over the epoch, each batch by its size, adds up in the
        #: type that it gets: float64, as the loop by hand. MPS has no float64.
        if loss.device.type != "mps":
            loss = loss.double()
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        metrics.update(logits, labels)
        #: The object, not its values: then they are computed once, over all samples.
        self.log_dict(metrics)


def make_metrics(prefix):
    ten = dict(task="multiclass", num_classes=10)
    #: Say which average: Accuracy takes micro, MulticlassAccuracy macro by default.
    accuracy, f1 = Accuracy(**ten, average="micro"), F1Score(**ten, average="macro")
    return MetricCollection({"accuracy": accuracy, "f1": f1}, prefix=prefix)


# %% Run
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    #: Before the seed: torchsummary makes a forward pass of random numbers.
    summary(Net(), (3, 32, 32), device="cpu")
    L.seed_everything(args.seed, verbose=False)
    model = LitClassifier(Net(), args)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[TQDMProgressBar(args.refresh_rate)],
        #: Left to itself, the Trainer would replace the sampler by one of its own.
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
