"""Trace two trainings, find the first difference between them, and name its likely cause.

    with Trace(net, path="a.trace"):        # around any code that trains `net`
        train(net, ...)

`samebits a.trace b.trace` prints the diagnosis; `assert_parity` is the same for a test. The package
needs PyTorch and NumPy alone. It is imported as `samebits` everywhere, also in its own repository:
under a second name it would be loaded twice, with two classes of each error.
"""

import importlib
from typing import Any

# Where each name is. They are loaded when they are asked for: pytest loads the fixture in every
# project of an environment, and PyTorch should not be loaded with it.
_HOMES = {
    "STAGES": "diagnosis", "BadInput": "messages", "Cause": "evidence", "Diagnosis": "diagnosis",
    "Trace": "trace", "assert_parity": "diagnosis", "callback": "trainer", "check": "alone",
    "compare": "diagnosis", "fingerprint": "fingerprints", "read": "files",
}  # fmt: skip

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
