"""One process for each device: the Trainer's strategies DDP and FSDP2.

Run it with `make lightning-parallel DEVICES=2`. Its twin is plain/parallel.py.
"""

# %% Imports
from common import checkpoints, processes, resume
from common.data import Normalize, load_images, make_loaders
from common.launch import ProcessOptions
from common.models import Net, NormNet
from common.run import run

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import lightning as L
import torch.distributed as dist
from cifar import LitClassifier
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard


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
def make_strategy(args):
    timeout = timedelta(seconds=args.timeout)
    if args.strategy == "ddp":
        return DDPStrategy(timeout=timeout)
    #: This one is FSDP2. strategy="fsdp" would be the one before it, which refuses the
    #: CPU. DataParallel is gone since Lightning 2.0.
    size = dict(
        data_parallel_size=args.devices * args.num_nodes, tensor_parallel_size=1
    )
    whole = dict(save_distributed_checkpoint=False)
    return ModelParallelStrategy(**size, **whole, timeout=timeout)


# %% Save and load
class LitResumable(LitClassifier):
    #: The Trainer saves and restores all the rest, also FSDP's shares as a whole.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = processes.gather(resume.random_states())

    def on_load_checkpoint(self, checkpoint):
        processes.take_random_states(checkpoint["random"])


def make_checkpoint(args):
    #: After each epoch's validation. It keeps the best three: those of most steps.
    last = dict(monitor="step", mode="max", save_top_k=3, save_on_train_epoch_end=False)
    name = dict(auto_insert_metric_name=False, enable_version_counter=False)
    folder = args.folder / "checkpoints"
    return ModelCheckpoint(folder, "step_{step:08d}", **last, **name)


# %% Evaluation
#: torchmetrics adds up its counts over all processes by itself; self.log does so with
#: sync_dist=True, as in LitClassifier.


# %% Training
class LitParallel(LitResumable):
    def configure_model(self):
        if self.hparams.strategy == "fsdp" and not isinstance(self.model, FSDPModule):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss_function(self.model(images), labels)
        #: Each process has the loss of its own images; sync_dist makes it the mean. It
        #: sends messages at each call: only where the Trainer writes it.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_validation_start(self):
        #: BatchNorm's averages are of a process's own images: all take the first one's.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    on_test_start = on_validation_start


def main(args):
    #: One process of each machine, which may have to download, then the others.
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    #: Each process takes its share of the order that seed and epoch give.
    train_loader, val_loader, test_loader = make_loaders(data, args)
    #: One seed for all: they begin with the same weights.
    L.seed_everything(args.seed, verbose=False)
    make = NormNet if args.batch_norm else Net
    net = make()
    if args.precision == "64-true":
        #: The Trainer does it too late: after loading a checkpoint's weights, rounded.
        net.double()
    if args.ckpt_path:
        #: To refuse what does not fit. The Trainer loads it again, with all the rest.
        checkpoints.load(net, args.ckpt_path)
    model = LitParallel(net, args)
    #: Each row at once: a run that is killed keeps them.
    csv = dict(version="", flush_logs_every_n_steps=1)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=make_strategy(args),
        sync_batchnorm=args.sync_batchnorm,
        precision=args.precision,
        #: The Trainer sends gradients only where a step follows, as no_sync does.
        accumulate_grad_batches=args.accumulate_grad_batches,
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, **csv),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[make_checkpoint(args), TQDMProgressBar(args.refresh_rate)],
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_loader, val_loader, ckpt_path=args.ckpt_path)
    trainer.test(model, test_loader, verbose=False)
    #: What is left is one network, however many processes trained it.
    trained = make().to(next(net.parameters()).dtype)
    trained.load_state_dict(processes.whole(net.state_dict()))
    return trained


if __name__ == "__main__":
    run(main, Args)
