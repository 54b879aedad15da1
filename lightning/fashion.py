"""The quickstart's MLP on FashionMNIST: a LightningModule and trainer.fit.

Run it with `make lightning-fashion`. Its twin is plain/fashion.py (`make plain-fashion`).
docs/fashion.md walks from that file to this one in five moves.
"""

# %% Imports
from common.data import load_data
from common.runs import Run, command_line, fingerprints, print_epoch, read_metrics, start_folder

import time
from dataclasses import replace

import lightning as L
import torch
import torch.nn.functional as F
from cifar import ImageDataModule, make_metrics, make_trainer
from torchmetrics import ConfusionMatrix
from torchsummary import summary


# %% Data
def one_hot(labels):
    #: cross_entropy takes class numbers or probabilities, and probabilities must be floats.
    return F.one_hot(labels, 10).float()


#: Move 4, the data module: ImageDataModule, as in cifar.


# %% Train loop and test loop
#: Move 1, the module: it receives the model as it is, and changes nothing in it.
class LitMLP(L.LightningModule):
    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe, self.losses = model, recipe, []
        self.metrics = torch.nn.ModuleDict({s: make_metrics(s) for s in ("val", "test")})
        self.confusion = ConfusionMatrix(task="multiclass", num_classes=10)

    #: Move 2, the training step: what is left of train_loop. The rest is the Trainer's.
    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = F.cross_entropy(self.model(images), targets)
        self.losses.append(loss.detach())
        #: Called in every step, written in every log_every_n_steps-th: the usual form.
        self.log("train_loss", loss, prog_bar=True)
        return loss

    #: The test loop, without its loop. The Trainer calls it in eval mode, without gradients.
    def validation_step(self, batch, batch_idx, stage="val"):
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        #: Weighted by batch_size: here the Trainer is right where the tutorial is wrong.
        self.log(f"{stage}_loss", loss, batch_size=float(len(labels)), sync_dist=True)
        self.metrics[stage].update(logits, labels)
        self.log_dict(self.metrics[stage])
        if stage == "test":
            self.confusion.update(logits, labels)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx, stage="test")

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            print_epoch(self.current_epoch, self.trainer.callback_metrics, "val_")

    #: Move 3, the optimizer: the module makes it, the Trainer steps it.
    def configure_optimizers(self):
        if self.recipe.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.recipe.lr)
        return torch.optim.SGD(self.parameters(), lr=self.recipe.lr, momentum=self.recipe.momentum)


# %% Fit
#: Move 5, the Trainer: make_trainer, as in cifar, and trainer.fit in run.


# %% Run
#: What cifar has at the head and at the end of its run; the next lessons import it from here.
def prepare(recipe, options):
    torch.set_num_threads(options.threads)
    data = load_data(recipe, options)
    summary(recipe.model(), tuple(data.train.images.shape[1:]), device="cpu")
    L.seed_everything(recipe.seed, verbose=False)
    net = recipe.model()
    return data, net, fingerprints(net.state_dict())


def fit_and_test(trainer, model, datamodule, best=False, ckpt_path=None):
    began = time.perf_counter()
    trainer.fit(model, datamodule, ckpt_path=ckpt_path)
    fitted = time.perf_counter()
    order = trainer.train_dataloader.sampler.handed_out
    losses = trainer.strategy.reduce(torch.stack(model.losses), reduce_op="mean").tolist()
    #: Which weights are tested: the best checkpoint's, or the last ones. Say it, as here.
    path = trainer.checkpoint_callback.best_model_path if best else None
    trainer.test(model, datamodule, ckpt_path=path or None, verbose=False)
    seconds = (fitted - began, time.perf_counter() - fitted)
    #: Of several processes, the first one has written what all read now.
    trainer.strategy.barrier()
    val, (test,) = read_metrics(trainer.log_dir, "val"), read_metrics(trainer.log_dir, "test")
    confusion = model.confusion.compute()
    test["confusion"] = confusion.tolist()
    test["accuracy_per_class"] = (confusion.diag() / confusion.sum(1).clamp(min=1)).tolist()
    trained = (model.model, trainer.optimizers[0], trainer.strategy.root_device, seconds)
    return order, losses, val, test, *trained


def run(recipe, options):
    data, net, start = prepare(recipe, options)
    if recipe.one_hot:
        #: For training alone: accuracy is counted with class numbers.
        data = replace(data, train=replace(data.train, target_transform=one_hot))
    model = LitMLP(net, recipe)
    datamodule = ImageDataModule(data, recipe, options)
    trainer = make_trainer(recipe, options, start_folder(options, recipe.lesson, "lightning"))
    results = fit_and_test(trainer, model, datamodule)
    return Run("lightning", recipe, options, data, start, *results)


# %% Command line
def main():
    command_line("fashion", run)


if __name__ == "__main__":
    main()
