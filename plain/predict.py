"""Predictions by hand: streamed to the disk, in order, by processes; ONNX.

Run it with `make plain-predict DEVICES=2`. Its twin is lightning/predict.py.
"""

# %% Imports
from common import processes
from common.data import Normalize, load_images, make_loaders
from common.launch import Processes
from common.logger import CSVLogger
from common.models import NormNet
from common.run import run

import importlib
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from cifar import choose_device, seed_everything, train_epoch
from parallel import evaluate, start_process
from torch.nn.parallel import DistributedDataParallel


# %% Hyperparameters
@dataclass
class Args(Processes):
    lr: float = 0.05  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch, over all devices together
    max_epochs: int = 1  # passes over the training set, before it predicts
    onnx: bool = False  # export the network, and compare; needs the extra onnx


# %% Predictions
class Writer:
    #: One batch is in memory, never all of them.
    def __init__(self, folder, rank):
        self.folder, self.file = folder, (folder / f"answers_{rank}.part").open("wb")

    def write(self, probabilities):
        self.file.write(probabilities.cpu().numpy().tobytes())

    def put_together(self, count, world):
        whole = np.empty((count, 10), dtype=np.float32)
        for rank in range(world):
            path = self.folder / f"answers_{rank}.part"
            #: One behind the other would be another order: process 0 has 0, 2, 4, ...
            whole[rank::world] = np.fromfile(path, np.float32).reshape(-1, 10)
            path.unlink()
        np.save(self.folder / "answers.npy", whole)


#: As no_grad, and results can never be part of a backward pass.
@torch.inference_mode()
def predict(net, loader, device, writer):
    net.eval()
    for images, _ in loader:
        writer.write(net(images.to(device)).softmax(1))
    writer.file.close()


# %% Export
def export(net, images, path):
    #: In eval mode, or a dropout layer becomes part of what is exported.
    net.eval().cpu()
    #: Of any number of images, in one file.
    shapes, names = ({0: torch.export.Dim("batch")},), dict(input_names=["images"])
    one = dict(external_data=False, verbose=False, **names)
    torch.onnx.export(net, (images,), path, dynamic_shapes=shapes, **one)
    #: Imported where it is asked for: it is an extra.
    session = importlib.import_module("onnxruntime").InferenceSession(path)
    (theirs,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        ours = net(images).numpy()
    print(f"ONNX's logits differ from PyTorch's by {abs(ours - theirs).max():.1e}")


# %% Run
def main(args):
    device = choose_device(args.accelerator)
    start_process(args, device)
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    net = NormNet().to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
    rank, world = dist.get_rank(), dist.get_world_size()
    #: The first process alone writes: two would mix their rows.
    logger = CSVLogger(args.folder) if rank == 0 else None
    every = args.log_every_n_steps if rank == 0 else sys.maxsize
    #: As the Trainer does with several processes, before it fits, tests and predicts.
    seed_everything(args.seed)
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        train_epoch(model, train_loader, optimizer, device, epoch, logger, every)
        steps = (epoch + 1) * len(train_loader)
        val = evaluate(net, val_loader, device, "val")
        if logger:
            logger.log_metrics({"epoch": epoch, **val}, steps - 1)
    seed_everything(args.seed)
    test = evaluate(net, test_loader, device, "test")
    if logger:
        logger.log_metrics({"epoch": args.max_epochs, **test}, steps)
    seed_everything(args.seed)
    writer = Writer(args.folder, rank)
    predict(net, test_loader, device, writer)
    #: All have to call, and all have written then.
    count = int(processes.add_up(len(test_loader.sampler), device))
    if rank == 0:
        writer.put_together(count, world)
    if rank == 0 and args.onnx:
        export(net, data.test.__getitems__([0, 1])[0], args.folder / "model.onnx")
    return net


if __name__ == "__main__":
    run(main, Args)
