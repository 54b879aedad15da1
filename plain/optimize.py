"""What stands around the optimizer's step, by hand, in the order that makes it right.

Run it with `make plain-optimize`. Its twin is lightning/optimize.py (`make lightning-optimize`).
"""

# %% Imports
from common import checkpoints
from common.data import eval_loader, train_loader
from common.optimizers import diverged, group_weight, make_optimizer, make_scheduler
from common.options import count_batches
from common.runs import MetricsFile, Run, command_line, config_of, print_epoch, start_folder

import copy
import itertools
import math
import time

import torch
import torch.nn.functional as F
from cifar import evaluate
from fashion import prepare
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from tqdm import tqdm

# %% Clipping
#: All gradients made shorter together, which keeps their direction; or each number on its own.
CLIP = {"norm": clip_grad_norm_, "value": clip_grad_value_}


def grad_norm(parameters):
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


# %% Moving average of the weights
@torch.no_grad()
def update_average(average, net, decay, first):
    now = net.state_dict()
    for name, mean in average.state_dict().items():
        #: A copy at first: the random weights are no part of the average.
        mean.copy_(now[name] if first else decay * mean + (1 - decay) * now[name])


# %% Step
class Training:
    def __init__(self, net, device, images, batches, recipe, log):
        self.batches, self.images = batches, min(batches * recipe.batch_size, images)
        self.log, self.steps, self.losses = log, 0, []
        self.per_epoch = math.ceil(self.batches / recipe.accumulate_grad_batches)
        self.optimizer = make_optimizer(net, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe, recipe.max_epochs * self.per_epoch)
        half = torch.float16 if recipe.precision == "16-mixed" else torch.bfloat16
        self.autocast = torch.autocast(device.type, half, enabled=recipe.precision != "32-true")
        #: float16 loses small gradients: the loss is scaled up, and the gradients down again.
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "16-mixed")
        self.net, self.average = net, copy.deepcopy(net) if recipe.ema_decay else net


def train_epoch(t, bar, model, device, recipe, options, epoch):
    model.train()
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    group = recipe.accumulate_grad_batches
    for batch, (images, labels) in enumerate(bar):
        images, labels = images.to(device), labels.to(device)
        #: The forward pass and the loss, and nothing else: backward follows what they recorded.
        with t.autocast:
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
        #: A NaN would spread to every weight. To look makes the CPU wait for a GPU each time.
        if not loss.isfinite():
            raise diverged("loss of", t.steps + 1, loss.item(), t.log.folder)
        t.losses.append(loss.detach())
        if batch % group == 0:
            t.optimizer.zero_grad()
        loss = loss * group_weight(batch, len(labels), t.images, recipe) / group
        t.scaler.scale(loss).backward()
        if (batch + 1) % group and batch + 1 < t.batches:
            continue
        #: Before clipping, which would otherwise see gradients that are scaled up.
        t.scaler.unscale_(t.optimizer)
        due = (t.steps + 1) % options.log_every_n_steps == 0
        now = {"loss": t.losses[-1].item(), "grad_norm": grad_norm(parameters)} if due else {}
        if recipe.gradient_clip_val:
            CLIP[recipe.gradient_clip_algorithm](parameters, recipe.gradient_clip_val)
        if due:
            now |= {"grad_norm_clipped": grad_norm(parameters), "loss_scale": t.scaler.get_scale()}
            t.log.write(epoch, t.steps, "train", now | {"lr": t.optimizer.param_groups[0]["lr"]})
        #: Left out where a gradient is infinite; then update makes the scale smaller.
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.steps += 1
        if recipe.moves_on == "step":
            t.scheduler.step()
        if recipe.ema_decay:
            update_average(t.average, t.net, recipe.ema_decay, first=t.steps == 1)
        if t.steps == options.max_steps:
            break


# %% Fit
def fit(t, model, loader, data, recipe, options, device):
    val_loader, val = eval_loader(data.val, recipe, options), []
    while t.steps not in (options.max_steps, recipe.max_epochs * t.per_epoch):
        epoch = t.steps // t.per_epoch
        loader.sampler.set_epoch(epoch)
        bar = tqdm(itertools.islice(loader, t.batches), f"Epoch {epoch}", t.batches, disable=None)
        train_epoch(t, bar, model, device, recipe, options, epoch)
        if t.steps == (epoch + 1) * t.per_epoch:
            if recipe.moves_on == "epoch":
                t.scheduler.step()
            #: The average is what is validated and saved; the training goes on without it.
            with t.autocast:
                val.append(evaluate(t.average, val_loader, options.limit_val_batches, device))
            if not math.isfinite(val[-1]["loss"]):
                raise diverged("validation loss after", t.steps, val[-1]["loss"], t.log.folder)
            t.log.write(epoch, t.steps - 1, "val", val[-1])
            print_epoch(epoch, val[-1])
            ckpt = {"epoch": epoch, "global_step": t.steps, "state_dict": t.average.state_dict()}
            ckpt["hyper_parameters"] = config_of(recipe, options, data)
            checkpoints.save(t.log.folder / "checkpoints" / "last.ckpt", ckpt)
            if recipe.moves_on == "validation":
                t.scheduler.step(val[-1]["loss"])
    return torch.stack(t.losses).tolist(), val, loader.sampler.handed_out


# %% Run
def run(recipe, options):
    data, device, net, start, _, model = prepare(recipe, options)
    log = MetricsFile(start_folder(options, recipe.lesson, "plain"))
    loader = train_loader(data.train, recipe, options)
    batches = count_batches(len(loader), options.limit_train_batches)
    t = Training(net, device, len(data.train), batches, recipe, log)
    began = time.perf_counter()
    losses, val, order = fit(t, model, loader, data, recipe, options, device)
    fitted = time.perf_counter()
    net.load_state_dict(t.average.state_dict())
    with t.autocast:
        test_loader = eval_loader(data.test, recipe, options)
        test = evaluate(model, test_loader, options.limit_test_batches, device)
    seconds = (fitted - began, time.perf_counter() - fitted)
    log.write(len(order), t.steps, "test", test)
    trained = (net, t.optimizer, device, seconds, {"optimizer steps": t.steps})
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    command_line("optimize", run)


if __name__ == "__main__":
    main()
