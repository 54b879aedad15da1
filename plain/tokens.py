"""A small GPT that learns to write: a stream of batches, a mean over tokens, by hand.

Run it with `make plain-tokens`. Its twin is lightning/tokens.py.
"""

# %% Imports
from common.logger import CSVLogger
from common.models_text import GPT
from common.run import Options, run
from common.text import load_text, make_streams

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from callbacks import save
from cifar import choose_device, seed_everything
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


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
def with_last(batches):
    #: A stream does not know its end: one batch is fetched ahead, to know the last one.
    batches = iter(batches)
    batch = next(batches)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True


@torch.no_grad()
def evaluate(net, loader, device, stage):
    net.eval()
    total, tokens = 0.0, 0
    for batch in loader:
        batch = {name: value.to(device) for name, value in batch.items()}
        total += summed_loss(net, batch).item()
        tokens += (batch["target"] >= 0).sum().item()
    return {f"{stage}_loss": total / tokens}


def main(args):
    text = load_text(args)
    train_loader, val_loader, test_loader = make_streams(text, args)
    seed_everything(args.seed)
    device, group = choose_device(args.accelerator), args.accumulate_grad_batches
    net = GPT(len(text.letters)).to(device)
    optimizer = make_optimizer(net, args)
    #: The schedule must know its end, and no stream tells: count one pass.
    steps = args.max_epochs * math.ceil(sum(1 for _ in train_loader) / group)
    schedule = warm_up_and_cosine(optimizer, steps, args)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    half = args.precision == "bf16-mixed"
    autocast = torch.autocast(device.type, torch.bfloat16, half, cache_enabled=False)
    log, step = CSVLogger(args.folder).log_metrics, 0
    for epoch in range(args.max_epochs):
        train_loader.dataset.set_epoch(epoch)
        net.train()
        bar = tqdm(with_last(train_loader), f"Epoch {epoch}", disable=None)
        for number, (batch, last) in enumerate(bar, start=1):
            batch = {name: value.to(device) for name, value in batch.items()}
            with autocast:
                #: Each token of the window counts the same, however full a batch is.
                loss = summed_loss(net, batch) * batch["share"] * group
            (loss / group).backward()
            if number % group and not last:
                continue
            step += 1
            if step % args.log_every_n_steps == 0:
                log({"epoch": epoch, "train_loss": loss.item()}, step - 1)
            if args.gradient_clip_val:
                clip_grad_norm_(parameters, args.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with autocast:
            log({"epoch": epoch, **evaluate(net, val_loader, device, "val")}, step - 1)
        save("last", net, optimizer, epoch, step, args)
    with autocast:
        test = evaluate(net, test_loader, device, "test")
    log({"epoch": args.max_epochs, **test}, step)
    generate(net, text, args)
    return net


if __name__ == "__main__":
    run(main, Args)
