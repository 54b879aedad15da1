"""The tutorial's CNN once more: as good as in `cifar`, in a tenth of the processor's time.

Run it with `make lightning-speed`. Its twin is plain/speed.py, run with `make plain-speed`.
docs/speed.md has what each of the means gave, measured.
"""

# %% Imports
from common.batches import DeviceBatches
from common.models import NETWORKS, Averaged
from common.optimizers import Muon, up_and_down
from common.options import count_batches
from common.runs import Run, command_line, fingerprints, start_folder

from dataclasses import replace

import torch
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier, make_trainer
from fashion import fit_and_test, prepare


# %% Data
class FastDataModule(ImageDataModule):
    #: No DataLoader: the Trainer takes any iterable with a length, and calls set_epoch of its
    #: `sampler`. All images lie on the device already, so it has nothing to move.
    def train_dataloader(self):
        recipe, device = self.recipe, self.trainer.strategy.root_device
        return DeviceBatches(
            self.data.train, recipe.batch_size, recipe.seed, device, flip=recipe.flip,
            translate=recipe.translate, memory_format=memory_format(recipe),
        )  # fmt: skip


# %% Network
def memory_format(recipe):
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


#: What the first layer sees settles first. Its backward pass is the most expensive of all: it
#: works on the largest images, and without it nothing has to go back that far.
def freeze_first_layer(net):
    for parameter in list(net.parameters())[:2]:
        parameter.requires_grad_(False)


def make_fast(net, recipe):
    net.to(memory_format=memory_format(recipe))
    #: Compiling takes longer than many a training: it pays for long ones, and on GPUs.
    if recipe.compile:
        net.compile()
    return net


# %% Optimizer and schedule
class LitFast(LitClassifier):
    def __init__(self, model, recipe, options, batches):
        super().__init__(model, recipe, options.log_every_n_steps)
        self.steps = recipe.max_epochs * count_batches(batches, options.limit_train_batches)

    def configure_optimizers(self):
        net, recipe = self.model, self.recipe
        usual = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
        if recipe.optimizer == "muon":
            optimizer = Muon(net, momentum=recipe.momentum, **usual)
        elif recipe.optimizer == "adam":
            optimizer = torch.optim.AdamW(net.parameters(), fused=True, **usual)
        else:
            sgd = dict(momentum=recipe.momentum, nesterov=True, fused=True)
            optimizer = torch.optim.SGD(net.parameters(), **sgd, **usual)
        #: Up in the first tenth of the steps, then down to 0. It has to know how many there are.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, up_and_down(self.steps))
        #: Without the interval it would move once an epoch, and stay near its beginning.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == int(self.recipe.freeze_at * self.steps):
            freeze_first_layer(self.model)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.losses.append(loss.detach())
        if len(self.losses) % self.every == 0:
            self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        net = self.model
        self.model = Averaged(net) if self.recipe.tta else net
        super().test_step(batch, batch_idx)
        self.model = net


# %% Fit
#: make_trainer of cifar; autocast is its `precision`.


# %% Run
def run(recipe, options):
    if recipe.network in NETWORKS:
        recipe = replace(recipe, model=NETWORKS[recipe.network])
    data, net, start = prepare(recipe, options)
    if recipe.network == "airbench":
        #: Its first layer is computed from the images, and not trained.
        some = range(min(5000, len(data.train)))
        net.whiten(data.train.__getitems__(some)[0])
        start = fingerprints(net.state_dict())
    batches = -(-len(data.train) // recipe.batch_size)
    model = LitFast(make_fast(net, recipe), recipe, options, batches)
    folder = start_folder(options, recipe.lesson, "lightning")
    trainer = make_trainer(recipe, options, folder, precision=recipe.precision)
    results = fit_and_test(trainer, model, FastDataModule(data, recipe, options))
    return Run("lightning", recipe, options, data, start, *results)


# %% Command line
def main():
    command_line("speed", run)


if __name__ == "__main__":
    main()
