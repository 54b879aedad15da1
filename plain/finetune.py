"""A network that others trained, with a new last layer: frozen first, then trained with care.

Run it with `make plain-finetune`. Its twin is lightning/finetune.py (`make lightning-finetune`).
"""

# %% Imports
from common import checkpoints
from common.data import eval_loader, load_data, train_loader
from common.options import count_batches
from common.pretrained import load_pretrained
from common.runs import (
    MetricsFile,
    Run,
    command_line,
    config_of,
    fingerprints,
    print_epoch,
    start_folder,
)

import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import choose_device, configure_optimizers, evaluate, seed_everything
from tqdm import tqdm


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
def save(path, net, optimizer, epoch, step, settings):
    #: Weights by name, and plain values. Not torch.save(net): that stores the object, loading it
    #: means to run code, and since PyTorch 2.6 torch.load refuses to unless told otherwise.
    content = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    content |= {"epoch": epoch, "global_step": step, "hyper_parameters": settings}
    checkpoints.save(path, content)


def load(net, path):
    #: In Lightning's checkpoint every name begins with that of the module's attribute, "model.".
    #: checkpoints.load takes it off, and refuses the file unless every key finds its place.
    checkpoints.load(net, path)
    return f"of {path}"


# %% Freeze and unfreeze
def freeze(backbone):
    backbone.requires_grad_(False)


def train_mode(net, frozen):
    net.train()
    if frozen:
        #: Without gradients BatchNorm would still move its averages, and dropout still drop.
        net.backbone.eval()


def unfreeze(backbone, optimizer, lr):
    backbone.requires_grad_(True)
    #: A group of its own, with a learning rate of its own: what is learned shall not be torn down.
    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": lr})


# %% Fit
def fit(net, model, optimizer, data, recipe, options, device, log):
    loader = train_loader(data.train, recipe, options)
    val_loader = eval_loader(data.val, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    steps = recipe.max_epochs * batches if options.max_steps == -1 else options.max_steps
    losses, val = [], []
    for epoch in range(recipe.max_epochs):
        loader.sampler.set_epoch(epoch)
        if epoch == recipe.unfreeze_at_epoch:
            unfreeze(net.backbone, optimizer, recipe.lr / 10)
        train_mode(net, frozen=epoch < recipe.unfreeze_at_epoch)
        todo = min(batches, steps - len(losses))
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        for images, labels in bar:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) % options.log_every_n_steps == 0:
                bar.set_postfix(train_loss=loss.item())
                log.write(epoch, len(losses) - 1, "train", {"loss": loss.item()})
        if todo == batches:
            val.append(evaluate(model, val_loader, options.limit_val_batches, device))
            log.write(epoch, len(losses) - 1, "val", val[-1])
            print_epoch(epoch, val[-1])
        if len(losses) == steps:
            break
    return torch.stack(losses).tolist(), val, loader.sampler.handed_out


# %% Run
def run(recipe, options):
    torch.set_num_threads(options.threads)
    data = load_data(recipe, options)
    seed_everything(recipe.seed)
    device = choose_device(options.accelerator)
    net, decisions = make_network(recipe)
    freeze(net.to(device).backbone)
    start = fingerprints(net.state_dict())
    #: The head alone: the backbone comes later, as a group with its own learning rate.
    optimizer = configure_optimizers(net.head, recipe)
    model = torch.nn.DataParallel(net, range(options.devices)) if options.devices > 1 else net
    folder = start_folder(options, recipe.lesson, "plain")
    log = MetricsFile(folder)
    began = time.perf_counter()
    losses, val, order = fit(net, model, optimizer, data, recipe, options, device, log)
    fitted = time.perf_counter()
    settings = config_of(recipe, options, data)
    save(folder / "checkpoints" / "last.ckpt", net, optimizer, len(order), len(losses), settings)
    test_loader = eval_loader(data.test, recipe, options)
    test = evaluate(model, test_loader, options.limit_test_batches, device)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), len(losses), "test", test)
    trained = (net, optimizer, device, seconds, decisions)
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("finetune", run)


if __name__ == "__main__":
    main()
