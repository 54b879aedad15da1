"""The quickstart's MLP on FashionMNIST: a LightningModule and trainer.fit.

Run it with `make lightning-fashion` or `python lightning/fashion.py`. Its twin is
plain/fashion.py. docs/fashion.md walks from that file to this one in five moves.
"""

# %% Imports
from common.data import load_images
from common.models import MLP
from common.run import Options, run

from dataclasses import dataclass, replace

import lightning as L
import torch
import torch.nn.functional as F
from cifar import ImageDataModule, make_metrics
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torchsummary import summary


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 1e-3  # learning rate
    batch_size: int = 64  # images in one batch
    max_epochs: int = 5  # passes over the training set
    one_hot: bool = False  # train on one-hot targets, made by a target_transform
    log_every_n_steps: int = 100  # steps from one logged training loss to the next


# %% Data
def to_one_hot(labels):
    #: cross_entropy takes class numbers or probabilities. Probabilities must be floats.
    return F.one_hot(labels, 10).float()


#: Move 4, the data module: ImageDataModule, as in cifar.


# %% Train loop and test loop
#: Move 1, the module: it gets the model as it is, and changes nothing in it.
class LitMLP(L.LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr
        self.val_metrics = make_metrics("val_")
        self.test_metrics = make_metrics("test_")

    #: Move 2, the training step: what is left of train_loop. The Trainer does the rest.
    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets)
        #: Called in every step, written in every log_every_n_steps-th.
        self.log("train_loss", loss, prog_bar=True)
        return loss

    #: The test loop, without its loop. The Trainer calls it in eval mode, without
    #: gradients.
    def validation_step(self, batch, batch_idx):
        self.test_batch(batch, "val", self.val_metrics)

    def test_step(self, batch, batch_idx):
        self.test_batch(batch, "test", self.test_metrics)

    def test_batch(self, batch, stage, metrics):
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        #: Weighted by batch_size: the Trainer is right where the tutorial is wrong.
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        metrics.update(logits, labels)
        self.log_dict(metrics)

    #: Move 3, the optimizer: the module makes it, the Trainer steps it.
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


# %% Run
def main(args):
    data = load_images("fashionmnist", args)
    if args.one_hot:
        #: Only the targets to train on: accuracy is counted with class numbers.
        one_hot = replace(data.train, target_transform=to_one_hot)
        data = data._replace(train=one_hot)
    summary(MLP(), (1, 28, 28), device="cpu")
    L.seed_everything(args.seed, verbose=False)
    model = LitMLP(MLP(), args.lr)
    #: Move 5, the Trainer: it holds the loop.
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
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
    return model.model


if __name__ == "__main__":
    run(main, Args)
