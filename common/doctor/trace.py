"""Watch a training run from outside, through PyTorch's hooks, and write down what each step did.

    with Trace(net, path="mine.trace"):
        train(net, ...)          # any code: a loop by hand, trainer.fit, a stranger's

Nothing in that code changes, and it reaches the same bits with the trace as without it: the hooks
only read, and draw no random number. `samebits a.trace b.trace` holds two such files against each
other.

A trace is JSON, one line for each optimizer step, compressed by gzip. What costs is that all
tensors of a step are read once more: docs/doctor.md has the measurement. `every=10` records the
steps 1, 11, 21 ... alone, `first=90` those from 90 on.
"""

import functools
import gzip
import hashlib
import json
import platform
import random
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from .files import FORMAT
from .fingerprints import between, digest, excerpt, fingerprint, raw_bytes, rows
from .messages import BadInput


class Trace:
    """Record what each optimizer step of `model` saw and did, from `with` to the block's end.

    `model` is the network whose forward pass takes the batch. `optimizer` is only needed where
    several optimizers hold its parameters and one of them is meant; the Trainer makes its own
    within fit, and it is found. `path` is written when the block ends, also by an error. `every`
    is the distance between two recorded steps, `first` the first one that is recorded.

    Raises BadInput where model is no module with parameters, every is no positive number, or no
    file can be written at path.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, path: Path | str,
        every: int = 1, first: int = 1,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
            raise BadInput(
                f"Trace watches a network, a torch.nn.Module with parameters, and got "
                f"{type(model).__name__}; give it the module whose forward pass takes the batch."
            )
        if not isinstance(every, int) or every < 1:
            raise BadInput(f"every is {every!r}, but it is a distance between steps: 1, 2, 3 ...")
        if not isinstance(first, int) or first < 1:
            raise BadInput(f"first is {first!r}, but it is the number of a step: 1, 2, 3 ...")
        self.model, self.optimizer, self.every, self.first = model, optimizer, every, first
        self.path = Path(path)
        self.steps = self.depth = 0
        self.batches: list[dict] = []  # the forward passes since the last step
        self.evaluation: dict[str, Any] = _no_evaluation()
        self.backward = 0
        self.fresh: dict[str, Tensor] = {}  # what the backward passes since the last step gave
        self.used: dict[str, Tensor] = {}  # what the last step used
        self.after = ""  # the bits of the weights after the last step
        self.hooked: set[int] = set()
        self.handles: list[Any] = []

    def __enter__(self) -> "Trace":
        self.temporary = self.path.with_name(f"{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            raw = self.temporary.open("wb")
        except OSError as error:
            raise BadInput(
                f"no trace can be written to '{self.path}': {error.strerror}; name another path."
            ) from error
        # Without a name and a time in it: traces of the same content are the same file.
        self.raw, self.file = raw, gzip.GzipFile("", "wb", 5, raw, 0)
        self.names = {module: name for name, module in self.model.named_modules()}
        carriers = [m for m in self.names if any(True for _ in m.parameters())]
        for module in self.names:
            # Before all other hooks, and after them: what the layer was given, and what it gave.
            begin = functools.partial(self._begin, carries=module in carriers)
            self.handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end, always_call=True))
        self.handles.append(register_optimizer_step_post_hook(self._step))
        self.after = self._state()
        self._write(
            {
                "trace": FORMAT,
                "every": self.every,
                "first": self.first,
                "modules": {name: _describe(module) for module, name in self.names.items()},
                "environment": _environment(next(self.model.parameters())),
                "start": self._weights(),
            }
        )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.handles:
            return  # closed before
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._write(
            {
                "end": self.steps,
                "error": None if kind is None else f"{kind.__name__}: {error}"[:200],
                "weights": {} if self._state() == self.after else self._weights(),
            }
        )
        self.file.close()
        self.raw.close()
        self.temporary.replace(self.path)

    # A network that is copied or saved within the block takes its hooks with it: those of a copy
    # change nothing, because the trace does not know it; those of a saved one do nothing.

    def __deepcopy__(self, memo: dict) -> "Trace":
        return self

    def __reduce__(self) -> tuple:
        return (_Silent, ())

    # The forward pass.

    def _begin(self, module: nn.Module, args: Any, kwargs: Any, carries: bool) -> None:
        """Before a module's forward pass; the outermost with parameters is that of the batch."""
        if module not in self.names:
            return  # a copy, such as a moving average
        if self.depth:
            self.depth += 1  # a layer of it
        if self.depth or not carries:
            return
        self.depth = 1
        self.layers: dict[str, dict] = {}
        if not self._is_due():
            return
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not torch.is_grad_enabled():
            self._evaluated(inputs)
            return
        self._hook_parameters()
        state = self._state()
        self.batches.append(
            {
                "inputs": [fingerprint(x) for x in inputs],
                "rows": rows(inputs),
                "excerpt": excerpt(inputs),
                "mode": "".join(str(int(m.training)) for m in self.names),
                # All weights again only where somebody changed them since the last step.
                "changed": {} if state == self.after else self._weights(),
                "random": _random_states(),
                "threads": torch.get_num_threads(),
                "evaluation": self.evaluation,
                "layers": self.layers,
            }
        )
        self.after, self.evaluation = state, _no_evaluation()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module's forward pass."""
        if not self.depth or module not in self.names:
            return
        self.depth -= 1
        if not self._is_due() or not torch.is_grad_enabled() or output is None:
            return
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if self.depth:
            name = self.names[module]
            calls = sum(layer.split(" ")[0] == name for layer in self.layers)
            name += f" (call {calls + 1})" if calls else ""
            self.layers[name] = fingerprint(tensors[0]) if tensors else {}
            return
        batch = self.batches[-1]
        batch["outputs"], batch["loss"] = [fingerprint(x) for x in tensors], {}
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._loss, batch, place))

    def _loss(self, batch: dict, place: int, gradient: Tensor) -> None:
        """The loss's gradient with respect to an output: all that the backward pass is told."""
        batch["loss"][f"output {place + 1}"] = fingerprint(gradient)
        batch["loss_rows"], batch["loss_excerpt"] = rows([gradient]), excerpt([gradient])

    def _evaluated(self, inputs: list[Tensor]) -> None:
        """Count a forward pass without gradients, as in a validation."""
        seen = self.evaluation
        seen["batches"] += 1
        seen["mode"] = "".join(str(int(m.training)) for m in self.names)
        seen["rows"] = digest((seen["rows"] + "".join(rows(inputs))).encode())

    # The backward pass.

    def _hook_parameters(self) -> None:
        """Watch the gradients of all parameters; also of those that were frozen before."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in self.hooked:
                self.hooked.add(id(parameter))
                hook = functools.partial(self._gradient, name)
                self.handles.append(parameter.register_hook(hook))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        """Add up what the backward passes give, as they give it: before anything is done to it."""
        if not self._is_due():
            return
        gradient = gradient.detach()
        if name in self.fresh:
            self.fresh[name] = self.fresh[name] + gradient
        else:
            self.fresh[name] = gradient.clone()

    # The step.

    def _step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After an optimizer's step: the gradients that it used are still there."""
        if optimizer is not (self.optimizer or optimizer):
            return
        named = {id(p): name for name, p in self.model.named_parameters()}
        groups = [
            [named.get(id(p), "a parameter from elsewhere") for p in group["params"]]
            for group in optimizer.param_groups
        ]
        if not any(id(p) in named for group in optimizer.param_groups for p in group["params"]):
            return
        due = self._is_due()
        self.steps += 1
        if due:
            self._record(optimizer, groups)
        self.batches, self.fresh = [], {}

    def _record(self, optimizer: Optimizer, groups: list[list[str]]) -> None:
        used = {
            name: p.grad.detach().clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        # A forward pass that no backward pass followed was an evaluation, whatever it looked like.
        trained = [batch for batch in self.batches if batch.get("loss")] or self.batches
        self.after = self._state()
        self._write(
            {
                "step": self.steps,
                "batches": trained,
                "without_backward": len(self.batches) - len(trained),
                "fresh": {name: fingerprint(g) for name, g in self.fresh.items()},
                "used": {name: fingerprint(g) for name, g in used.items()},
                "between": between(self.fresh, used, self.used),
                "optimizer": type(optimizer).__name__,
                "groups": [
                    {"params": names} | {k: _plain(v) for k, v in group.items() if k != "params"}
                    for names, group in zip(groups, optimizer.param_groups, strict=True)
                ],
                "weights": self._weights(),
                "state": self._optimizer_state(optimizer),
            }
        )
        self.used = used

    def _is_due(self) -> bool:
        """Tell whether the step that comes is recorded."""
        later = self.steps + 1 - self.first
        return later >= 0 and later % self.every == 0

    def _weights(self) -> dict[str, dict]:
        """Fingerprint all parameters, and buffers such as BatchNorm's running averages."""
        return {name: fingerprint(value) for name, value in _tensors(self.model).items()}

    def _state(self) -> str:
        """Return one digest of all parameters and buffers."""
        digest = hashlib.sha256()
        for value in _tensors(self.model).values():
            digest.update(raw_bytes(value))
        return digest.hexdigest()[:16]

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, dict]:
        named = {id(p): name for name, p in self.model.named_parameters()}
        return {
            f"{named.get(id(p), '?')}: {key}": fingerprint(value)
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write((json.dumps(line) + "\n").encode())


class _Silent:
    """What a saved network has in place of the trace."""

    def _begin(self, *args: Any, **kwargs: Any) -> None: ...
    def _end(self, *args: Any) -> None: ...


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also those that the state_dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _random_states() -> dict[str, str]:
    """Return digests of the states of the global random generators."""
    state: Any = np.random.get_state()
    states = {
        "torch": digest(torch.get_rng_state().numpy().tobytes()),
        "numpy": digest(state[1].tobytes() + bytes([state[2] % 256])),
        "random": digest(np.array(random.getstate()[1]).tobytes()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = digest(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def _environment(parameter: Tensor) -> dict[str, Any]:
    """Return what can change the last bit of a sum."""
    modules = ("torch", "lightning", "pytorch_lightning", "numpy")
    loaded = {name: sys.modules.get(name) for name in modules}
    return {
        "threads": torch.get_num_threads(),
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: str(m.__version__) for name, m in loaded.items() if m is not None},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "onednn": torch.backends.mkldnn.enabled,
    }


def _describe(module: nn.Module) -> str:
    """Return class and settings of a module without those of its children."""
    return f"{type(module).__name__}({module.extra_repr()})"


def _plain(value: Any) -> Any:
    """Return a setting of an optimizer as JSON has it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _no_evaluation() -> dict[str, Any]:
    return {"batches": 0, "mode": "", "rows": ""}
