"""Predictions by the Trainer: streamed to the disk, in order, by processes; ONNX.

Run it with `make lightning-predict DEVICES=2`. Its twin is plain/predict.py.
"""

# %% Imports
from common import processes
from common.data import Normalize, load_images
from common.launch import Processes
from common.models import NormNet
from common.run import run

import importlib
from dataclasses import dataclass
from datetime import timedelta

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from cifar import ImageDataModule, LitClassifier
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy


# %% Hyperparameters
@dataclass
class Args(Processes):
    lr: float = 0.05  # learning rate
    momentum: float = 0.9  # of SGD
    batch_size: int = 32  # images in one batch, over all devices together
    max_epochs: int = 1  # passes over the training set, before it predicts
    onnx: bool = False  # export the network, and compare; needs the extra onnx


# %% Predictions
class PredictDataModule(ImageDataModule):
    def predict_dataloader(self):
        return self.test_dataloader()


class Writer(BasePredictionWriter):
    #: One batch is in memory, never all of them.
    def __init__(self, folder):
        super().__init__(write_interval="batch")
        self.folder, self.count = folder, 0

    def on_predict_start(self, trainer, module):
        rank = trainer.global_rank
        self.file = (self.folder / f"answers_{rank}.part").open("wb")

    def write_on_batch_end(self, trainer, module, probabilities, indices, *_):
        self.file.write(probabilities.cpu().numpy().tobytes())
        self.count += len(probabilities)

    def on_predict_end(self, trainer, module):
        self.file.close()
        #: All have to call, and all have written then.
        count = int(processes.add_up(self.count, module.device))
        if trainer.is_global_zero:
            self.put_together(count, trainer.world_size)

    def put_together(self, count, world):
        whole = np.empty((count, 10), dtype=np.float32)
        for rank in range(world):
            path = self.folder / f"answers_{rank}.part"
            #: One behind the other would be another order: process 0 has 0, 2, 4, ...
            whole[rank::world] = np.fromfile(path, np.float32).reshape(-1, 10)
            path.unlink()
        np.save(self.folder / "answers.npy", whole)


# %% Export
def export(model, images, path):
    #: The Trainer has put it back into train mode, and to_onnx exports it as it is: a
    #: dropout layer would become part of it.
    model.eval().cpu()
    #: Of any number of images, in one file.
    shapes, names = ({0: torch.export.Dim("batch")},), dict(input_names=["images"])
    one = dict(external_data=False, verbose=False, **names)
    model.to_onnx(path, images, dynamo=True, dynamic_shapes=shapes, **one)
    #: Imported where it is asked for: it is an extra.
    session = importlib.import_module("onnxruntime").InferenceSession(path)
    (theirs,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        ours = model(images).numpy()
    print(f"ONNX's logits differ from PyTorch's by {abs(ours - theirs).max():.1e}")


# %% Run
class LitPredict(LitClassifier):
    def forward(self, images):
        return self.model(images)

    #: The results can never be part of a backward pass: the Trainer's inference mode.
    def predict_step(self, batch, batch_idx):
        images, _ = batch
        return self(images).softmax(1)

    def on_validation_start(self):
        #: BatchNorm's averages are of a process's own images: all take the first one's.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    on_test_start = on_validation_start


def main(args):
    norm = Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)
    data = processes.in_turn(load_images, "cifar10", args, norm)
    L.seed_everything(args.seed, verbose=False)
    net = NormNet()
    model = LitPredict(net, args)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=DDPStrategy(timeout=timedelta(seconds=args.timeout)),
        deterministic="warn",
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[Writer(args.folder), TQDMProgressBar(args.refresh_rate)],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    datamodule = PredictDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    #: Otherwise it would collect all answers, in memory, and return them.
    trainer.predict(model, datamodule, return_predictions=False)
    if trainer.is_global_zero and args.onnx:
        export(model, data.test.__getitems__([0, 1])[0], args.folder / "model.onnx")
    return net


if __name__ == "__main__":
    run(main, Args)
