"""Watch a training run from outside, through PyTorch's hooks, and write down what each step did.

    with Trace(net, path="mine.trace"):
        train(net, ...)          # any code: a loop by hand, trainer.fit, a stranger's

Nothing in that code changes, and it reaches the same bits with the trace as without it: the hooks
only read, draw no random number, and what goes wrong in them is noted and ends nothing.
`samebits a.trace b.trace` holds two such files against each other.

A trace is JSON, one line for each optimizer step, compressed by gzip. `every=10` records the steps
1, 11, 21 ... alone, `first=90` those from 90 on. The first step that is recorded is written in
full; of later ones digests, and the numbers of all tensors of a stage together. `full=(7, 8)` has
those in full, too. docs/doctor.md has what it costs.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bystander import Hooks, bystander, is_recomputing, is_within_a_step
from .environment import environment, process, random_states, torch_state
from .files import FORMAT, Writer, path_of_rank
from .fingerprints import bits, checksum, digest, excerpt, is_batch, not_seen, rows, seen
from .layout import Layout
from .messages import BadInput
from .record import Gradients, Weights, call_name, known_as, no_evaluation, number_of, step_line
from .rounding import nudge as nudge_weights
from .walk import Unseen, leaves, positional
from .zoom import Operators

MANY = 8  # forward passes without gradients before a step that are recorded; more are counted
VALUES, SOME = 4096, 96  # of an output and of its gradient, in a step in full, and in others


class Trace:
    """Record what each optimizer step of `model` saw and did, from `with` to the block's end.

    `model` is the network whose forward pass takes the batch. `optimizer` is only needed where
    several optimizers hold its parameters and one of them is meant; the Trainer makes its own
    within fit, and it is found. `path` is written when the block ends, also by an error; several
    processes write a file each, with the rank in its name. `every` is the distance between two
    recorded steps, `first` the first one that is recorded, `full` those that are written in full
    beside it. `zoom` is a step of which each operator is recorded, for `samebits --zoom`.
    `nudge` moves all weights by one unit in the last place when the block begins, for `samebits
    --nudged`: such a run is no longer the same. Entered a second time, it goes on in the same file.

    Raises BadInput where model is no module with parameters, every, first or full are no positive
    numbers, or no file can be written at path. Once the block has begun, it raises nothing.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, path: Path | str,
        every: int = 1, first: int = 1, full: Collection[int] = (), zoom: int = 0,
        nudge: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
            raise BadInput(
                f"Trace watches a network, a torch.nn.Module with parameters, and got "
                f"{type(model).__name__}; give it the module whose forward pass takes the batch."
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise BadInput("Trace sees no call in a ScriptModule; trace what was scripted.")
        if not isinstance(every, int) or every < 1:
            raise BadInput(f"every is {every!r}, but it is a distance between steps: 1, 2, 3 ...")
        if not isinstance(first, int) or first < 1:
            raise BadInput(f"first is {first!r}, but it is the number of a step: 1, 2, 3 ...")
        if not isinstance(full, Collection) or not all(isinstance(n, int) and n > 0 for n in full):
            raise BadInput(f"full is {full!r}, but it holds numbers of steps: (7, 8).")
        if not isinstance(zoom, int) or zoom < 0:
            raise BadInput(f"zoom is {zoom!r}, but it is the number of a step: 5.")
        self.model, self.optimizer, self.nudge = model, optimizer, nudge
        self.every, self.first = every, first
        self.full = frozenset(full) | ({zoom} - {0})
        self.given = Path(path)
        self.path = path_of_rank(self.given, *process())
        self.steps = self.clock = self.recorded = 0
        self.idle = False  # the step that comes is not recorded
        self.operators = Operators(lambda: self.steps + 1 == zoom) if zoom else None
        self.unseen: dict[str, str] = {}  # what could not be read, and why
        self.failure = ""  # why the trace gave up
        self.evaluation: dict[str, Any] = no_evaluation()
        self.passes: list[dict] = []  # the forward passes since the last step
        self.backwards: list[dict] = []
        self.optimizers: list[Any] = []  # weak references, in the order of their first steps
        self.hooks: Hooks | None = None
        self.writer: Writer | None = None
        self.gradients = Gradients()
        self._begin_step(0)

    def __enter__(self) -> "Trace":
        self.writer = self.writer or Writer(self.path)
        again = self.writer.open()
        self.stack: list[int] = []  # the modules whose forward pass goes on
        self.current: dict | None = None  # what is recorded of it
        self.last: tuple = (None, 0, "")
        self.layout = Layout(self.model)
        self.weights = Weights(self.layout)
        self.gradients = Gradients()
        if self.nudge and not again:
            nudge_weights(self.model)
            self.weights = Weights(self.layout)
        if again:
            self._write({"again": self.steps})
        else:
            self._write(self._head())
        self.hooks = Hooks(self)
        self.hooks.watch(not self.idle)
        if self.operators is not None:
            self.operators.__enter__()
        return self

    def _head(self) -> dict[str, Any]:
        rank, ranks = process()
        hashes = self.weights.bits()
        return {
            "trace": FORMAT,
            "every": self.every,
            "first": self.first,
            "rank": rank,
            "ranks": ranks,
            "sharded": self.layout.is_sharded(),
            "modules": self.layout.describe(),
            "buffers": self.layout.saved,
            "trainable": [n for n, p in self.layout.parameters.items() if p.requires_grad],
            "tied": self.layout.tied,
            "environment": environment(next(iter(self.layout.parameters.values()), torch.empty(0))),
            "start": {n: known_as(hashes.get(n, "?"), t) for n, t in self.layout.tensors.items()},
        }

    def __exit__(self, kind: type | None, error: object, traceback: object) -> None:
        if self.hooks is None or self.writer is None:
            return  # closed before
        if self.operators is not None:
            self.operators.__exit__(None, None, None)
        self.hooks.remove()
        self.hooks = None
        self.gradients.forget()
        self.gradients = Gradients()  # it holds copies of all gradients
        try:
            self.layout.look()
            changed = self.weights.changed(self.layout)
        except Exception as problem:
            self.note("weights at the end", problem)
            changed = {}
        end = {
            "end": self.steps,
            "optimizers": len(self.optimizers),
            "error": None if kind is None else f"{kind.__name__}: {error}"[:200],
            "weights": changed,
            # The hashes of two tensors may be the same by chance, these digests not.
            "digests": {name: bits(value) for name, value in self.layout.tensors.items()},
            "unseen": self.unseen,
        }
        self.writer.path = self.path = path_of_rank(self.given, *process())
        self.failure = self.failure or self.writer.close(end)
        if self.failure:
            self.writer.give_up(f"{self.failure}; the training itself went on")

    def note(self, where: str, error: Exception) -> None:
        """Keep what could not be seen; a few of them say it all."""
        if len(self.unseen) < 20:
            self.unseen.setdefault(where, not_seen(error)[1:])

    # The forward pass.

    @bystander
    def before(self, module: nn.Module, args: Any) -> None:
        """Before a module's forward pass; the outermost with parameters is that of the batch."""
        module = self.layout.original(module)
        if self.stack:
            if self.layout.inner(module) is not None:
                if self.is_detailed:
                    self._drew(self.stack[-1])
                    self._given(module, args)
                self.stack.append(id(module))
            return
        if not self.layout.carries(module):
            return
        self.stack, self.current = [id(module)], None
        self.current = self._begin_pass(module, args)

    def _begin_pass(self, module: nn.Module, args: tuple) -> dict | None:
        kind = "train" if torch.is_grad_enabled() else "no_grad"
        kind = "recompute" if is_recomputing() else kind
        if kind == "no_grad":
            self.evaluation["batches"] += 1
            self.evaluation["mode"] = self.layout.mode()
            if self.evaluation["batches"] > MANY:
                return {"kind": "counted", "moved": {}}
        self.clock += 1
        record: dict[str, Any] = {
            "module": self.layout.name(module), "kind": kind, "begin": self.clock, "inputs": {},
            "outputs": {}, "layers": {}, "loss": {}, "moved": {}, "changed": {}, "unseen": [],
            "mode": self.layout.mode(), "random": {}, "evaluation": no_evaluation(), "values": {},
            "loss values": {}, "samples": {},
        }  # fmt: skip
        self.passes.append(record)
        self._inputs(record, positional(module, args))
        if kind == "train":
            self.layout.look()
            self.gradients.watch(self, self.layout.parameters)
            is_brief = self.steps > self.recorded
            record["changed"] = self.weights.changed(self.layout, is_brief)
            record["random"] = random_states()
            record["threads"] = torch.get_num_threads()
            if self.is_full(self.steps + 1):
                record["drew"], record["given"] = [], {}
                self.state = record["random"]["torch"]
            record["evaluation"], self.evaluation = self.evaluation, no_evaluation()
        else:
            record["random"] = {"torch": torch_state()}
        return record

    def _inputs(self, record: dict, arguments: dict[str, Any]) -> None:
        """Record the arguments; of the first batch each sample, of others one in a step in full."""
        for path, leaf in (p for n, v in arguments.items() for p in leaves(v, n).items()):
            if isinstance(leaf, Unseen):
                record["unseen"].append(path + " of the input")
            elif not isinstance(leaf, Tensor):
                record["inputs"][path] = {"value": repr(leaf)[:80]}
            elif record["kind"] != "train":
                record["inputs"][path] = {"bits": bits(leaf)}
            else:
                record["inputs"][path] = seen(leaf) | {"attached": leaf.requires_grad}
                try:
                    if is_batch(leaf) and ("rows" not in record or self.is_full(self.steps + 1)):
                        record["rows"] = record.get("rows") or rows(leaf)
                        record["samples"][path] = excerpt(leaf[:1].reshape(1, -1), SOME)
                except Exception as error:
                    self.note("samples of a batch", error)

    @bystander
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """After a module's forward pass; without `output` where it failed."""
        if not self.stack:
            return
        module = self.layout.original(module)
        if id(module) not in self.stack:
            return
        while self.stack.pop() != id(module):
            pass
        record = self.current
        if record is None:
            return
        if self.is_detailed:
            self._drew(id(module))
        if self.stack:
            is_read = self.is_detailed or id(module) not in self.layout.plain
            if is_read and record["kind"] in ("train", "recompute"):
                self._layer(record, module, output)
            return
        self.current = None
        record["moved"] = self.weights.moved(self.layout)
        if record["kind"] == "counted":
            self.evaluation["moved"] |= record["moved"]
            return
        self._inputs(record, kwargs if isinstance(kwargs, dict) else {})  # none where it failed
        record["draws"] = record["random"]["torch"] != torch_state()
        self._outputs(record, output)

    def _drew(self, module: int) -> None:
        """In a step in full, note which module drew random numbers since this was last asked."""
        if self.current is None or "drew" not in self.current:
            return
        state = torch_state()
        if state != self.state:
            self.state = state
            name = self.layout.names.get(module) or ""
            if name not in self.current["drew"]:
                self.current["drew"].append(name)

    def _given(self, module: nn.Module, args: tuple) -> None:
        """In a step in full, note what a module gets: a digest of its positional arguments."""
        name = self.layout.name(module)
        if self.current is None or "given" not in self.current or name is None:
            return
        calls = self.current.get("calls", {}).get(name, 0)
        parts = [bits(leaf) for leaf in leaves(args).values() if isinstance(leaf, Tensor)]
        if parts and not any(part[0] == "?" for part in parts):
            self.current["given"][call_name(name, calls + 1)] = digest("".join(parts).encode())

    def _layer(self, record: dict, module: nn.Module, output: Any) -> None:
        found = [output] if type(output) is Tensor else leaves(output).values()
        parts = [self._checksum(x) if isinstance(x, Tensor) else "?" + type(output).__name__
                 for x in found if isinstance(x, Tensor | Unseen)]  # fmt: skip
        if not parts:
            return  # it failed, or a recomputation had all that it needed
        name = str(self.layout.name(module))
        calls = record.setdefault("calls", {})
        calls[name] = calls.get(name, 0) + 1
        name = call_name(name, calls[name])
        if len(parts) > 1:
            unseen = next((p for p in parts if p[0] == "?"), "")
            parts = [unseen or digest("".join(parts).encode())]
        record["layers"][name] = parts[0]

    def _checksum(self, tensor: Tensor) -> str:
        """Return that of a tensor; a container gives what its last part gave: it is read once."""
        version = -1 if tensor.is_inference() else tensor._version
        if self.last[0] is not tensor or self.last[1] != version:
            self.last = (tensor, version, checksum(tensor))
        return self.last[2]

    def _outputs(self, record: dict, output: Any) -> None:
        values = record["values"] = {}
        for path, leaf in leaves(output).items():
            if isinstance(leaf, Unseen):
                record["unseen"].append(f"output {path}".strip())
            elif not isinstance(leaf, Tensor):
                continue
            elif record["kind"] == "recompute":  # as the layers in the forward pass
                record["outputs"][path] = {"bits": self._checksum(leaf)}
            elif record["kind"] == "no_grad":
                record["outputs"][path] = {"bits": bits(leaf)}
            else:
                record["outputs"][path] = seen(leaf)
                if leaf.requires_grad:
                    handle = leaf.register_hook(partial(self.output_gradient, record, path))
                    self.gradients.handles += [handle] * leaf.is_leaf
                    values[path] = excerpt(leaf, self.limit(self.steps + 1))
        self.last = (None, 0, "")

    # The backward pass.

    @bystander
    def backward(self, losses: list[Tensor]) -> None:
        """Before `loss.backward()`."""
        self.clock += 1
        values = [float(x.detach()) if x.numel() == 1 else None for x in losses]
        types = [str(x.dtype).removeprefix("torch.") for x in losses]
        self.backwards.append({"at": self.clock, "loss": values, "types": types})

    @bystander
    def output_gradient(self, record: dict, path: str, gradient: Tensor) -> None:
        """The loss's gradient with respect to an output; several backward passes add up."""
        if not any(record is one for one in self.passes):
            return  # of a step that is written already
        self.clock += 1
        record["loss at"] = self.clock
        before = record["loss"].get(path)
        record["loss"][path] = gradient.detach() if before is None else before + gradient.detach()
        record["arrivals"] = record.get("arrivals", 0) + 1

    @bystander
    def gradient(self, name: str, key: int, gradient: Tensor) -> None:
        """The gradient of a parameter, before it is added to `.grad`."""
        self.gradients.add(name, self.gradients.hooked[key][1], gradient.detach())

    # The step.

    @bystander
    def stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After an optimizer's step: the gradients that it used are still there."""
        wanted = self.optimizer or optimizer
        if optimizer is not wanted or is_within_a_step(optimizer, self.optimizer):
            return
        if self.idle:
            if self.layout.is_held_by(optimizer) or self.layout.held_by(optimizer):
                number_of(optimizer, self.optimizers)
                self._begin_step(self.steps + 1)
            return
        if not (held := self.layout.held_by(optimizer)):
            return
        self.steps = self.recorded = self.steps + 1
        self.stack, self.current = [], None
        try:
            self._write(step_line(self, optimizer, self.is_full(self.steps)))
        finally:
            self.gradients.begin(held)
            self._begin_step(self.steps)

    def _begin_step(self, steps: int) -> None:
        """Begin anew, after that many steps."""
        self.steps = steps
        self.passes, self.backwards = [], []
        self.evaluation = no_evaluation()
        later = steps + 1 - self.first
        self.idle = later < 0 or later % self.every != 0
        self.is_detailed = self.is_full(steps + 1)
        if self.hooks is not None:
            self.hooks.watch(not self.idle)
        if self.idle:
            self.gradients.forget()

    def is_full(self, step: int) -> bool:
        """Tell whether a step is written in full: the first one, and those that were asked for."""
        return step == self.first or step in self.full

    def limit(self, step: int) -> int:
        return VALUES if self.is_full(step) else SOME

    def _write(self, line: dict[str, Any]) -> None:
        if self.writer is not None and not self.failure:
            self.failure = self.writer.write(line)
