"""See to it that a trace only watches: no error of it reaches the training, and nothing stays.

The hooks are PyTorch's global ones. A hook on a module would be copied and saved with it, would
keep it from being scripted, and would switch off the fast path of a transformer.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def bystander(hook: Callable[..., None]) -> Callable[..., None]:
    """Let a hook of a trace do nothing to the training: not raise, return, or be compiled."""

    @functools.wraps(hook)
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        # First of all: torch.compile follows a hook up to here, and finds that it does nothing.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.failure:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self.note(hook.__name__.strip("_"), error)

    return watched


STEPS_IN = Optimizer.__init__.__code__.co_filename  # where PyTorch calls the hooks of a step


class Hooks:
    """What one trace listens to, until it is removed.

    Before a step that is not recorded, only the hook on the step is there: the others cost time.
    PyTorch gets one hook of each kind for all traces: while a training in another thread goes along
    the hooks, none may come or go.
    """

    opened: ClassVar[list["Hooks"]] = []
    lock = threading.Lock()
    passes: ClassVar[list[Any]] = []
    step: ClassVar[list[Any]] = []

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self.is_wanted = False
        with Hooks.lock:
            Hooks.opened.append(self)
            if not Hooks.step:
                Hooks.step.append(register_optimizer_step_post_hook(_stepped))

    def watch(self, is_wanted: bool) -> None:
        """Hook the forward and backward passes, or leave them alone."""
        self.is_wanted = is_wanted
        with Hooks.lock:
            if is_wanted and not Hooks.passes:
                Hooks.passes += [
                    register_module_forward_pre_hook(_before),
                    register_module_forward_hook(_after, with_kwargs=True, always_call=True),
                ]
                _listen()
            elif len(Hooks.opened) <= 1 and not is_wanted:
                _remove(Hooks.passes)
                _leave()

    def remove(self) -> None:
        with Hooks.lock:
            Hooks.opened.remove(self)
            if not Hooks.opened:
                _remove(Hooks.passes)
                _remove(Hooks.step)
                _leave()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _before(module: Any, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for hooks in tuple(Hooks.opened):
            if hooks.is_wanted:
                hooks.trace.before(module, args)


def _after(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
    if not torch.compiler.is_compiling():
        for hooks in tuple(Hooks.opened):
            if hooks.is_wanted:
                hooks.trace.after(module, args, kwargs, output)


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    for hooks in tuple(Hooks.opened):
        hooks.trace.stepped(optimizer, args, kwargs)


def is_within_a_step(optimizer: Optimizer, wanted: Optimizer | None = None) -> bool:
    """Tell, in a hook on a step, whether the step is a part of another one's, for its parameters.

    So it is where a subclass calls super().step(), and where an optimizer wraps another one; then
    the outer one counts, unless one is wanted. The functions that are being called tell it: a count
    of them would be wrong after an error.
    """
    frame: FrameType | None = sys._getframe()
    steps = []
    while frame := frame.f_back if frame else None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == STEPS_IN:
            steps.append(frame.f_locals.get("self"))
    outer = [step for step in steps[1:] if wanted in (None, step)]
    own = _held(optimizer) if outer else set()
    return any(own <= _held(step) for step in outer)


def _held(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", ())
    return {id(parameter) for group in groups for parameter in group["params"]}


# PyTorch has no hook for `loss.backward()`. So its one entrance is replaced while a trace is open.

_usual: Callable[..., None] = torch.autograd.backward


def _listen() -> None:
    global _usual
    if torch.autograd.backward is not _observed:
        _usual = torch.autograd.backward
        torch.autograd.backward = _observed


def _leave() -> None:
    if torch.autograd.backward is _observed:
        torch.autograd.backward = _usual


@functools.wraps(torch.autograd.backward)
def _observed(tensors: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(tensors, Iterator):  # it gives its tensors once
        tensors = tuple(tensors)
    for hooks in tuple(Hooks.opened):
        if hooks.is_wanted:
            hooks.trace.backward([tensors] if isinstance(tensors, Tensor) else list(tensors))
    return _usual(tensors, *args, **kwargs)


def is_recomputing() -> bool:
    """Tell whether a backward pass is going on: a forward pass within it is a recomputation."""
    return torch._C._current_graph_task_id() != -1
