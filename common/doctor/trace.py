"""Watch a training run from outside, through PyTorch's hooks, and write down what each step did.

    with Trace(net, path="mine.trace"):
        train(net, ...)          # any code: a loop by hand, trainer.fit, a stranger's

Nothing in that code changes, and it reaches the same bits with the trace as without it: the hooks
only read, and draw no random number. `common.doctor` holds two such files against each other.

A trace is JSON, one line for each optimizer step, compressed by gzip. What costs is that all
tensors of a step are read once more: docs/doctor.md has the measurement. `every=10` records the
steps 1, 11, 21 ... alone.
"""

from common.messages import BadInput

import functools
import gzip
import hashlib
import json
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

FORMAT = 1  # raised when the content of a trace changes
BUCKETS, COLUMNS = 16, 1024  # of a sketch, see below
EXCERPT = 48  # values of the first sample that are written out


class Trace:
    """Record what each optimizer step of `model` saw and did, from `with` to the block's end.

    `model` is the network whose forward pass takes the batch. `optimizer` is only needed where
    several optimizers hold its parameters and one of them is meant; the Trainer makes its own
    within fit, and it is found. `path` is written when the block ends, also by an error. `every`
    is the distance between two recorded steps.

    Raises BadInput where model is no module with parameters, every is no positive number, or no
    file can be written at path.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, path: Path | str,
        every: int = 1,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
            raise BadInput(
                f"Trace watches a network, a torch.nn.Module with parameters, and got "
                f"{type(model).__name__}; give it the module whose forward pass takes the batch."
            )
        if not isinstance(every, int) or every < 1:
            raise BadInput(f"every is {every!r}, but it is a distance between steps: 1, 2, 3 ...")
        self.model, self.optimizer, self.every = model, optimizer, every
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
                "rows": _rows(inputs),
                "excerpt": _excerpt(inputs),
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
        batch["loss_rows"], batch["loss_excerpt"] = _rows([gradient]), _excerpt([gradient])

    def _evaluated(self, inputs: list[Tensor]) -> None:
        """Count a forward pass without gradients, as in a validation."""
        seen = self.evaluation
        seen["batches"] += 1
        seen["mode"] = "".join(str(int(m.training)) for m in self.names)
        seen["rows"] = _digest((seen["rows"] + "".join(_rows(inputs))).encode())

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
                "between": _between(self.fresh, used, self.used),
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
        return self.steps % self.every == 0

    def _weights(self) -> dict[str, dict]:
        """Fingerprint all parameters, and buffers such as BatchNorm's running averages."""
        return {name: fingerprint(value) for name, value in _tensors(self.model).items()}

    def _state(self) -> str:
        """Return one digest of all parameters and buffers."""
        digest = hashlib.sha256()
        for value in _tensors(self.model).values():
            digest.update(_bytes(value))
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


