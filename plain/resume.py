"""Stop anywhere, carry on, reach the same bits: all that changes while it trains is saved.

Run it with `make plain-resume`. Its twin is lightning/resume.py (`make lightning-resume`).
"""

# %% Imports
from common import checkpoints, resume
from common.data import eval_loader, train_loader
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, config_of, print_epoch, read_metrics, report

import itertools
import time

import torch
import torch.nn.functional as F
from callbacks import best_epoch, stop_reason
from cifar import evaluate
from fashion import prepare
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm


# %% Save and load
class Training:
    #: All that changes while it trains. What is left out here is lost with the process.
    def __init__(self, net, optimizer, scheduler, scaler, batches, sampler, log, settings):
        self.net, self.optimizer, self.scheduler, self.scaler = net, optimizer, scheduler, scaler
        self.sampler, self.log, self.settings = sampler, log, settings
        self.batches, self.losses, self.reason = batches, [], "not stopped"

    def save(self, name):
        step, size = len(self.losses), self.settings["batch_size"]
        run = {**resume.made_with(), "rows": self.log.rows, "reason": self.reason}
        run["losses"] = torch.stack(self.losses).cpu()
        #: The generators that dropout draws from, and the place in the shuffled order.
        run["random"] = resume.random_states()
        run["order"] = resume.trained_on(self.sampler.handed_out, step, self.batches, size)
        ckpt = {"epoch": (step - 1) // self.batches, "global_step": step, "run": run}
        ckpt["state_dict"] = self.net.state_dict()
        ckpt["optimizer_states"] = [self.optimizer.state_dict()]
        ckpt["lr_schedulers"] = [self.scheduler.state_dict()]
        #: The scale of the loss, with --precision 16-mixed, under the name of Lightning's plugin.
        ckpt["MixedPrecision"] = self.scaler.state_dict()
        ckpt["hyper_parameters"] = self.settings
        #: Under a temporary name, synced, renamed: a kill during the writing leaves no half file.
        resume.save(self.log.folder / "checkpoints" / f"{name}.ckpt", ckpt)

    def load(self, path, device):
        ckpt = checkpoints.load(self.net, path)
        run = ckpt["run"]
        self.optimizer.load_state_dict(ckpt["optimizer_states"][0])
        self.scheduler.load_state_dict(ckpt["lr_schedulers"][0])
        self.scaler.load_state_dict(ckpt.get("MixedPrecision", {}))
        self.losses, self.reason = list(run["losses"].to(device)), run["reason"]
        self.sampler.carry_on({epoch: order.tolist() for epoch, order in run["order"].items()})
        #: Rows that were written after the checkpoint will be written again.
        self.log.write_again(run["rows"])
        #: Last, since anything before might draw a random number.
        resume.set_random_states(run["random"])


# %% Fit
def train_epoch(t, bar, model, device, autocast, recipe, options, stop, epoch):
    model.train()
    every = options.log_every_n_steps
    for images, labels in bar:
        images, labels = images.to(device), labels.to(device)
        t.optimizer.zero_grad()
        with autocast:
            loss = F.nll_loss(model(images), labels)
        t.scaler.scale(loss).backward()
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.scheduler.step()
        t.losses.append(loss.detach())
        step = len(t.losses)
        if step % every == 0:
            running = torch.stack(t.losses[-every:]).mean().item()
            t.log.write(epoch, step - 1, "train", {"loss": running})
        #: At the end of an epoch only after its validation, or whoever carries on would skip it.
        due = step % recipe.checkpoint_every_n_steps == 0 or step == options.max_steps
        if step % t.batches and (due or stop.asked):
            t.save(f"step_{step:08d}")
            stop.end_if_asked(step)


def fit(t, model, loader, data, recipe, options, device, autocast, stop):
    val_loader = eval_loader(data.val, recipe, options)
    last = recipe.max_epochs * t.batches if options.max_steps == -1 else options.max_steps
    while len(t.losses) < min(last, recipe.max_epochs * t.batches) and t.reason == "not stopped":
        epoch = len(t.losses) // t.batches
        loader.sampler.set_epoch(epoch)
        todo = min((epoch + 1) * t.batches, last) - len(t.losses)
        bar = tqdm(itertools.islice(loader, todo), f"Epoch {epoch}", todo, disable=None)
        train_epoch(t, bar, model, device, autocast, recipe, options, stop, epoch)
        step = len(t.losses)
        if step % t.batches == 0:
            with autocast:
                val = evaluate(model, val_loader, options.limit_val_batches, device, F.nll_loss)
            t.log.write(epoch, step - 1, "val", val)
            print_epoch(epoch, val)
            val_losses = [row["val_loss"] for row in t.log.rows if "val_loss" in row]
            t.reason = stop_reason(val_losses, recipe.patience, recipe.min_delta)
            if best_epoch(val_losses) == epoch:
                t.save("best")
            t.save(f"step_{step:08d}")
            stop.end_if_asked(step)


# %% Run
def run(recipe, options):
    data, device, net, start, optimizer, model = prepare(recipe, options)
    settings = config_of(recipe, options, data)
    folder, path = resume.begin(recipe, options, "plain", settings)
    log = MetricsFile(folder)
    loader = train_loader(data.train, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    scheduler = CosineAnnealingLR(optimizer, recipe.max_epochs * batches)
    half = torch.float16 if recipe.precision == "16-mixed" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=recipe.precision != "32-true")
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "16-mixed")
    t = Training(net, optimizer, scheduler, scaler, batches, loader.sampler, log, settings)
    if path:
        t.load(path, device)
    began = time.perf_counter()
    with resume.Stop(recipe.max_time).listening() as stop:
        fit(t, model, loader, data, recipe, options, device, autocast, stop)
    fitted = time.perf_counter()
    val = read_metrics(folder, "val")
    best = resume.best_epoch(folder, val)
    if best is not None:
        checkpoints.load(net, folder / "checkpoints" / "best.ckpt")
    test_loader = eval_loader(data.test, recipe, options)
    with autocast:
        test = evaluate(model, test_loader, options.limit_test_batches, device, F.nll_loss)
    seconds = (fitted - began, time.perf_counter() - fitted)
    losses, order = torch.stack(t.losses).tolist(), loader.sampler.handed_out
    log.write(len(order), len(losses), "test", test)
    trained = (net, optimizer, device, seconds, report(t.reason, val, best, recipe, options))
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("resume", run)


if __name__ == "__main__":
    main()
