"""Two optimizers on the Trainer: manual optimization hands the loop's body back.

Run it with `make lightning-gan`. Its twin is plain/gan.py.
"""

# %% Imports
from common import figures
from common.data import Normalize, load_images
from common.models import GAN
from common.run import Options, run

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from cifar import ImageDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR


# %% Hyperparameters
@dataclass
class Args(Options):
    generator_lr: float = 1e-3  # learning rate of the generator's Adam, at the start
    discriminator_lr: float = 5e-4  # of the discriminator's
    generator_decay: float = 0.8  # the generator's learning rate, times this per epoch
    warmup_steps: int = 100  # steps in which the discriminator's learning rate grows
    batch_size: int = 64  # images in one batch
    max_epochs: int = 5  # passes over the training set
    accumulate_grad_batches: int = 1  # batches whose gradients add up to one step
    gradient_clip_val: float = 5.0  # what each network's norm is clipped to; 0: not
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # bf16: in half precision


# %% Losses
def random_numbers(images, gan, seed=None):
    #: On the CPU, so that all devices get the same ones.
    own = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(len(images), gan.latent, generator=own).to(images.device)


def discriminator_loss(gan, images, noise):
    #: detach: its step must not reach the generator.
    real, fake = gan.discriminator(images), gan.discriminator(gan(noise).detach())
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    right = F.binary_cross_entropy_with_logits(real, ones)
    return right + F.binary_cross_entropy_with_logits(fake, zeros)


def generator_loss(gan, images, noise):
    fake = gan.discriminator(gan(noise))
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


# %% Optimizers
def make_optimizers(gan, args):
    lr, betas = args.discriminator_lr, (0.5, 0.999)
    first = torch.optim.Adam(gan.discriminator.parameters(), lr, betas)
    second = torch.optim.Adam(gan.generator.parameters(), args.generator_lr, betas)
    warm_up = LambdaLR(first, lambda step: min(1, (step + 1) / (args.warmup_steps + 1)))
    return first, second, warm_up, ExponentialLR(second, args.generator_decay)


# %% Evaluation
class Evaluated(L.LightningModule):
    def validation_step(self, batch, batch_idx):
        self.evaluate(batch[0], batch_idx, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch[0], batch_idx, "test")

    def evaluate(self, images, batch_idx, stage):
        noise = random_numbers(images, self.model, seed=batch_idx)
        for loss_function in (discriminator_loss, generator_loss):
            loss = loss_function(self.model, images, noise).double()
            self.log(f"{stage}_{loss_function.__name__}", loss, batch_size=len(images))


# %% Training
class LitGAN(Evaluated):
    def __init__(self, model, args):
        super().__init__()
        self.save_hyperparameters(args.settings())
        self.model = model
        #: From here on the Trainer moves batches, and calls nothing of what follows.
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second, *schedules = make_optimizers(self.model, self.hparams)
        #: An interval would be ignored: manual optimization moves schedules by hand.
        return [first, second], schedules

    def training_step(self, batch, batch_idx):
        images, _ = batch
        losses = discriminator_loss, generator_loss
        group = self.hparams.accumulate_grad_batches
        due = (batch_idx + 1) % group == 0 or self.trainer.is_last_batch
        for optimizer, loss_function in zip(self.optimizers(), losses, strict=True):
            #: No gradients for the other one: they would cost, and pile up.
            with self.toggled_optimizer(optimizer):
                noise = random_numbers(images, self.model)
                loss = loss_function(self.model, images, noise)
                self.manual_backward(loss / group)
                if due:
                    if clip := self.hparams.gradient_clip_val:
                        self.clip_gradients(optimizer, clip, "norm")
                    #: Both count for global_step: a batch makes two steps.
                    optimizer.step()
                    optimizer.zero_grad()
            self.log(f"train_{loss_function.__name__}", loss)
        if due:
            self.lr_schedulers()[0].step()

    def on_train_epoch_end(self):
        folder = Path(self.trainer.log_dir)
        figures.generated(self.model, self.current_epoch, folder)
        self.lr_schedulers()[1].step()


def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    L.seed_everything(args.seed, verbose=False)
    model = LitGAN(GAN(), args)
    folder, after = args.folder / "checkpoints", dict(save_on_train_epoch_end=False)
    last = ModelCheckpoint(folder, "last", enable_version_counter=False, **after)
    #: With manual optimization it refuses to clip and to accumulate by itself.
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        deterministic="warn",
        precision=args.precision,
        logger=CSVLogger(args.folder.parent, args.folder.name, version=""),
        log_every_n_steps=args.log_every_n_steps,
        callbacks=[last, TQDMProgressBar(args.refresh_rate)],
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    datamodule = ImageDataModule(data, args)
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule, verbose=False)
    return model.model


if __name__ == "__main__":
    run(main, Args)
