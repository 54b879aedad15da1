"""What runs around the loop, by hand: loggers, early stopping, checkpoints, pictures.

Run it with `make plain-callbacks`. Its twin is lightning/callbacks.py (`make lightning-callbacks`).
"""

# %% Imports
from common import checkpoints, figures
from common.data import eval_loader, train_loader
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, config_of, print_epoch, report, start_folder

import importlib
import itertools
import math
import os
import time

import torch
import torch.nn.functional as F
from cifar import evaluate
from fashion import prepare
from tqdm import tqdm


# %% Loggers and pictures
class Logger:
    def __init__(self, folder, kind, settings):
        self.folder, self.settings, self.csv = folder, settings, MetricsFile(folder)
        self.writer, self.wandb, self.close = None, None, lambda: None
        #: Imported where they are asked for: both are extras.
        if kind == "tensorboard":
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self.writer = tensorboard.SummaryWriter(folder / kind)
            self.close = self.writer.close
        if kind == "wandb":
            self.wandb = importlib.import_module("wandb")
            mode = os.environ.get("WANDB_MODE", "offline")
            self.wandb.init(project="callbacks", dir=folder, mode=mode, config=settings)
            self.close = self.wandb.finish

    def write(self, epoch, step, stage, values):
        row = self.csv.write(epoch, step, stage, values)
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row | {"trainer/global_step": step})

    def picture(self, step, pixels):
        if self.writer:
            self.writer.add_image("predictions", pixels, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({"predictions": [self.wandb.Image(pixels)], "trainer/global_step": step})


# %% Early stopping and checkpoints
def stop_reason(val_losses, patience, min_delta):
    best, wait = math.inf, 0
    for loss in val_losses:
        if not math.isfinite(loss):
            return "non finite metric"
        #: A tie is no improvement, and neither is a gain of exactly min_delta.
        best, wait = (loss, 0) if loss + min_delta < best else (best, wait + 1)
        if wait >= patience:
            return "patience exhausted"
    return "not stopped"


def best_epoch(val_losses):
    #: index finds the first of equal ones. Early stopping's best may be another, by min_delta.
    return val_losses.index(min(val_losses))


# %% Fit
def train_epoch(bar, model, optimizer, device, losses, every, log, epoch):
    model.train()
    hits = []
    for images, labels in bar:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        output = model(images)
        #: The network ends with log_softmax; cross_entropy is nll_loss of log_softmax.
        loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        hits.append(output.argmax(1) == labels)
        if len(losses) % every == 0:
            now = {"loss_step": loss.item(), "accuracy_step": hits[-1].float().mean().item()}
            log.write(epoch, len(losses) - 1, "train", now)
    #: Weighted by the batch's size, as in validation, and added up in float64.
    sizes, accuracy = torch.tensor([len(hit) for hit in hits]), torch.cat(hits).float().mean()
    total_loss = torch.stack(losses[-len(hits) :]).cpu().double() @ sizes.double()
    return {"loss_epoch": (total_loss / sizes.sum()).item(), "accuracy_epoch": accuracy.item()}


def fit(net, model, optimizer, data, recipe, options, device, log):
    loader = train_loader(data.train, recipe, options)
    val_loader = eval_loader(data.val, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    steps = recipe.max_epochs * batches if options.max_steps == -1 else options.max_steps
    every, losses, val, reason = options.log_every_n_steps, [], [], "not stopped"
    for epoch in range(recipe.max_epochs):
        loader.sampler.set_epoch(epoch)
        todo = min(batches, steps - len(losses))
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        train = train_epoch(bar, model, optimizer, device, losses, every, log, epoch)
        if todo == batches:
            val.append(evaluate(model, val_loader, options.limit_val_batches, device, F.nll_loss))
            log.write(epoch, len(losses) - 1, "val", val[-1])
            print_epoch(epoch, val[-1])
            log.picture(len(losses) - 1, figures.predictions(net, data, epoch, log.folder))
            ckpt = {"epoch": epoch, "global_step": len(losses), "state_dict": net.state_dict()}
            ckpt |= {"optimizer_states": [optimizer.state_dict()], "hyper_parameters": log.settings}
            val_losses = [scores["loss"] for scores in val]
            for name in ("best", "last") if best_epoch(val_losses) == epoch else ("last",):
                checkpoints.save(log.folder / "checkpoints" / f"{name}.ckpt", ckpt)
            reason = stop_reason(val_losses, recipe.patience, recipe.min_delta)
        log.write(epoch, len(losses) - 1, "train", train)
        if reason != "not stopped" or len(losses) == steps:
            break
    return torch.stack(losses).tolist(), val, loader.sampler.handed_out, reason


# %% Run
def run(recipe, options):
    data, device, net, start, optimizer, model = prepare(recipe, options)
    folder = start_folder(options, recipe.lesson, "plain")
    log = Logger(folder, recipe.logger, config_of(recipe, options, data))
    began = time.perf_counter()
    losses, val, order, reason = fit(net, model, optimizer, data, recipe, options, device, log)
    fitted = time.perf_counter()
    #: The best weights are tested, not the last ones.
    best = checkpoints.load(net, folder / "checkpoints" / "best.ckpt")["epoch"] if val else None
    test_loader = eval_loader(data.test, recipe, options)
    test = evaluate(model, test_loader, options.limit_test_batches, device, F.nll_loss)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), len(losses), "test", test)
    log.close()
    trained = (net, optimizer, device, seconds, report(reason, val, best, recipe, options))
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("callbacks", run)


if __name__ == "__main__":
    main()
