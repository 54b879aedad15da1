"""Trace what Lightning's Trainer does, without importing it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .messages import BadInput
from .trace import Trace

Network = str | Callable[[nn.Module], nn.Module] | None


def callback(
    base: type, path: Path | str, every: int = 1, *, network: Network = None, **more: Any
) -> Any:
    """Return a callback for the Trainer that traces `fit`.

    `base` is your Lightning's class Callback, from `import lightning as L` or from
    `import pytorch_lightning as pl`; the two do not mix, and nothing here imports either:

        L.Trainer(callbacks=[callback(L.Callback, "port.trace")])

    `network` says which part of the LightningModule is traced: the name of an attribute, such as
    "net" or "student.body", or a function that returns it. Without it, that is the one attribute
    that holds all parameters which the optimizers hold, else the whole module; so parameters have
    the names that they have in a loop by hand, and a target network or a teacher beside it does
    not disturb. `every`, and `first` and `full` in `more`, are those of Trace. A second `fit` with
    the same network goes on in the same file; with another one it writes to it-2.trace.

    Raises BadInput where the module has no such part.
    """

    def on_fit_start(self: Any, trainer: Any, module: nn.Module) -> None:
        model = _network(module, network, trainer)
        traces = self.__dict__.setdefault("traces", [])
        again = [trace for trace in traces if trace.model is model]
        if not again:
            number = f"-{len(traces) + 1}" if traces else ""
            where = Path(path).with_stem(Path(path).stem + number)
            traces.append(Trace(model, path=where, every=every, **more))
        self.trace = (again or traces[-1:])[0].__enter__()

    def on_fit_end(self: Any, trainer: Any, module: nn.Module) -> None:
        self.trace.__exit__(None, None, None)

    def on_exception(self: Any, trainer: Any, module: nn.Module, error: BaseException) -> None:
        if hasattr(self, "trace"):
            self.trace.__exit__(type(error), error, None)

    methods: dict[str, Callable] = {
        "on_fit_start": on_fit_start, "on_fit_end": on_fit_end, "on_exception": on_exception,
    }  # fmt: skip
    return type("TraceCallback", (base,), methods)()


def _network(module: nn.Module, network: Network, trainer: Any) -> nn.Module:
    if callable(network):
        return network(module)
    if network is not None:
        try:
            return module.get_submodule(network)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children())
            raise BadInput(
                f"{type(module).__name__} has no part '{network}'; it has: {names}."
            ) from error
    optimizers = getattr(trainer, "optimizers", None) or []
    stepped = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    every = list(module.parameters())
    for child in module.children():
        own = {id(p) for p in child.parameters()}
        others = [p for p in every if id(p) not in own]
        # What is beside it is nothing, or copies that nobody trains: a target network, a teacher.
        shapes, copies = (sorted(str(p.shape) for p in x) for x in (child.parameters(), others))
        copied = shapes and copies == sorted(shapes * (len(copies) // len(shapes)))
        if own and (not others or (stepped and stepped <= own and copied)):
            return child
    return module
