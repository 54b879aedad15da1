"""The loop of loop.py, moved to Lightning."""

import math

import lightning as L
import torch
from loop import LR, TextNet, accuracy, make_texts
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset


class EpochOrder(Sampler):
    """The loop's order: another one in each epoch, by the epoch's number."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):  # the Trainer calls it
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class LitText(L.LightningModule):
    def __init__(self, net, steps):
        super().__init__()
        self.net, self.steps = net, steps

    def training_step(self, batch, batch_idx):
        texts, kinds = batch
        return nn.functional.cross_entropy(self.net(texts), kinds)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(net, texts, kinds, epochs=3, batch_size=50, callbacks=()):
    data = TensorDataset(texts, kinds)
    loader = DataLoader(
        data, batch_size, sampler=EpochOrder(len(data)), generator=torch.Generator()
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=0.1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitText(net, epochs * math.ceil(len(data) / batch_size)), loader)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = TextNet()
    train(net, *make_texts(1000, seed=0))
    print(f"accuracy on new texts: {accuracy(net, *make_texts(1000, seed=1)):.1%}")
