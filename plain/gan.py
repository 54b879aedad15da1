"""Two optimizers by hand: a generator and a discriminator train against each other.

Run it with `make plain-gan`. Its twin is lightning/gan.py.
"""

# %% Imports
from common import checkpoints, figures
from common.data import Normalize, load_images, make_loaders
from common.logger import CSVLogger
from common.models import GAN
from common.run import Options, run

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from cifar import choose_device, seed_everything
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from tqdm import tqdm


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
@torch.no_grad()
def evaluate(gan, loader, device, stage):
    gan.eval()
    sums, count = [0.0, 0.0], 0
    for number, (images, _) in enumerate(loader):
        images = images.to(device)
        noise = random_numbers(images, gan, seed=number)
        for k, loss_function in enumerate((discriminator_loss, generator_loss)):
            sums[k] += loss_function(gan, images, noise).item() * len(images)
        count += len(images)
    names = f"{stage}_discriminator_loss", f"{stage}_generator_loss"
    return {name: total / count for name, total in zip(names, sums, strict=True)}


# %% Training
def main(args):
    data = load_images("cifar10", args, Normalize(mean=(0.5,) * 3, std=(0.5,) * 3))
    train_loader, val_loader, test_loader = make_loaders(data, args)
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    gan = GAN().to(device)
    first, second, warm_up, decay = make_optimizers(gan, args)
    turns = (
        (gan.discriminator, gan.generator, first, discriminator_loss),
        (gan.generator, gan.discriminator, second, generator_loss),
    )
    half, group = args.precision == "bf16-mixed", args.accumulate_grad_batches
    #: Each turn uses the discriminator's weights anew: a cache would add in bfloat16.
    autocast = torch.autocast(device.type, torch.bfloat16, half, cache_enabled=False)
    logger, step = CSVLogger(args.folder), 0
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        gan.train()
        bar = tqdm(train_loader, f"Epoch {epoch}", disable=None)
        for batch, (images, _) in enumerate(bar, start=1):
            images, losses = images.to(device), {}
            due = batch % group == 0 or batch == len(train_loader)
            for net, other, optimizer, loss_function in turns:
                #: No gradients for the other one: they would cost, and pile up.
                other.requires_grad_(False)
                with autocast:
                    loss = loss_function(gan, images, random_numbers(images, gan))
                (loss / group).backward()
                if due:
                    if args.gradient_clip_val:
                        clip_grad_norm_(net.parameters(), args.gradient_clip_val)
                    optimizer.step()
                    optimizer.zero_grad()
                    #: Both count: a batch makes two steps.
                    step += 1
                other.requires_grad_(True)
                losses[f"train_{loss_function.__name__}"] = loss
            if due:
                warm_up.step()
            batches = epoch * len(train_loader) + batch
            if batches % args.log_every_n_steps == 0:
                now = {name: loss.item() for name, loss in losses.items()}
                logger.log_metrics({"epoch": epoch, **now}, batches - 1)
        with autocast:
            val = evaluate(gan, val_loader, device, "val")
        logger.log_metrics({"epoch": epoch, **val}, batches - 1)
        ckpt = {"epoch": epoch, "global_step": step, "state_dict": gan.state_dict()}
        ckpt["optimizer_states"] = [first.state_dict(), second.state_dict()]
        ckpt["hyper_parameters"] = args.settings()
        checkpoints.save(args.folder / "checkpoints" / "last.ckpt", ckpt)
        figures.generated(gan, epoch, args.folder)
        decay.step()
    with autocast:
        test = evaluate(gan, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, batches)
    return gan


if __name__ == "__main__":
    run(main, Args)
