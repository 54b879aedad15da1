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
    """The hooks of one trace, from `with Hooks(trace)` to the block's end."""

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self.handles = [
            register_module_forward_pre_hook(trace.before),
            register_module_forward_hook(trace.after, with_kwargs=True, always_call=True),
            register_optimizer_step_post_hook(trace.stepped),
        ]
        _listen(trace)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        _leave(self.trace)


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
