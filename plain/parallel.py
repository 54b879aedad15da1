"""One process for each device, by hand: DistributedDataParallel and FSDP2.

Run it with `make plain-parallel DEVICES=2`. Its twin is lightning/parallel.py.
"""

# %% Imports
from common import checkpoints, processes, resume
from common.data import Normalize, load_images, make_loaders
from common.launch import ProcessOptions
from common.logger import CSVLogger
from common.models import Net, NormNet
from common.run import run

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cifar import choose_device, compute_metrics, count, seed_everything
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(ProcessOptions):
    lr: float = 1e-2  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch, over all devices together
    max_epochs: int = 2  # passes over the training set
    strategy: Literal["ddp", "fsdp", "dp"] = "ddp"
    """ddp: each process has all weights; fsdp: its share of them; dp: DataParallel"""
    accumulate_grad_batches: int = 1  # batches whose gradients add up to one step
    batch_norm: bool = False  # train the network of the lesson optimize, with BatchNorm
    sync_batchnorm: bool = False  # let BatchNorm average over all devices; GPUs only
    precision: Literal["32-true", "64-true"] = "32-true"  # 64-true: double precision


# %% Processes
def start_process(args, device):
    #: torchrun started this file once for each device. Environment variables tell each
    #: copy its rank, and where all meet. GPUs talk by NCCL, CPUs by gloo.
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))


def wrap(net, args, device):
    if args.sync_batchnorm:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if args.strategy == "dp":
        #: One process: in each step it copies the weights to all GPUs.
        return torch.nn.DataParallel(net, range(args.devices))
    if args.strategy == "fsdp":
        #: Each process keeps its share of all, and borrows the rest for each pass.
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return fully_shard(net, mesh=mesh)
    #: Each process keeps all weights. Backward averages the gradients over them.
    return torch.nn.parallel.DistributedDataParallel(net)


# %% Save and load
def save(net, optimizer, epoch, step, args):
    ckpt = {"epoch": epoch, "global_step": step, "hyper_parameters": args.settings()}
    #: All must call: FSDP's shares are put together, and the generators gathered.
    ckpt["state_dict"] = processes.whole(net.state_dict())
    ckpt["optimizer_states"] = [processes.whole(optimizer.state_dict())]
    ckpt["random"] = processes.gather(resume.random_states())
    if dist.get_rank() == 0:
        resume.save(args.folder / "checkpoints" / f"step_{step:08d}.ckpt", ckpt)


# %% Evaluation
def evaluate(net, loader, device, stage):
    #: BatchNorm's averages are of each process's own images: all take the first one's.
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)
    #: Sums, not means: where the processes do not divide the set, some have less.
    sums = [processes.add_up(each, device) for each in count(net, loader, device)]
    return compute_metrics(*sums, stage)


# %% Training
def main(args):
    device = choose_device(args.accelerator)
    start_process(args, device)
    #: One process of each machine, which may have to download, then the others.
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    #: Each process takes its share of the order that seed and epoch give.
    train_loader, val_loader, test_loader = make_loaders(data, args)
    #: One seed for all: they begin with the same weights.
    seed_everything(args.seed)
    make, group = NormNet if args.batch_norm else Net, args.accumulate_grad_batches
    net, first, step = make().to(device), 0, 0
    if args.precision == "64-true":
        net.double().register_forward_pre_hook(lambda net, x: (x[0].double(),))
    ckpt = checkpoints.load(net, args.ckpt_path) if args.ckpt_path else None
    model = wrap(net, args, device)
    #: After fully_shard, which gives the model other parameters.
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
    rank = dist.get_rank()
    #: The first process alone writes: two would mix their rows.
    log = CSVLogger(args.folder).log_metrics if rank == 0 else lambda *_: None
    #: As the Trainer does with several processes, before it fits and before it tests.
    seed_everything(args.seed)
    if ckpt:
        first, step = ckpt["epoch"] + 1, ckpt["global_step"]
        processes.load_optimizer(optimizer, ckpt["optimizer_states"][0])
        processes.take_random_states(ckpt["random"])
    for epoch in range(first, args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        model.train()
        bar = tqdm(train_loader, f"Epoch {epoch}", disable=rank > 0 or None)
        for batch, (images, labels) in enumerate(bar, start=1):
            images, labels = images.to(device), labels.to(device)
            last = batch % group == 0 or batch == len(train_loader)
            #: Where no step follows, gradients add up where they are: sending costs.
            alone = args.strategy == "ddp" and not last
            with model.no_sync() if alone else contextlib.nullcontext():
                loss = F.cross_entropy(model(images), labels)
                (loss / group).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            if last and step % args.log_every_n_steps == 0:
                #: Each process has the loss of its own images.
                mean = processes.add_up(loss.item(), device) / dist.get_world_size()
                log({"epoch": epoch, "train_loss": mean}, step - 1)
        val = evaluate(net, val_loader, device, "val")
        print(f"Epoch {epoch}:", ", ".join(f"{k} {v:.4f}" for k, v in val.items()))
        log({"epoch": epoch, **val}, step - 1)
        save(net, optimizer, epoch, step, args)
    seed_everything(args.seed)
    log({"epoch": args.max_epochs, **evaluate(net, test_loader, device, "test")}, step)
    #: What is left is one network, however many processes trained it.
    trained = make().to(next(net.parameters()).dtype)
    trained.load_state_dict(processes.whole(net.state_dict()))
    return trained


if __name__ == "__main__":
    run(main, Args)
