"""What a network consists of: modules, parameters and buffers with their names, which are tied."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


class Layout:
    """The names of a network's parts.

    `look` finds parameters and buffers again: a module may replace them. `refresh` looks for the
    modules, too: a network can grow.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.foreign: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        named = list(self.model.named_modules(remove_duplicate=False))
        self.modules = {plain(name): module for name, module in self.model.named_modules()}
        self.names = {id(module): name for name, module in self.modules.items()}
        self.carriers = {id(m) for m in self.modules.values() if any(True for _ in m.parameters())}
        # What these give follows from what they get: it is read in full steps alone.
        self.plain = {id(m) for m in self.modules.values() if _is_activation(m)}
        # Where each parameter and buffer is kept, by every name that it has.
        self.homes: dict[str, tuple[dict, str]] = {}
        self.saved: dict[str, bool] = {}  # buffers, and whether a checkpoint holds them
        for name, module in named:
            where = plain(name) + "." * bool(plain(name))
            parameters, buffers = module._parameters, module._buffers
            if isinstance(module, torch.jit.ScriptModule):  # whose own are no dicts
                parameters = dict(module.named_parameters(recurse=False))
                buffers = dict(module.named_buffers(recurse=False))
            for own in parameters:
                self.homes[where + own] = (parameters, own)
            for own in buffers:
                self.homes[where + own] = (buffers, own)
                is_left_out = own in getattr(module, "_non_persistent_buffers_set", ())
                self.saved[where + own] = not is_left_out

        self.look()

    def look(self) -> None:
        """Look up all that is there; of tied parameters, by the first name of the alphabet.

        The order in which a network names them may differ from one run to the other.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        for name, (home, own) in self.homes.items():
            tensor = home.get(own)
            # torch.func.functional_call puts others in the place of parameters, for a while.
            is_own = name in self.saved or isinstance(tensor, nn.Parameter)
            if tensor is not None and is_own and not is_lazy(tensor):
                known = found.get(id(tensor), (name, tensor))
                found[id(tensor)] = (min(name, known[0]), tensor)
        self.tensors = dict(found.values())
        self.ids = {key: name for key, (name, _) in found.items() if name not in self.saved}
        self.parameters = {n: t for n, t in self.tensors.items() if n not in self.saved}

    @property
    def held(self) -> dict[str, Tensor]:
        """The buffers, as they are now."""
        found = {name: self.homes[name][0].get(self.homes[name][1]) for name in self.saved}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def tied(self) -> dict[str, str]:
        """Names of a tensor that has another name before: {'head.weight': 'emb.weight'}."""
        groups: dict[int, list[str]] = {}
        for name, (home, own) in self.homes.items():
            tensor = home.get(own)
            if tensor is not None:
                groups.setdefault(id(tensor), []).append(name)
        return {name: min(names) for names in groups.values() for name in names
                if name != min(names)}  # fmt: skip

    def held_by(self, optimizer: Optimizer) -> set[str]:
        """Return the names of the parameters that an optimizer holds."""
        self.look()  # a module may have replaced some
        ids = self.ids
        return {ids[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in ids}

    def is_held_by(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer holds a parameter, without a look: fast, and nearly always."""
        return any(id(p) in self.ids for g in optimizer.param_groups for p in g["params"])

    def is_sharded(self) -> bool:
        """Tell whether each process holds a part of the parameters, as with FSDP (1 and 2)."""
        marks = "_fsdp_wrapped_module", "_flat_param"
        return any(hasattr(p, "to_local") or any(mark in name for mark in marks)
                   for name, p in self.parameters.items())  # fmt: skip

    def name(self, module: nn.Module) -> str | None:
        return self.names.get(id(module))

    def inner(self, module: nn.Module) -> str | None:
        """Return the name of a module that is called within the network; it may be new."""
        if id(module) not in self.names and id(module) not in self.foreign:
            self.refresh()
            if id(module) not in self.names:
                self.foreign.add(id(module))
        return self.names.get(id(module))

    def original(self, module: nn.Module) -> nn.Module:
        """Return the network that a compiled one was made from."""
        if id(module) in self.names or type(module).__name__ != "OptimizedModule":
            return module
        return getattr(module, "_orig_mod", module)

    def carries(self, module: nn.Module) -> bool:
        return id(module) in self.carriers

    def mode(self) -> str:
        return "".join("1" if module.training else "0" for module in self.modules.values())

    def describe(self) -> dict[str, str]:
        """Return class and settings of each module without those of its children."""
        return {name: _describe(module) for name, module in self.modules.items()}


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    is_one = kind.__module__ == "torch.nn.modules.activation" and kind is not nn.RReLU
    return is_one and not any(True for _ in module.parameters())


def plain(name: str) -> str:
    """Leave out what torch.compile puts into a name."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _describe(module: nn.Module) -> str:
    try:
        return f"{type(module).__name__}({module.extra_repr()})"[:200]
    except Exception:
        return f"{type(module).__name__}(?)"


def plain_value(value: Any) -> Any:
    """Return a setting of an optimizer as JSON has it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [plain_value(x) for x in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)[:80]
