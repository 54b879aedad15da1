"""How a process ends early: by Ctrl-C, by SIGTERM, and when the one that started it is gone.

Imports nothing that takes time.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# In the environment of whatever is started: the process that it shall not outlive, by its number;
# or "make", which cannot tell its own.
ENDS_WITH = "ENDS_WITH"


class Terminated(BaseException):
    """SIGTERM came. Raised wherever the program was, as KeyboardInterrupt is after Ctrl-C."""


_own = os.getpid()  # a process that loads images is forked from it, and has its handlers
_ending = threading.Event()


def stopped(number: int) -> str:
    """Return the sentence with which a signal ends a run."""
    return f"Stopped by {NAMES[signal.Signals(number)]}; what was written until now is kept."


def is_ending() -> bool:
    """Tell whether a signal has asked this process to end."""
    return _ending.is_set()


def _end(number: int, frame: FrameType | None) -> None:
    """End in order at the first signal, and at once where another one follows."""
    if os.getpid() != _own:
        return  # one that loads images: it is ended by the process that it loads them for
    if _ending.is_set():
        leave(number)
    _ending.set()
    hear_of_no_process()
    if number == signal.SIGTERM:
        raise Terminated
    signal.default_int_handler(number, frame)


def hear_of_no_process() -> None:
    """Hear no more of processes that end: of one that loads images, PyTorch raises an error.

    It does so wherever the program is at that moment, also where another error is being told.
    """
    with contextlib.suppress(AttributeError, ValueError):  # no such signal; not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave(number: int, *_: object) -> NoReturn:
    """Say what a signal did, and end at once, with all processes that load images."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # else torchrun's own process says it
            print(f"\n{stopped(number)}", file=sys.stderr, flush=True)
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os._exit(128 + number)


def listen_during_imports() -> None:
    """Let a signal end with one sentence also before `main` runs: PyTorch's import takes seconds.

    Ctrl-C raises KeyboardInterrupt, here as later. SIGTERM ends at once: in a program of others
    that imports this, it shall do what it always does.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
        # torchrun ends its processes so, and has its own words for it.
        if _is_default(signal.SIGTERM) and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGTERM, leave)


def _is_default(number: int) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, leave)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let SIGTERM raise Terminated while the block runs, and count the signals anew.

    The Trainer puts a handler of its own before this one, and calls both.
    """
    global _own
    _own = os.getpid()
    _ending.clear()
    take = _is_default(signal.SIGTERM) and "TORCHELASTIC_RUN_ID" not in os.environ
    take = take and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if take else None
    try:
        yield
    finally:
        if take:
            signal.signal(signal.SIGTERM, before)


def end_with_starter() -> None:
    """Get SIGTERM when the process that started this one ends, if that one asks for it.

    What this process starts, and imports `common` too, does so.
    """
    starter = os.environ.get(ENDS_WITH)
    os.environ[ENDS_WITH] = f"{os.getpid()}"
    if starter in ("make", f"{os.getppid()}"):
        end_with_parent(signal.SIGTERM)


def end_with_parent(number: int) -> None:
    """Get a signal when the parent ends, also where that is killed and can say nothing."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG: the system sees to it
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
