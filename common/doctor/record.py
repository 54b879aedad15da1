"""What a trace keeps between two steps, and the line that it writes of one."""

import functools
import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from .fingerprints import Line, excerpt, same, seen, short
from .layout import Layout, plain_value
from .memory import array, dense
from .snapshot import Snapshot


class Weights:
    """All parameters and buffers as they were when last looked at."""

    def __init__(self, layout: Layout) -> None:
        self.parameters, self.buffers = Snapshot(), Snapshot()
        self.parameters.take(layout.parameters)
        self.buffers.take(layout.held)

    def bits(self) -> dict[str, str]:
        """Return the hashes of all that was seen at the last look."""
        return self.parameters.bits() | self.buffers.bits()

    def changed(self, layout: Layout, is_brief: bool = False) -> Line:
        """Return the fingerprints of those that somebody changed since the last look.

        After steps that were not recorded all may have changed: their hashes are enough.
        """
        parameters = layout.parameters
        found = dict.fromkeys(parameters if is_brief else self.parameters.changed(parameters))
        hashes = self.moved(layout)
        if found:
            self.parameters.take(parameters)
            hashes |= self.parameters.bits()
        found |= dict.fromkeys(n for n in hashes if n in layout.saved and n in layout.tensors)
        if is_brief:
            return {n: {"bits": hashes[n]} for n in found}
        return {n: known_as(hashes[n], layout.tensors[n]) for n in found}

    def moved(self, layout: Layout) -> dict[str, str]:
        """Return the hashes of the buffers that a forward pass changed."""
        buffers = layout.held
        names = self.buffers.changed(buffers)
        if not names:
            return {}
        self.buffers.take(buffers)
        hashes = self.buffers.bits()
        return {name: hashes[name] for name in names}

    def after(self, layout: Layout, names: Collection[str]) -> Line:
        """Return hashes of all weights after a step of the parameters `names`, and their norm."""
        self.parameters.take(layout.parameters)
        self.buffers.take(layout.held)
        line = self.parameters.line(names)
        hashes = line["bits"] | self.buffers.bits()
        return {
            "bits": {name: hashes.get(name, "?") for name in layout.tensors},
            "norm": line["norm"],
            "sketch": line["sketch"],
        }


def known_as(bits: str, tensor: Tensor) -> Line:
    """Return the fingerprint of a tensor, with the hash that all weights have; or why not."""
    line = seen(tensor)
    return line | {"bits": bits} if "norm" in line else line


