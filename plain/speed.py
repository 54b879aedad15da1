"""The tutorial's CNN once more: as good as in `cifar`, in a tenth of the processor's time.

Run it with `make plain-speed`. Its twin is lightning/speed.py, run with `make lightning-speed`.
docs/speed.md has what each of the means gave, measured.
"""

# %% Imports
from common.batches import DeviceBatches
from common.data import eval_loader
from common.models import NETWORKS, Averaged
from common.optimizers import Muon, up_and_down
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, fingerprints, print_epoch, start_folder

import itertools
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from cifar import evaluate
from fashion import prepare
from tqdm import tqdm


# %% Data
def train_batches(images, recipe, device):
    #: All images lie on the device as bytes; a batch is taken, normalized and augmented in one go.
    return DeviceBatches(
        images, recipe.batch_size, recipe.seed, device, flip=recipe.flip,
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


def make_fast(net, recipe, device):
    net.to(device, memory_format=memory_format(recipe))
    #: Compiling takes longer than many a training: it pays for long ones, and on GPUs.
    model = torch.compile(net) if recipe.compile else net
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision != "32-true")
    return model, autocast


# %% Optimizer and schedule
def configure_optimizers(net, recipe, steps):
    usual = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "muon":
        optimizer = Muon(net, momentum=recipe.momentum, **usual)
    elif recipe.optimizer == "adam":
        optimizer = torch.optim.AdamW(net.parameters(), fused=True, **usual)
    else:
        sgd = dict(momentum=recipe.momentum, nesterov=True, fused=True)
        optimizer = torch.optim.SGD(net.parameters(), **sgd, **usual)
    #: Up in the first tenth of the steps, then down to 0. It has to know how many there will be.
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, up_and_down(steps))


# %% Fit
def fit(net, model, autocast, data, recipe, options, device, log):
    loader = train_batches(data.train, recipe, device)
    val_loader = eval_loader(data.val, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    planned = recipe.max_epochs * batches
    steps = planned if options.max_steps == -1 else min(options.max_steps, planned)
    optimizer, schedule = configure_optimizers(net, recipe, planned)
    losses, val = [], []
    for epoch in range(recipe.max_epochs):
        loader.sampler.set_epoch(epoch)
        model.train()
        todo = min(batches, steps - len(losses))
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        for images, labels in bar:
            if len(losses) == int(recipe.freeze_at * planned):
                freeze_first_layer(net)
            with autocast:
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if len(losses) % options.log_every_n_steps == 0:
                log.write(epoch, len(losses) - 1, "train", {"loss": loss.item()})
        if todo == batches:
            with autocast:
                val.append(evaluate(model, val_loader, options.limit_val_batches, device))
            log.write(epoch, len(losses) - 1, "val", val[-1])
            print_epoch(epoch, val[-1])
        if len(losses) == steps:
            break
    return torch.stack(losses).tolist(), val, loader.sampler.handed_out, optimizer


# %% Run
def run(recipe, options):
    if recipe.network in NETWORKS:
        recipe = replace(recipe, model=NETWORKS[recipe.network])
    data, device, net, start, *_ = prepare(recipe, options)
    if recipe.network == "airbench":
        #: Its first layer is computed from the images, and not trained.
        some = range(min(5000, len(data.train)))
        net.whiten(data.train.__getitems__(some)[0].to(device))
        start = fingerprints(net.state_dict())
    log = MetricsFile(start_folder(options, recipe.lesson, "plain"))
    model, autocast = make_fast(net, recipe, device)
    began = time.perf_counter()
    losses, val, order, optimizer = fit(net, model, autocast, data, recipe, options, device, log)
    fitted = time.perf_counter()
    test_loader = eval_loader(data.test, recipe, options)
    with autocast:
        asked = Averaged(model) if recipe.tta else model
        test = evaluate(asked, test_loader, options.limit_test_batches, device)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), len(losses), "test", test)
    trained = (net, optimizer, device, seconds)
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("speed", run)


if __name__ == "__main__":
    main()
