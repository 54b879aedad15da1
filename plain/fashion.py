"""The quickstart's MLP on FashionMNIST: its train loop and test loop, written by hand.

Run it with `make plain-fashion`. Its twin is lightning/fashion.py (`make lightning-fashion`).
docs/fashion.md walks from this file to that one in five moves.
"""

# %% Imports
from common.data import eval_loader, load_data, train_loader
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, fingerprints, print_epoch, start_folder

import itertools
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from cifar import choose_device, compute_metrics, configure_optimizers, seed_everything
from torchsummary import summary
from tqdm import tqdm


# %% Data
def one_hot(labels):
    #: cross_entropy takes class numbers or probabilities, and probabilities must be floats.
    return F.one_hot(labels, 10).float()


#: Move 4, the data module: the DataLoaders that fit and run make where they need them.


# %% Train loop and test loop
#: Move 1, the module: nothing holds the model, it is handed from function to function.
#: Move 2, the training step: the loss is yours, the rest of train_loop the Trainer will do.
def train_loop(bar, model, optimizer, device, losses, every, write):
    model.train()
    for images, targets in bar:
        images, targets = images.to(device), targets.to(device)
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        #: The tutorial clears the gradients after the step. It comes to the same.
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) % every == 0:
            bar.set_postfix(train_loss=loss.item())
            write(len(losses) - 1, "train", {"loss": loss.item()})


@torch.no_grad()
def test_loop(model, loader, limit, device):
    model.eval()
    total_loss, confusion = 0.0, 0
    for images, labels in itertools.islice(loader, count_batches(len(loader), limit)):
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        #: The tutorial adds up batch means and divides by their number: wrong if one is short.
        total_loss += F.cross_entropy(logits, labels).item() * len(labels)
        pairs = 10 * labels + logits.argmax(1)
        confusion += torch.bincount(pairs.cpu(), minlength=100).reshape(10, 10)
    return compute_metrics(total_loss, confusion)


#: Move 3, the optimizer: configure_optimizers(model, recipe), as in cifar.


# %% Fit
#: Move 5, the Trainer: this function.
def fit(model, optimizer, data, recipe, options, device, log):
    loader = train_loader(data.train, recipe, options)
    #: The tutorial validates on the test set. Whoever chooses by it has nothing left to test on.
    val_loader = eval_loader(data.val, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    steps = recipe.max_epochs * batches if options.max_steps == -1 else options.max_steps
    losses, val = [], []
    for epoch in range(recipe.max_epochs):
        loader.sampler.set_epoch(epoch)
        todo = min(batches, steps - len(losses))
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        write = lambda *row, epoch=epoch: log.write(epoch, *row)  # noqa: E731
        train_loop(bar, model, optimizer, device, losses, options.log_every_n_steps, write)
        if todo == batches:
            val.append(test_loop(model, val_loader, options.limit_val_batches, device))
            log.write(epoch, len(losses) - 1, "val", val[-1])
            print_epoch(epoch, val[-1])
        if len(losses) == steps:
            break
    return torch.stack(losses).tolist(), val, loader.sampler.handed_out


# %% Run
#: What cifar has at the head of its run; the next lessons import it from here.
def prepare(recipe, options):
    torch.set_num_threads(options.threads)
    data = load_data(recipe, options)
    summary(recipe.model(), tuple(data.train.images.shape[1:]), device="cpu")
    seed_everything(recipe.seed)
    device = choose_device(options.accelerator)
    net = recipe.model().to(device)
    start = fingerprints(net.state_dict())
    optimizer = configure_optimizers(net, recipe)
    model = torch.nn.DataParallel(net, range(options.devices)) if options.devices > 1 else net
    return data, device, net, start, optimizer, model


def run(recipe, options):
    data, device, net, start, optimizer, model = prepare(recipe, options)
    if recipe.one_hot:
        #: For training alone: accuracy is counted with class numbers.
        data = replace(data, train=replace(data.train, target_transform=one_hot))
    log = MetricsFile(start_folder(options, recipe.lesson, "plain"))
    began = time.perf_counter()
    losses, val, order = fit(model, optimizer, data, recipe, options, device, log)
    fitted = time.perf_counter()
    test_loader = eval_loader(data.test, recipe, options)
    test = test_loop(model, test_loader, options.limit_test_batches, device)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), len(losses), "test", test)
    trained = (net, optimizer, device, seconds)
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("fashion", run)


if __name__ == "__main__":
    main()
