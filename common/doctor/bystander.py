"""See to it that a trace only watches: no error of it reaches the training, and nothing stays.

The hooks are PyTorch's global ones. A hook on a module would be copied and saved with it, would
keep it from being scripted, and would switch off the fast path of a transformer.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook


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


class Hooks:
    """The hooks of one trace, until they are removed.

    Before a step that is not recorded, only the hook on the step is there: the others cost time.
    """

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self.step = register_optimizer_step_post_hook(trace.stepped)
        self.passes: list[Any] = []

    def watch(self, is_wanted: bool) -> None:
        """Hook the forward and backward passes, or leave them alone."""
        if is_wanted and not self.passes:
            self.passes = [
                register_module_forward_pre_hook(self.trace.before),
                register_module_forward_hook(self.trace.after, with_kwargs=True, always_call=True),
            ]
            _listen(self.trace)
        elif not is_wanted and self.passes:
            for handle in self.passes:
                handle.remove()
            self.passes = []
            _leave(self.trace)

    def remove(self) -> None:
        self.watch(False)
        self.step.remove()


# PyTorch has no hook for `loss.backward()`. So its one entrance is replaced while a trace is open.

_listeners: list[Any] = []
_usual: Callable[..., None] = torch.autograd.backward


def _listen(trace: Any) -> None:
    global _usual
    _listeners.append(trace)
    if torch.autograd.backward is not _observed:
        _usual = torch.autograd.backward
        torch.autograd.backward = _observed


def _leave(trace: Any) -> None:
    if trace in _listeners:
        _listeners.remove(trace)
    if not _listeners and torch.autograd.backward is _observed:
        torch.autograd.backward = _usual


@functools.wraps(torch.autograd.backward)
def _observed(tensors: Any, *args: Any, **kwargs: Any) -> None:
    for trace in _listeners:
        trace.backward([tensors] if isinstance(tensors, Tensor) else list(tensors))
    return _usual(tensors, *args, **kwargs)


def is_recomputing() -> bool:
    """Tell whether a backward pass is going on: a forward pass within it is a recomputation."""
    return torch._C._current_graph_task_id() != -1
