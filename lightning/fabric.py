"""A loop on Lightning Fabric, which knows the devices; the loop stays by hand.

Run it with `make lightning-fabric DEVICES=2`. Its twin is plain/fabric.py;
fabric_trainer.py beside it gives the loop away, too.
"""

# %% Imports
from common import processes
from common.data import Normalize, load_images, make_loaders
from common.launch import Processes
from common.models import DropoutNet
from common.run import run

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import DDPStrategy
from torchmetrics import Accuracy, F1Score, MeanMetric, MetricCollection
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Processes):
    lr: float = 0.05  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch, over all devices together
    max_epochs: int = 2  # passes over the training set
    accumulate_grad_batches: int = 2  # batches whose gradients add up to one step
    gradient_clip_val: float = 1.0  # what their norm is clipped to; 0: not
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # bf16: in half precision


# %% Evaluation
def make_metrics(device):
    ten = dict(task="multiclass", num_classes=10)
    accuracy, f1 = Accuracy(**ten, average="micro"), F1Score(**ten, average="macro")
    counts = MetricCollection({"accuracy": accuracy, "f1": f1})
    return counts.to(device), MeanMetric().set_dtype(torch.float64).to(device)


@torch.no_grad()
def evaluate(model, loader, device, stage):
    metrics, mean = make_metrics(device)
    model.eval()
    for images, labels in loader:
        output = model(images)
        metrics.update(output, labels)
        mean.update(F.nll_loss(output, labels).double(), len(labels))
    #: torchmetrics adds up over all processes by itself.
    found = metrics.compute() | {"loss": mean.compute()}
    return {f"{stage}_{name}": value.item() for name, value in found.items()}


# %% Training
def main(args):
    logger = CSVLogger(args.folder.parent, args.folder.name, version="")
    fabric = L.Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=DDPStrategy(timeout=timedelta(seconds=args.timeout)),
        precision=args.precision,
        loggers=logger,
    )
    fabric.launch()
    #: Fabric has no option for it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    loaders = make_loaders(data, args)
    #: The loaders move each batch to its device. Each new pass over one is an epoch: it
    #: calls set_epoch with the number of passes before it.
    train_loader, val_loader, test_loader = fabric.setup_dataloaders(
        *loaders, use_distributed_sampler=False
    )
    #: One seed for all: they begin with the same weights.
    fabric.seed_everything(args.seed, verbose=False)
    net = DropoutNet()
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
    #: Moved, and wrapped: DDP around it, and autocast around its forward alone.
    model, optimizer = fabric.setup(net, optimizer)
    group, clip, step = args.accumulate_grad_batches, args.gradient_clip_val, 0
    #: As the Trainer does with several processes: dropout begins from the seed.
    fabric.seed_everything(args.seed, verbose=False)
    for epoch in range(args.max_epochs):
        model.train()
        hidden = fabric.global_rank > 0 or None
        bar = tqdm(train_loader, f"Epoch {epoch}", disable=hidden)
        for batch, (images, labels) in enumerate(bar, start=1):
            due = batch % group == 0 or batch == len(train_loader)
            #: Where no step follows, gradients add up where they are: sending costs.
            with fabric.no_backward_sync(model, enabled=not due):
                loss = F.nll_loss(model(images), labels)
                fabric.backward(loss / group)
            if not due:
                continue
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.log_every_n_steps == 0:
                #: A copy: all_reduce changes what it gets.
                mean = fabric.all_reduce(loss.detach().clone(), reduce_op="mean")
                fabric.log_dict({"epoch": epoch, "train_loss": mean}, step - 1)
        val = evaluate(model, val_loader, fabric.device, "val")
        fabric.log_dict({"epoch": epoch, **val}, step - 1)
    fabric.seed_everything(args.seed, verbose=False)
    test = evaluate(model, test_loader, fabric.device, "test")
    fabric.log_dict({"epoch": args.max_epochs, **test}, step)
    logger.save()
    return net


if __name__ == "__main__":
    run(main, Args)