# What is written of a tensor.


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Return what identifies a tensor and what tells how far two of them are apart.

    `bits` is a digest of its bytes: equal bits, equal tensors. `norm` is the Euclidean norm, `sum`
    the sum, `max` the largest magnitude, `zeros` how many values are 0. `sketch` are 16 sums of
    the values with random signs, the same for all tensors of that size; the norm of the difference
    of two sketches is, but for a third of it, that of the tensors' difference (a count sketch:
    Charikar, Chen and Farach-Colton 2002, https://doi.org/10.1007/3-540-45465-9_59).
    """
    tensor = tensor.detach()
    values = tensor.to("cpu", torch.float64).flatten().numpy()
    with np.errstate(all="ignore"):  # a training that diverges is recorded, too
        return {
            "bits": _digest(_bytes(tensor)),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": _short(float(np.linalg.norm(values))),
            "sum": _short(float(values.sum())),
            "max": _short(float(np.abs(values).max(initial=0))),
            "zeros": len(values) - int(np.count_nonzero(values)),
            "sketch": [_short(x) for x in _sketch(values).tolist()],
        }


def _sketch(values: np.ndarray) -> np.ndarray:
    """Add up the values with signs, in 16 buckets [16].

    The sign of a value is the product of those of its row and of its column in a table of 1,024
    columns: two values have independent signs, and few numbers make them all.
    """
    rows = -(-len(values) // COLUMNS)
    if len(values) < COLUMNS:
        signed = values * _signs(0, COLUMNS)[: len(values)]
    else:
        table = np.zeros(rows * COLUMNS)
        table[: len(values)] = values
        signed = _signs(1, rows) @ table.reshape(rows, COLUMNS) * _signs(0, COLUMNS)
    padded = np.zeros(COLUMNS)
    padded[: len(signed)] = signed
    return padded.reshape(-1, BUCKETS).sum(0)


@functools.cache
def _signs(seed: int, count: int) -> np.ndarray:
    """Return `count` signs; from a generator of their own, so that the training draws its own."""
    return np.random.default_rng(seed).integers(0, 2, count) * 2.0 - 1


def _between(
    fresh: dict[str, Tensor], used: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, Any]:
    """Say what became of the gradients between the backward passes and the step.

    `same` tells whether they are those that the backward passes gave. If not, `cosine` is that of
    the angle between both (1: only their length changed) and `ratio` of their lengths; and
    `left_over` the cosine between what was added and the gradients of the step before.
    """
    names = [name for name in used if name in fresh]
    if not names or all(torch.equal(used[name], fresh[name]) for name in names):
        return {"same": True}
    ours, theirs = _flat(used, names), _flat(fresh, names)
    said = {"same": False, "cosine": _cosine(ours, theirs)}
    said["ratio"] = _short(float(ours.norm() / theirs.norm()))
    if all(name in before for name in names):
        said["left_over"] = _cosine(ours - theirs, _flat(before, names))
    return said


def _flat(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].to("cpu", torch.float64).flatten() for name in names])


def _cosine(a: Tensor, b: Tensor) -> float:
    return _short(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300)))


def _rows(tensors: list[Tensor]) -> list[str]:
    """Return a digest for each sample of a batch, the first dimension of the first tensor."""
    if not tensors or tensors[0].dim() == 0:
        return []
    return [_digest(_bytes(row), 4) for row in tensors[0].detach().cpu()]


def _excerpt(tensors: list[Tensor]) -> list[float]:
    """Return some values of the first sample [48], evenly spaced; all where there are fewer."""
    if not tensors or tensors[0].dim() == 0 or not len(tensors[0]):
        return []
    values = tensors[0][0].detach().flatten()
    places = torch.linspace(0, len(values) - 1, min(EXCERPT, len(values))).long()
    return [_short(x) for x in values[places.to(values.device)].double().tolist()]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(content: bytes, size: int = 8) -> str:
    return hashlib.sha256(content).hexdigest()[: 2 * size]


def _short(number: float) -> float:
    """Return a number with 10 digits: enough for its size; the bits tell what is equal."""
    return float(f"{number:.10g}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also those that the state_dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _random_states() -> dict[str, str]:
    """Return digests of the states of the global random generators."""
    state: Any = np.random.get_state()
    states = {
        "torch": _digest(torch.get_rng_state().numpy().tobytes()),
        "numpy": _digest(state[1].tobytes() + bytes([state[2] % 256])),
        "random": _digest(np.array(random.getstate()[1]).tobytes()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = _digest(torch.cuda.get_rng_state().numpy().tobytes())
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


# Reading a trace.


def read(path: Path | str) -> list[str]:
    """Return the lines of a trace, as they are written.

    Raises BadInput where there is no such file, or it is no trace of this format.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        head, end = json.loads(lines[0]), json.loads(lines[-1])
    except FileNotFoundError as error:
        part = Path(f"{path}.part").exists()
        why = "only its beginning, .part: the run was killed, or still goes on" if part else ""
        raise BadInput(
            f"there is no trace '{path}'{'; ' + why if why else ''}; "
            "make one: with Trace(net, path=...), see docs/doctor.md."
        ) from error
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise BadInput(f"'{path}' is no trace, or not a whole one; make it again.") from error
    if not isinstance(head, dict) or head.get("trace") != FORMAT or "end" not in end:
        raise BadInput(f"'{path}' is no trace of format {FORMAT}; make it again.")
    return lines
