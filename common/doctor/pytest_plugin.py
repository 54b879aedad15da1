"""A fixture for tests of other projects: pytest finds it where samebits is installed.

def test_the_port_trains_as_the_loop(same_training):
    with same_training.trace("loop", net):
        loop.train(net)
    port.train(other, callbacks=[same_training.callback("port", L.Callback)])
    same_training.check("loop", "port")
"""

from pathlib import Path
from typing import Any

import pytest


class SameTraining:
    """Traces in a folder of the test's own, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.trace"

    def trace(self, name: str, model: Any, **more: Any) -> Any:
        """Return a Trace of that name, to be used in a `with`; `more` as there."""
        from . import Trace

        return Trace(model, path=self.path(name), **more)

    def callback(self, name: str, base: type, **more: Any) -> Any:
        """Return a callback for the Trainer; `base` is your Lightning's Callback, `more` as there.

        It is samebits.callback with a path in the test's folder.
        """
        from . import callback

        return callback(base, self.path(name), **more)

    def check(self, a: str, b: str) -> None:
        """Fail with the diagnosis unless the two runs are equal bit for bit."""
        __tracebackhide__ = True
        from . import compare

        diagnosis = compare(self.path(a), self.path(b))
        if not diagnosis.equal:
            pytest.fail(f"A is {a}, B is {b}.\n{diagnosis}", pytrace=False)


@pytest.fixture
def same_training(tmp_path: Path) -> SameTraining:
    """Trace two trainings in this test, and hold them against each other."""
    return SameTraining(tmp_path)
