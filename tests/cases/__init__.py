"""Pairs of a loop and its port, rebuilt from public reports, and what the doctor must say.

Each case has a mistake in its port, and mends it where `fixed` is true: then both train alike.
`make cases` tries all of them and writes the table in docs/doctor.md.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from samebits import Diagnosis, Trace, callback, compare
from torch import nn
from torch.utils.data import DataLoader, Dataset

F = nn.functional
CASES: dict[str, "Case"] = {}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


class Batches(Dataset):
    """A list of batches, each as it is."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def fit(module: L.LightningModule, batches: Any, callbacks: list, **more: Any) -> None:
    """Fit quietly, on batches that are ready; a generator of its own keeps the global one still."""
    loader = batches
    if not isinstance(batches, CombinedLoader):
        loader = DataLoader(Batches(batches), batch_size=None, generator=torch.Generator())
    usual = dict(max_epochs=1, accelerator="cpu", devices=1, logger=False, callbacks=callbacks,
                 enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False)  # fmt: skip
    L.Trainer(**(usual | more)).fit(module, loader)


class Lit(L.LightningModule):
    """What the ports share: a network, whether it is mended, and its optimizer."""

    def __init__(self, net: nn.Module, fixed: bool, optimizer: Any = None) -> None:
        super().__init__()
        self.net, self.fixed, self.make = net, fixed, optimizer

    def configure_optimizers(self) -> Any:
        return self.make(self.net)


class Case:
    """A pair: `build` gives the network, `loop` and `port` train it, `stage` and `cause` are right.

    `cause` is how the first cause must begin; None where the port has no mistake. `rounding` tells
    that the mended port differs by another order of sums. `network` is what the callback is told.
    """

    source = ""
    mistake = ""
    stage: str | None = None
    cause: str | None = None
    rounding = False
    network: Any = None

    def __init_subclass__(cls) -> None:
        if cls.mistake:  # else others are made of it
            CASES[cls.__name__] = cls()

    def build(self) -> nn.Module:
        raise NotImplementedError

    def watched(self, net: nn.Module) -> nn.Module:
        return net

    def loop(self, net: nn.Module) -> None:
        raise NotImplementedError

    def port(self, net: nn.Module, callbacks: list, fixed: bool) -> None:
        raise NotImplementedError

    def diagnose(self, fixed: bool) -> Diagnosis:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{side}.trace") for side in ("loop", "port")]
            torch.manual_seed(0)
            net = self.build()
            with Trace(self.watched(net), path=paths[0]):
                self.loop(net)
            torch.manual_seed(0)
            watcher = callback(L.Callback, paths[1], network=self.network)
            self.port(self.build(), [watcher], fixed)
            return compare(*paths)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Make one step on a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


__all__ = ["CASES", "Batches", "Case", "F", "Lit", "choices", "copy", "descend", "fit", "numbers"]

# Each of them adds its cases to CASES.
from . import (  # noqa: E402, F401
    adversaries,
    classifiers,
    encoders,
    formulas,
    sequences,
    steps,
    turns,
)
