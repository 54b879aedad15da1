"""One process for each device, by hand: DistributedDataParallel, FSDP2, and DataParallel before it.

Run it with `make plain-parallel DEVICES=2`. Its twin is lightning/parallel.py.
"""

# %% Imports
from common import processes
from common.data import eval_loader, train_loader
from common.options import count_batches
from common.runs import Run, print_epoch, read_metrics

import contextlib
import itertools
import math
import os
import time
from dataclasses import replace
from datetime import timedelta

import cifar
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fashion import prepare
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm


# %% Processes
def start_process(recipe, options):
    #: torchrun started this file once for each device, and tells each copy by environment variables
    #: its number, the rank, and where all meet. GPUs talk through NCCL, CPUs through gloo.
    cuda = cifar.choose_device(options.accelerator).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=recipe.timeout)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)


def wrap(net, recipe, options, device):
    if recipe.sync_batchnorm:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if recipe.strategy == "dp":
        #: One process: in each step it copies the weights to all GPUs, sends each its part of the
        #: batch, and fetches the outputs. It has a thread for each GPU; Python runs one at a time.
        return torch.nn.DataParallel(net, range(options.devices))
    if recipe.strategy == "fsdp":
        #: Each process keeps its share of all, and borrows the other weights for each pass.
        return fully_shard(net, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    #: Each process keeps all weights. Backward averages the gradients over the processes.
    return torch.nn.parallel.DistributedDataParallel(net)


# %% Data
#: The loaders of cifar. Each process takes its share of the order that seed and epoch give.


# %% Metrics
def evaluate(t, images, limit, recipe, options):
    #: BatchNorm's averages are of each process's own images: all take those of the first one.
    for buffer in t.net.buffers():
        dist.broadcast(buffer, 0)
    own = cifar.evaluate(t.net, eval_loader(images, recipe, options), limit, t.device)
    confusion = torch.tensor(own["confusion"], device=t.device)
    total_loss = own["loss"] * confusion.sum().double()
    #: Sums, not means: where the processes do not divide the set, some have an image less.
    dist.all_reduce(confusion)
    dist.all_reduce(total_loss)
    return cifar.compute_metrics(total_loss.item(), confusion.cpu())


# %% Fit
def train_epoch(t, bar, recipe, options, epoch):
    t.model.train()
    group, every = recipe.accumulate_grad_batches, options.log_every_n_steps
    for batch, (images, labels) in enumerate(bar):
        images, labels = images.to(t.device), labels.to(t.device)
        if batch % group == 0:
            t.optimizer.zero_grad()
        due = (batch + 1) % group == 0 or batch + 1 == t.batches
        #: Where no step follows, gradients add up where they are: to send them would cost time.
        with contextlib.nullcontext() if due or recipe.strategy != "ddp" else t.model.no_sync():
            loss = F.cross_entropy(t.model(images), labels)
            (loss / group).backward()
        t.losses.append(loss.detach())
        if due:
            t.optimizer.step()
            t.steps += 1
            if t.steps % every == 0:
                running = processes.average(torch.stack(t.losses[-every:]).mean())
                t.write(epoch, "train", {"loss": running.item()})
            if t.steps == options.max_steps:
                break


def fit(t, data, recipe, options):
    per_epoch = math.ceil(t.batches / recipe.accumulate_grad_batches)
    while t.steps not in (options.max_steps, recipe.max_epochs * per_epoch):
        epoch = t.steps // per_epoch
        t.loader.sampler.set_epoch(epoch)
        batches = itertools.islice(t.loader, t.batches)
        bar = tqdm(batches, f"Epoch {epoch}", t.batches, disable=dist.get_rank() > 0 or None)
        train_epoch(t, bar, recipe, options, epoch)
        if t.steps == (epoch + 1) * per_epoch:
            val = evaluate(t, data.val, options.limit_val_batches, recipe, options)
            t.write(epoch, "val", val)
            print_epoch(epoch, val)
            t.save(epoch)


# %% Run
def run(recipe, options):
    start_process(recipe, options)
    #: One process of each machine, which may have to download, then the others. One seed for all.
    one = replace(options, devices=1)
    data, device, net, start, *_ = processes.in_turn(prepare, recipe, one)
    if recipe.precision == "64-true":
        net.double().register_forward_pre_hook(lambda net, images: (images[0].double(),))
    #: The first process makes the folder and finds the checkpoint; the others hear of it.
    t = processes.Training(net, device, *processes.begin(recipe, options, data, "plain"))
    t.model = wrap(net, recipe, options, device)
    #: After fully_shard, which gives the model other parameters.
    t.optimizer = cifar.configure_optimizers(net, recipe)
    t.loader = train_loader(data.train, recipe, options)
    t.batches = count_batches(len(t.loader), options.limit_train_batches)
    #: As the Trainer does with several processes, before it fits and before it tests.
    cifar.seed_everything(recipe.seed)
    t.load()
    began = time.perf_counter()
    fit(t, data, recipe, options)
    fitted = time.perf_counter()
    cifar.seed_everything(recipe.seed)
    test = evaluate(t, data.test, options.limit_test_batches, recipe, options)
    seconds = (fitted - began, time.perf_counter() - fitted)
    order = t.loader.sampler.handed_out
    t.write(len(order), "test", test)
    losses = processes.average(torch.stack(t.losses)).tolist()
    val = read_metrics(t.folder, "val")
    trained = (*processes.whole_model(net, t.optimizer, recipe), device, seconds)
    return Run("plain", recipe, options, data, start, order, losses, val, test, *trained)


# %% Command line
def main():
    processes.command_line("parallel", run)


if __name__ == "__main__":
    main()
