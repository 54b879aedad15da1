"""Look closer at one step: which operator gave another value first, where, and in which line.

Both runs are made once more, with `Trace(..., zoom=STEP)`: then each of PyTorch's functions that is
called in that step is recorded with what it gave and the line of the user's code that called it.
That is slow, and only for a step whose number the first diagnosis told.
"""

import base64
import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from .fingerprints import array, bits, dense, shape
from .messages import BadInput
from .walk import leaves

LARGEST, MOST = 1 << 16, 20_000  # values of a tensor that are kept, operators of a step
OWN = os.path.dirname(__file__)
LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "<")


class Operators(TorchFunctionMode):
    """Records the calls of PyTorch's functions while `is_on()` is true."""

    def __init__(self, is_on: Any) -> None:
        super().__init__()
        self.is_on = is_on
        self.found: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling() and self.is_on() and len(self.found) < MOST:
            try:
                self._record(func, given)
            except Exception as error:
                self.found.append({"op": "?", "at": type(error).__name__, "gave": []})
        return given

    def _record(self, func: Any, given: Any) -> None:
        at = _line_of_user()
        tensors = [x for x in leaves(given).values() if isinstance(x, Tensor)]
        if at is None or not tensors:
            return  # of a library: what it gives goes into an operator of the user's
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        self.found.append({"op": name, "at": at, "gave": [_kept(x) for x in tensors]})


def _line_of_user() -> str | None:
    """Return file and line of the innermost code that belongs to no library; None of our own."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OWN):
            return None  # a hook of the trace, which looks at tensors, too
        if not name.startswith(LIBRARIES):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _kept(tensor: Tensor) -> dict[str, Any]:
    kept: dict[str, Any] = {"bits": bits(tensor), "shape": shape(tensor)}
    if tensor.numel() <= LARGEST and not tensor.is_complex():
        values = array(dense(tensor).to(torch.float64))
        kept["values"] = base64.b64encode(values.tobytes()).decode()
    return kept


def zoom(a: Path | str, b: Path | str) -> str:
    """Say which operator of two runs gave another value first: where, how far, in which line.

    Raises BadInput where the traces were not made with the same `zoom`.
    """
    from .run import load  # which needs no Trace; this file is needed by it

    steps = [{line["step"]: line["operators"] for line in load(path, name).every_step()
              if line.get("operators")} for path, name in ((a, "A"), (b, "B"))]  # fmt: skip
    both = sorted(steps[0].keys() & steps[1].keys())
    if not both:
        raise BadInput(
            "there is nothing to zoom into: trace both runs again with zoom=STEP, the step that "
            "the diagnosis names: Trace(net, path=..., zoom=5)."
        )
    try:
        return _first(steps[0][both[0]], steps[1][both[0]], both[0])
    except Exception as error:
        raise BadInput(
            f"the operators of '{a}' and '{b}' cannot be compared ({type(error).__name__}); "
            "trace both again."
        ) from error


def _first(ours: list[dict], theirs: list[dict], step: int) -> str:
    """Go along both lists of operators, which may be written differently, by what they gave."""
    if [one["op"] for one in ours] == [one["op"] for one in theirs]:
        for one, other in zip(ours, theirs, strict=True):
            for tensor, its in zip(one["gave"], other["gave"], strict=False):
                if tensor["bits"] != its["bits"]:
                    said = f"In step {step:,}, {one['op']} is the first that gives another value: "
                    said += f"{one['at']} in A, {other['at']} in B."
                    return said + _largest(tensor, its)
    given = {tensor["bits"] for one in theirs for tensor in one["gave"]}
    for place, one in enumerate(ours):
        for tensor in one["gave"]:
            if tensor["bits"] in given or tensor["bits"].startswith("?"):
                continue
            said = f"In step {step:,}, {one['op']} in {one['at']} of A is the first whose value B "
            its = _like(tensor, one, theirs, {t["bits"] for o in ours for t in o["gave"]})
            if its is None:
                return said + "has nowhere."
            said += f"has not; B's is that of {its['at']}."
            return said + _largest(tensor, its["tensor"])
        if place + 1 == len(ours):
            break
    return f"All {len(ours)} operators of step {step:,} gave the same."


def _like(tensor: dict, one: dict, theirs: list[dict], known: set[str]) -> dict | None:
    """Return the first tensor of B that A does not have, of the same shape, and its line."""
    found = [(other, t) for other in theirs for t in other["gave"]
             if t["bits"] not in known and t["shape"] == tensor["shape"]]  # fmt: skip
    found.sort(key=lambda pair: pair[0]["op"] != one["op"])
    return {"at": found[0][0]["at"], "tensor": found[0][1]} if found else None


def _largest(one: dict, other: dict) -> str:
    if "values" not in one or "values" not in other:
        return ""
    x, y = (np.frombuffer(base64.b64decode(t["values"])) for t in (one, other))
    place = int(np.nanargmax(np.abs(x - y)))
    where = np.unravel_index(place, one["shape"]) if one["shape"] else ()
    return (f" The largest difference is at {list(map(int, where))}: {x[place]:.9g} in A, "
            f"{y[place]:.9g} in B.")  # fmt: skip