class Gradients:
    """What the backward passes gave to each parameter since the last step."""

    def __init__(self) -> None:
        self.hooked: dict[int, Any] = {}
        self.handles: list[Any] = []  # of hooks on outputs that outlive a step
        self.fresh: dict[str, Tensor] = {}
        self.used = Snapshot()
        self.snapshot = Snapshot()
        self.slots: dict[str, Tensor] = {}  # its memory, into which the next ones come
        self.waiting: dict[str, Tensor] = {}  # what came before a step that did not use it
        self.begin(())

    def begin(self, stepped: Collection[str]) -> None:
        """Begin anew after a step of these parameters; what the others got may still be used."""
        while self.handles:
            self.handles.pop().remove()
        self.waiting |= self.fresh
        self.waiting = {n: g for n, g in self.waiting.items() if n not in stepped}
        self.fresh = {}
        self.left: dict[str, Tensor] = {}  # what was in .grad before the first backward pass
        self.cleared: set[str] = set()  # what was taken out of .grad between two of them

    def watch(self, trace: Any, parameters: dict[str, Tensor]) -> None:
        """Hook all parameters that get gradients; also those that were frozen before."""
        for name, parameter in parameters.items():
            if parameter.requires_grad and id(parameter) not in self.hooked:
                hook = functools.partial(trace.gradient, name, id(parameter))
                self.hooked[id(parameter)] = (parameter.register_hook(hook), parameter)

    def unhook(self) -> None:
        for handle, _ in self.hooked.values():
            handle.remove()
        self.hooked = {}

    def forget(self) -> None:
        self.unhook()
        self.begin(())
        self.waiting = {}

    def add(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        before = parameter.grad
        is_empty = before is None or _is_zero(before)
        if name in self.fresh:
            self.fresh[name] = self.fresh[name] + gradient
            if is_empty:
                self.cleared.add(name)
            return
        if before is not None and not is_empty:
            self.left[name] = before.detach().clone()
        slot = self.slots.get(name)
        if slot is not None and name not in self.waiting and _is_room_for(gradient, slot):
            self.fresh[name] = slot.copy_(gradient)
        else:
            self.fresh[name] = gradient.clone()

    def line(self, gradients: dict[str, Tensor], is_full: bool) -> Line:
        """Return what is written of a step's gradients, as they came."""
        slots = self.slots
        if gradients.keys() != slots.keys() or any(gradients[n] is not slots[n] for n in slots):
            self.snapshot = Snapshot()  # some of them may lie in the memory of the one before
            self.snapshot.take(gradients)
            self.slots = self.snapshot.slots()
        return _line(self.snapshot, gradients, is_full)


def _line(snapshot: Snapshot, gradients: dict[str, Tensor], is_full: bool) -> Line:
    line = snapshot.line()
    if is_full:
        line["full"] = {name: seen(tensor) for name, tensor in gradients.items()}
    return line


def _is_room_for(tensor: Tensor, copy: Tensor) -> bool:
    """Tell whether a tensor can be copied into the memory of an earlier copy."""
    is_alike = tensor.shape == copy.shape and tensor.dtype == copy.dtype
    is_there = tensor.device == copy.device and tensor.layout == copy.layout
    return is_alike and is_there and not copy.is_inference()


def _is_zero(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return bool(tensor._nnz() == 0)
    return not bool(tensor.any())


def step_line(trace: Any, optimizer: Optimizer, is_full: bool) -> Line:
    """Return what a trace writes of a step: the forward passes before it, gradients, weights."""
    layout: Layout = trace.layout
    ids, tensors = layout.ids, layout.tensors
    groups = [
        [ids[id(p)] for p in group["params"] if id(p) in ids] for group in optimizer.param_groups
    ]
    held = dict.fromkeys(name for names in groups for name in names)
    names = list(held)
    gradients = {n: tensors[n].grad for n in names}
    used = {n: g.detach() for n, g in gradients.items() if g is not None}
    came = trace.gradients.waiting | trace.gradients.fresh
    fresh = {n: came[n] for n in held if n in came and (n in used or n in trace.gradients.fresh)}
    unchanged = used.keys() == fresh.keys() and all(same(used[n], fresh[n]) for n in used)
    used_line, fresh_line = trace.gradients.line(fresh, is_full), None
    changes: Line = {}
    if not unchanged:
        trace.gradients.used.take(used)
        fresh_line, used_line = used_line, _line(trace.gradients.used, used, is_full)
        try:
            changes = between(fresh, used, trace.gradients.left)
            changes["cleared"] = sorted(trace.gradients.cleared & used.keys())[:20]
        except Exception as error:
            trace.note("gradients before the step", error)
    numbers = trace.weights.after(layout, held)
    foreign = sum(id(p) not in ids for g in optimizer.param_groups for p in g["params"])
    line = {
        "step": trace.steps,
        "passes": [_finished(record, trace) for record in trace.passes],
        "backwards": trace.backwards,
        "evaluation": trace.evaluation,
        "used": used_line,
        "fresh": fresh_line,
        "between": changes,
        "optimizer": type(optimizer).__name__,
        "which": number_of(optimizer, trace.optimizers),
        "foreign": foreign,
        "groups": [
            {"params": names} | {k: plain_value(v) for k, v in group.items() if k != "params"}
            for names, group in zip(groups, optimizer.param_groups, strict=True)
        ],
        "tied": layout.tied,
        "weights": numbers,
        "begins": _begins(optimizer, layout, used),
    }
    if is_full:
        numbers["full"] = {name: seen(value) for name, value in tensors.items()}
        line["state"] = _state(optimizer, layout)
    if trace.operators is not None and trace.operators.found:
        line["operators"], trace.operators.found = trace.operators.found, []
    return line


def _finished(record: Line, trace: Any) -> Line:
    """Turn the gradients that came to a pass's outputs into what is written of them."""
    values = record["loss values"] = {}
    for path, gradient in record["loss"].items():
        record["loss"][path] = seen(gradient)
        try:
            values[path] = excerpt(gradient, trace.limit(trace.steps))
        except Exception as error:
            trace.note("values of a gradient", error)
    record.pop("calls", None)
    return record


def number_of(optimizer: Optimizer, optimizers: list) -> int:
    """Return which optimizer it is, by the order of their first steps, from 1 on."""
    for number, reference in enumerate(optimizers, start=1):
        if reference() is optimizer:
            return number
    optimizers.append(weakref.ref(optimizer))
    return len(optimizers)


def _begins(optimizer: Optimizer, layout: Layout, used: dict[str, Tensor]) -> str:
    """Return a part of the optimizer's state that is that of a first step, if there is one."""
    ids = layout.ids
    for parameter, state in optimizer.state.items():
        name = ids.get(id(parameter)) if isinstance(parameter, Tensor) else None
        if name is None:
            continue
        # Adam counts its steps; SGD's momentum begins as the gradient itself.
        if "step" in state and float(state["step"]) == 1:
            return f"{name}: step"
        momentum = state.get("momentum_buffer")
        if momentum is not None and name in used:
            return f"{name}: momentum_buffer" if same(momentum, used[name]) else ""
    return ""


def _state(optimizer: Optimizer, layout: Layout) -> Line:
    ids = layout.ids
    return {
        f"{ids.get(id(p), '?')}: {key}": seen(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def between(fresh: dict[str, Tensor], used: dict[str, Tensor], left: dict[str, Tensor]) -> Line:
    """Say what became of the gradients between the backward passes and the step.

    `cosine` is that of the angle between both (1: only their length changed), `ratio` and `norm`
    that of their lengths and the length at the step; `apart` the smallest and largest ratio of one
    tensor, `lengths` how many different ones there are, `cut` how many values are at most as large
    as the largest at the step, and were larger, and `tied` how many have that largest magnitude.
    `left` is how much of what was there before the backward passes is in the difference: 1 is all.
    """
    names = [name for name in used if name in fresh]
    if not names:
        return {"missing": sorted(used.keys() ^ fresh.keys())[:20]}
    pairs = [(_flat(used[n]), _flat(fresh[n])) for n in names]
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        norms = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
        largest = np.abs(ours).max(initial=0)
        lengths = [(np.linalg.norm(x), np.linalg.norm(y)) for x, y in pairs]
        ratios = [float(x / y) for x, y in lengths if y]
        turned = [float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300))
                  for x, y in pairs if y.any() and x.any()]  # fmt: skip
    said: Line = {
        "cosine": short(float(ours @ theirs / max(norms[0] * norms[1], 1e-300))),
        "ratio": short(norms[0] / norms[1]) if norms[1] else 0.0,
        "norm": short(norms[0]),
        "apart": [short(min(ratios, default=1.0)), short(max(ratios, default=1.0))],
        "lengths": len({f"{ratio:.5g}" for ratio in ratios}),
        "turned": short(min(turned, default=1.0)),
        "cut": int((np.abs(theirs) > largest).sum()),
        "tied": int((np.abs(ours) == largest).sum()),
        "largest": short(float(largest)),
        "missing": sorted(used.keys() ^ fresh.keys())[:20],
    }
    if kept := [n for n in names if n in left]:
        before = np.concatenate([_flat(left[n]) if n in left else np.zeros(used[n].numel())
                                 for n in names])  # fmt: skip
        said["left"] = short(float((ours - theirs) @ before / max(before @ before, 1e-300)))
        said["left in"] = kept[:20]
    return said


def _flat(tensor: Tensor) -> np.ndarray:
    return array(dense(tensor).to(torch.float64))


def call_name(name: str, number: int) -> str:
    """Return what a module is called in a pass that calls it several times."""
    return f"{name} (call {number})" if number > 1 else name


def no_evaluation() -> Line:
    return {"batches": 0, "mode": "", "moved": {}}
