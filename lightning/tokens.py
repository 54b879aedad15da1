"""A small GPT that learns to write: a stream of batches, a mean over tokens.

Run it with `make lightning-tokens`. Its twin is plain/tokens.py.
"""

# %% Imports
from common.models_text import GPT
from common.run import Options, run
from common.text import load_text, make_streams

import math
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 2e-3  # learning rate, at its highest
    weight_decay: float = 0.1  # of matrices, not of biases and norms
    warmup_steps: int = 100  # steps in which the learning rate grows
    batch_size: int = 16  # pieces of text in one batch, of 32 to 128 characters each
    max_epochs: int = 20  # passes over the text
    accumulate_grad_batches: int = 2  # batches whose tokens share one step
    gradient_clip_val: float = 1.0  # what the gradients' norm is clipped to; 0: not
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # bf16: in half precision
    temperature: float = 0.7  # of the sample: smaller is surer
    sample_length: int = 600  # characters of the sample


# %% Optimizer
def make_optimizer(net, args):
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, args.lr, (0.9, 0.95), weight_decay=args.weight_decay
    )


def warm_up_and_cosine(optimizer, steps, args):
    def share(step):
        grown = (step + 1) / (args.warmup_steps + 1)
        done = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
        return min(grown, (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2)

    return LambdaLR(optimizer, share)


# %% Loss
def summed_loss(net, batch):
    logits = net(batch["input"])
    #: Padding has the target -100, which cross_entropy leaves out.
    targets = batch["target"].flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")


# %% Sample
@torch.no_grad()
def generate(net, text, args):
    net.eval()
    device, generator = next(net.parameters()).device, torch.Generator().manual_seed(0)
    tokens = text.test[:1].tolist()
    for _ in range(args.sample_length):
        #: Few pieces are longer than half the context: farther back it learns little.
        seen = torch.tensor([tokens[-net.context // 2 :]], device=device)
        logits = net(seen)[0, -1].float().cpu() / args.temperature
        tokens += torch.multinomial(logits.softmax(0), 1, generator=generator).tolist()
    sample = text.say(torch.tensor(tokens))
    (args.folder / "sample.txt").write_text(sample)
    print(sample)


# %% Training
class LitGPT(L.LightningModule):
    def __init__(self, model, args, batches):
        super().__init__()
        self.save_hyperparameters(args.settings())
        self.model, self.args, self.batches = model, args, batches

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model, self.args)
        #: estimated_stepping_batches is -1 for a stream, and a cosine believes it.
        steps = self.args.max_epochs * self.batches
        schedule = warm_up_and_cosine(optimizer, steps, self.args)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_epoch_start(self):
        #: The Trainer calls set_epoch of samplers, not of data sets.
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        #: Each token of the window counts the same. The Trainer divides by the group.
        group = self.args.accumulate_grad_batches
        loss = summed_loss(self.model, batch) * batch["share"] * group
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val_loss")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test_loss")

    def evaluate(self, batch, name):
        tokens = (batch["target"] >= 0).sum()
        #: Of a dict it would guess a batch size, and weigh the mean by that.
        mean = summed_loss(self.model, batch).double() / tokens
        self.log(name, mean, batch_size=tokens.item())


def main(args):
    text = load_text(args)
    train_loader, val_loader, test_loader = make_streams(text, args)
    L.seed_everything(args.seed, verbose=False)
    #: The schedule must know its end, and no stream tells: count one pass.
    batches = math.ceil(sum(1 for _ in train_loader) / args.accumulate_grad_batches)
    model = LitGPT(GPT(len(text.letters)), args, batches)
    folder, after = args.folder / "checkpoints", dict(save_on_train_epoch_end=False)
    last = ModelCheckpoint(folder, "last", enable_version_counter=False, **after)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        precision=args.precision,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip_val,
        callbacks=[last, TQDMProgressBar(args.refresh_rate)],
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_loader, val_loader)
    trainer.test(model, test_loader, verbose=False)
    generate(model.model, text, args)
    return model.model


if __name__ == "__main__":
    run(main, Args)
