"""The tutorial's CNN on CIFAR-10, trained by a loop written by hand.

Run it with `make plain-cifar`. Its twin is lightning/cifar.py, run with `make lightning-cifar`.
`make diff-cifar` shows the two side by side, `make parity-cifar` proves that they do the same.
"""

# %% Imports
from common.data import eval_loader, load_data, train_loader
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, fingerprints, print_epoch, start_folder

import itertools
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torchsummary import summary
from tqdm import tqdm


# %% Seed and device
def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the CPU's generator and those of all GPUs
    #: Some GPU kernels add up in whatever order their threads arrive. The CPU's do not.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)


def choose_device(accelerator):
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# %% Data
#: No data module: fit and run, below, make the DataLoaders where they use them.


# %% Metrics
def compute_metrics(total_loss, confusion):
    #: All follows from counts[true class, predicted class]. An absent class has no F1: 0/0.
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return {
        "loss": total_loss / confusion.sum().item(),
        "accuracy": (right.sum() / confusion.sum()).item(),
        "f1": (2 * right / (true + predicted))[true + predicted > 0].mean().item(),
        "accuracy_per_class": (right / true.clamp(min=1)).tolist(),
        "confusion": confusion.tolist(),
    }


# %% Loss, optimizer and evaluation
def configure_optimizers(model, recipe):
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr)
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)


@torch.no_grad()
def evaluate(model, loader, limit, device, loss_function=F.cross_entropy):
    #: Dropout off, BatchNorm on its running averages. To forget it raises no error.
    model.eval()
    total_loss, confusion = 0.0, 0
    for images, labels in itertools.islice(loader, count_batches(len(loader), limit)):
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        #: Times the batch's size: the last batch is shorter, and a mean of batch means is wrong.
        total_loss += loss_function(logits, labels).item() * len(labels)
        pairs = 10 * labels + logits.argmax(1)  # a number from 0 to 99 for (true, predicted)
        confusion += torch.bincount(pairs.cpu(), minlength=100).reshape(10, 10)
    return compute_metrics(total_loss, confusion)


# %% Fit
def fit(model, optimizer, data, recipe, options, device, log):
    loader = train_loader(data.train, recipe, options)
    val_loader = eval_loader(data.val, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    steps = recipe.max_epochs * batches if options.max_steps == -1 else options.max_steps
    every, losses, val = options.log_every_n_steps, [], []
    for epoch in range(recipe.max_epochs):
        #: Without set_epoch every epoch has the same order; without train, evaluate's mode stays.
        loader.sampler.set_epoch(epoch)
        model.train()
        todo = min(batches, steps - len(losses))
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        for images, labels in bar:
            #: The model went to its device once; each batch has to follow it.
            images, labels = images.to(device), labels.to(device)
            #: Gradients add up until they are cleared.
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            #: Without detach, every loss would keep its whole graph in memory.
            losses.append(loss.detach())
            if len(losses) % every == 0:
                #: item() makes the CPU wait for the GPU: once in `every` steps is cheap.
                running = torch.stack(losses[-every:]).mean().item()
                bar.set_postfix(train_loss=running)
                log.write(epoch, len(losses) - 1, "train", {"loss": running})
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
    #: Before the seed: torchsummary draws random numbers for the forward pass that it makes.
    summary(recipe.model(), tuple(data.train.images.shape[1:]), device="cpu")
    seed_everything(recipe.seed)
    device = choose_device(options.accelerator)
    net = recipe.model().to(device)
    start = fingerprints(net.state_dict())
    optimizer = configure_optimizers(net, recipe)
    #: DataParallel's state_dict puts "module." before every name; that of `net` inside does not.
    model = torch.nn.DataParallel(net, range(options.devices)) if options.devices > 1 else net
    log = MetricsFile(start_folder(options, recipe.lesson, "plain"))
    began = time.perf_counter()
    losses, val, order = fit(model, optimizer, data, recipe, options, device, log)
    fitted = time.perf_counter()
    test_loader = eval_loader(data.test, recipe, options)
    test = evaluate(model, test_loader, options.limit_test_batches, device)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), len(losses), "test", test)
    trained = (net, optimizer, device, seconds)
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("cifar", run)


if __name__ == "__main__":
    main()
