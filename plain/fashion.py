"""The quickstart's MLP on FashionMNIST: its train loop and test loop, written by hand.

Run it with `make plain-fashion` or `python plain/fashion.py`. Its twin is
lightning/fashion.py. docs/fashion.md walks from this file to that one in five moves.
"""

# %% Imports
from common.data import load_images, make_loaders
from common.logger import CSVLogger
from common.models import MLP
from common.run import Options, run

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cifar import choose_device, compute_metrics, seed_everything
from torchsummary import summary
from tqdm import tqdm


# %% Hyperparameters
@dataclass
class Args(Options):
    lr: float = 1e-3  # learning rate
    batch_size: int = 64  # images in one batch
    max_epochs: int = 5  # passes over the training set
    one_hot: bool = False  # train on one-hot targets, made by a target_transform
    log_every_n_steps: int = 100  # steps from one logged training loss to the next


# %% Data
def to_one_hot(labels):
    #: cross_entropy takes class numbers or probabilities. Probabilities must be floats.
    return F.one_hot(labels, 10).float()


#: Move 4, the data module: main makes the DataLoaders and hands them on.


# %% Train loop and test loop
#: Move 1, the module: nothing holds the model, it goes from function to function.
#: Move 2, the training step: the loss is yours, the rest the Trainer will do.
def train_loop(model, loader, optimizer, device, epoch, logger, every):
    model.train()
    bar = tqdm(loader, f"Epoch {epoch}", disable=None)
    for step, (images, targets) in enumerate(bar, start=epoch * len(loader)):
        images, targets = images.to(device), targets.to(device)
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        #: The tutorial clears the gradients after the step. The result is the same.
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            bar.set_postfix(train_loss=loss.item())
            logger.log_metrics({"epoch": epoch, "train_loss": loss.item()}, step)


@torch.no_grad()
def test_loop(model, loader, device, stage):
    model.eval()
    total_loss, confusion = 0.0, torch.zeros(10, 10, dtype=torch.long)
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        #: The tutorial adds up the means of the batches and divides by their number.
        #: That is wrong where one batch is shorter.
        total_loss += F.cross_entropy(logits, labels).item() * len(labels)
        pairs = 10 * labels + logits.argmax(1)
        confusion += torch.bincount(pairs.cpu(), minlength=100).reshape(10, 10)
    return compute_metrics(total_loss, confusion, stage)


# %% Run
def main(args):
    data = load_images("fashionmnist", args)
    if args.one_hot:
        #: Only the targets to train on: accuracy is counted with class numbers.
        one_hot = replace(data.train, target_transform=to_one_hot)
        data = data._replace(train=one_hot)
    train_loader, val_loader, test_loader = make_loaders(data, args)
    summary(MLP(), (1, 28, 28), device="cpu")
    seed_everything(args.seed)
    device = choose_device(args.accelerator)
    net = MLP().to(device)
    #: Move 3, the optimizer: made here, stepped in train_loop.
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr)
    model = net
    if args.devices > 1:
        model = torch.nn.DataParallel(net, range(args.devices))
    logger, every = CSVLogger(args.folder), args.log_every_n_steps
    #: Move 5, the Trainer: this loop.
    for epoch in range(args.max_epochs):
        train_loader.sampler.set_epoch(epoch)
        train_loop(model, train_loader, optimizer, device, epoch, logger, every)
        #: The tutorial validates on the test set. If you choose by a set, you cannot
        #: test on it any more.
        val = test_loop(model, val_loader, device, "val")
        print(f"Epoch {epoch}:", ", ".join(f"{k} {v:.4f}" for k, v in val.items()))
        steps = (epoch + 1) * len(train_loader)
        logger.log_metrics({"epoch": epoch, **val}, steps - 1)
    test = test_loop(model, test_loader, device, "test")
    logger.log_metrics({"epoch": args.max_epochs, **test}, steps)
    return net


if __name__ == "__main__":
    run(main, Args)
