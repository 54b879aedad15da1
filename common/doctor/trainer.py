"""Trace what Lightning's Trainer does, without importing it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .trace import Trace


def callback(base: type, path: Path | str, every: int = 1) -> Any:
    """Return a callback for the Trainer that traces `fit`.

    `base` is your Lightning's class Callback, from `import lightning as L` or from
    `import pytorch_lightning as pl`; the two do not mix, and nothing here imports either:

        L.Trainer(callbacks=[callback(L.Callback, "port.trace")])

    Of a LightningModule that keeps its network in one attribute, that network is traced, so that
    parameters have the names that they have in a loop by hand.
    """

    def on_fit_start(self: Any, trainer: Any, module: nn.Module) -> None:
        self.trace = Trace(_network(module), path=path, every=every).__enter__()

    def on_fit_end(self: Any, trainer: Any, module: nn.Module) -> None:
        self.trace.__exit__(None, None, None)

    def on_exception(self: Any, trainer: Any, module: nn.Module, error: BaseException) -> None:
        if hasattr(self, "trace"):
            self.trace.__exit__(type(error), error, None)

    methods: dict[str, Callable] = {
        "on_fit_start": on_fit_start, "on_fit_end": on_fit_end, "on_exception": on_exception,
    }  # fmt: skip
    return type("TraceCallback", (base,), methods)()


def _network(module: nn.Module) -> nn.Module:
    """Return the one attribute that has all parameters, or the module itself."""
    own = set(module.parameters())
    for child in module.children():
        if set(child.parameters()) == own:
            return child
    return module
