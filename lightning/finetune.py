"""A network that others trained, with a new last layer: frozen first, then trained with care.

Run it with `make lightning-finetune`. Its twin is plain/finetune.py (`make plain-finetune`).
"""

# %% Imports
from common import checkpoints
from common.data import load_data
from common.pretrained import load_pretrained
from common.runs import Run, command_line, config_of, fingerprints, start_folder

from pathlib import Path

import lightning as L
import torch
from cifar import ImageDataModule, make_trainer
from fashion import LitMLP, fit_and_test
from lightning.pytorch.callbacks import BaseFinetuning


# %% Pretrained weights
def make_network(recipe):
    net = recipe.model(recipe.backbone)
    if recipe.start_from:
        weights = load(net, Path(recipe.start_from))
    else:
        weights = load_pretrained(net, recipe.backbone, recipe.weights)
    print(
        f"{recipe.backbone} with weights {weights}: {sum(p.numel() for p in net.parameters()):,} "
        f"parameters, {sum(p.numel() for p in net.head.parameters()):,} of them in the new layer."
    )
    return net, {"backbone": recipe.backbone, "weights at the start": weights}


# %% Save and load
def save(path, trainer):
    #: Everything in one call. The state_dict's names begin with "model.", since it is that of the
    #: LightningModule; LitFinetune.load_from_checkpoint(path, model=..., recipe=...) reads it back.
    trainer.save_checkpoint(path)


def load(net, path):
    #: Into the network itself, which has the same names on both sides: checkpoints.load takes the
    #: "model." off, and refuses the file unless every key finds its place.
    checkpoints.load(net, path)
    return f"of {path}"


# %% Freeze and unfreeze
class Unfreeze(BaseFinetuning):
    def __init__(self, epoch, lr):
        super().__init__()
        self.epoch, self.lr = epoch, lr

    def freeze_before_training(self, module):
        self.freeze(module.model.backbone, train_bn=False)

    def finetune_function(self, module, epoch, optimizer):
        if epoch < self.epoch:
            #: freeze leaves the modules in train mode: dropout would drop, and BatchNorm would
            #: take the batch's own averages. The Trainer keeps the modes that it finds.
            module.model.backbone.eval()
        if epoch == self.epoch:
            module.model.backbone.train()
            self.unfreeze_and_add_param_group(module.model.backbone, optimizer, self.lr)


# %% Fit
#: The module of fashion serves any network. load_from_checkpoint makes one without settings.
class LitFinetune(LitMLP):
    def __init__(self, model, recipe, settings=None):
        super().__init__(model, recipe)
        self.save_hyperparameters(settings, ignore=["model", "recipe"])

    def configure_optimizers(self):
        #: The head alone: the backbone comes later, as a group with its own learning rate.
        head = self.model.head.parameters()
        if self.recipe.optimizer == "adam":
            return torch.optim.Adam(head, lr=self.recipe.lr)
        return torch.optim.SGD(head, lr=self.recipe.lr, momentum=self.recipe.momentum)


# %% Run
def run(recipe, options):
    torch.set_num_threads(options.threads)
    data = load_data(recipe, options)
    L.seed_everything(recipe.seed, verbose=False)
    net, decisions = make_network(recipe)
    start = fingerprints(net.state_dict())
    model = LitFinetune(net, recipe, config_of(recipe, options, data))
    folder = start_folder(options, recipe.lesson, "lightning")
    trainer = make_trainer(recipe, options, folder)
    trainer.callbacks.append(Unfreeze(recipe.unfreeze_at_epoch, recipe.lr / 10))
    results = fit_and_test(trainer, model, ImageDataModule(data, recipe, options))
    save(folder / "checkpoints" / "last.ckpt", trainer)
    return Run("lightning", recipe, options, data, start, *results, decisions)


# %% Command line
def main():
    command_line("finetune", run)


if __name__ == "__main__":
    main()
