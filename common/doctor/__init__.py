"""Trace two trainings, find the first difference between them, and name its likely cause.

    with Trace(net, path="a.trace"):        # around any code that trains `net`
        train(net, ...)

`samebits a.trace b.trace` prints the diagnosis; `assert_parity` is the same for a test. The package
needs PyTorch and NumPy alone. It is imported as `samebits` everywhere, also in its own repository:
under a second name it would be loaded twice, with two classes of each error.
"""

from .diagnosis import STAGES, Diagnosis, assert_parity, compare
from .evidence import Cause
from .files import read
from .fingerprints import fingerprint
from .messages import BadInput
from .trace import Trace
from .trainer import callback

__all__ = [
    "STAGES",
    "BadInput",
    "Cause",
    "Diagnosis",
    "Trace",
    "assert_parity",
    "callback",
    "compare",
    "fingerprint",
    "read",
]
