"""One process for each device: the Trainer's strategies DDP and FSDP2.

Run it with `make lightning-parallel DEVICES=2`. Its twin is plain/parallel.py.
"""

# %% Imports
from common import processes
from common.data import load_data
from common.options import count_batches
from common.runs import Run, fingerprints, read_rows, run_folder

from datetime import timedelta

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cifar import ImageDataModule, LitClassifier, make_trainer
from fashion import fit_and_test
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from resume import SafeIO
from torch.distributed.fsdp import FSDPModule, fully_shard


# %% Processes
def make_strategy(recipe, options):
    timeout = timedelta(seconds=recipe.timeout)
    #: --strategy dp: the Trainer dropped DataParallel in 2.0.
    processes.refuse_what_the_trainer_lacks(recipe)
    if recipe.strategy == "fsdp":
        #: This one is FSDP2. strategy="fsdp" would be the FSDP before it, which refuses the CPU.
        world = options.devices * recipe.num_nodes
        sizes = dict(data_parallel_size=world, tensor_parallel_size=1)
        return ModelParallelStrategy(**sizes, save_distributed_checkpoint=False, timeout=timeout)
    return DDPStrategy(timeout=timeout)


def start_process(trainer, model):
    #: The Trainer does this in fit. Before it, the processes agree on folder and checkpoint here.
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()


# %% Data
#: The loaders of cifar. Each process takes its share of the order that seed and epoch give.
class SharedData(ImageDataModule):
    done = None

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.sampler.carry_on(self.done or {})
        return loader


# %% Metrics
#: torchmetrics adds up its counts over all processes by itself; self.log does so with sync_dist.


# %% Fit
class LitParallel(LitClassifier):
    def configure_model(self):
        if self.recipe.strategy == "fsdp" and not isinstance(self.model, FSDPModule):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer):
        if (self.global_step + 1) % self.every == 0:
            running = torch.stack(self.losses[-self.every :]).mean()
            self.log("train_loss", running, sync_dist=True)

    def on_validation_start(self):
        #: BatchNorm's averages are of each process's own images: all take those of the first one.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    on_test_start = on_validation_start

    def on_save_checkpoint(self, checkpoint):
        order, size = self.trainer.train_dataloader.sampler.handed_out, self.recipe.batch_size
        run = processes.gather(self.losses, order, self.batches, size)
        rows = read_rows(self.folder) if self.trainer.is_global_zero else []
        checkpoint["run"] = run | {"rows": rows}
        checkpoint["hyper_parameters"] = self.settings

    def on_load_checkpoint(self, checkpoint):
        run = checkpoint["run"]
        self.trainer.datamodule.done = {e: order.tolist() for e, order in run["order"].items()}
        for row in run["rows"]:
            self.logger.log_metrics({k: v for k, v in row.items() if k != "step"}, row["step"])
        self.losses = processes.take_up(run, self.trainer.strategy.root_device)


def make_parallel_trainer(recipe, options):
    folder = run_folder(options, recipe.lesson, "lightning")
    trainer = make_trainer(
        recipe,
        options,
        folder,
        strategy=make_strategy(recipe, options),
        num_nodes=recipe.num_nodes,
        sync_batchnorm=recipe.sync_batchnorm,
        precision=recipe.precision,
        #: The Trainer sends gradients only where a step follows, as no_sync does.
        accumulate_grad_batches=recipe.accumulate_grad_batches,
        plugins=[SafeIO()],
    )
    after = dict(save_on_train_epoch_end=False, save_top_k=-1, auto_insert_metric_name=False)
    trainer.callbacks += [ModelCheckpoint(folder / "checkpoints", "step_{step:08d}", **after)]
    return trainer


# %% Run
def run(recipe, options):
    torch.set_num_threads(options.threads)
    L.seed_everything(recipe.seed, verbose=False)
    net = recipe.model()
    start = fingerprints(net.state_dict())
    #: The Trainer does it too late: after it has loaded a checkpoint's weights, and rounded them.
    net = net.double() if recipe.precision == "64-true" else net
    model = LitParallel(net, recipe, options.log_every_n_steps)
    trainer = make_parallel_trainer(recipe, options)
    start_process(trainer, model)
    #: One process of each machine, which may have to download, then the others.
    data = processes.in_turn(load_data, recipe, options)
    datamodule = SharedData(data, recipe, options)
    #: The first process makes the folder and finds the checkpoint; the others hear of it.
    model.settings, model.folder, path = processes.begin(recipe, options, data, "lightning")
    batches = len(datamodule.train_dataloader())
    model.batches = count_batches(batches, options.limit_train_batches)
    results = fit_and_test(trainer, model, datamodule, ckpt_path=path)
    *numbers, net, optimizer, device, seconds = results
    trained = (*processes.whole_model(net, optimizer, recipe), device, seconds)
    return Run("lightning", recipe, options, data, start, *numbers, *trained)


# %% Command line
def main():
    processes.command_line("parallel", run)


if __name__ == "__main__":
    main()
