"""What a command says when it ends early: one sentence. Imports nothing that takes time."""

from common import signals

import argparse
import contextlib
import io
import json
import logging
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn


def printable(text: str) -> str:
    """Return a text as one line that a terminal only shows: names and files may hold anything.

    Escape codes, line breaks and bytes that are no UTF-8 are written out, such as \\x1b.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class BadInput(Exception):
    """Something that the user can mend; the text says in one sentence what, and what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def notice(*lines: str) -> None:
    """Print what must not be missed, between two bars, on stderr."""
    bar = "!" * 88
    shown = (f"  {printable(line)}" for line in lines)
    print(bar, *shown, bar, sep="\n", file=sys.stderr, flush=True)


class Stopped(Exception):
    """A run that ends early and in order; the text says in one sentence why, and what to do.

    `status` is the exit status: 130 after Ctrl-C, 143 after SIGTERM, 124 when the time was up, as
    of the command `timeout`, and 1 where the training itself could not go on.
    """

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(printable(sentence))
        self.status = status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _exit(f"error: {message}; see --help.", status=2)

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse's own would pass over a reader that is gone."""
        print(self.format_help(), end="", file=file, flush=True)


def keep_quiet() -> None:
    """Keep off the screen what is no news to who runs a lesson.

    These are Lightning's advertisements and notes, and nine warnings: two about
    how many processes should load data, which would cost more than our batches take; one about
    Lightning's own code; one that there are fewer steps than `--log-every-n-steps`; two that a
    run's folder, in which W&B has just begun to write, or that is resumed in, is not empty; and
    one that a loader cannot be resumed, because it has no state_dict: ours is told by `skip`;
    one that there is SLURM's `srun`, by which one process need not be started; and one that a run
    is resumed in another folder.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "suggested max",
        "LeafSpec",
        "log_every_n_steps",
        "Experiment logs directory",
        "Checkpoint directory",
        "your dataloader is not resumable",
        "The `srun` command",
        "The dirpath has changed",
    ):
        warnings.filterwarnings("ignore", f".*{text}")


@contextlib.contextmanager
def clear_messages(failed: int = 1) -> Iterator[None]:
    """Say in one sentence how a command ends early, and leave with the status for it.

    2: the user can mend it; 130 and 143: Ctrl-C and SIGTERM; 141: nobody reads the output; `failed`
    where the machine had no memory for it, or ended a process that loads images. A command whose
    status 1 has a meaning gives another number, which an unknown error then ends with, too. Also
    calls `keep_quiet`.
    """
    keep_quiet()
    for stream in (sys.stdout, sys.stderr):  # a name may hold what they have no letter for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with signals.listening(), _quiet_about_workers():
        try:
            try:
                yield
            finally:
                sys.stdout.flush()  # here, where a pipe that is closed can be told
        except BaseException as error:
            signals.hear_of_no_process()
            _end(error, failed)


@contextlib.contextmanager
def _quiet_about_workers() -> Iterator[None]:
    """Leave out what PyTorch says of a process that loads images once the run has ended by it."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "DataLoader worker" not in str(unraisable.exc_value):
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _end(error: BaseException, failed: int) -> NoReturn:
    """End a command with the sentence and the status for an error; raise it where there is none."""
    if isinstance(error, BadInput):
        _exit(f"error: {error}", status=2)
    if isinstance(error, Stopped):
        _exit(f"\n{error}", error.status)
    # The Trainer catches Ctrl-C itself and leaves with SystemExit(1); where it was told of SIGTERM
    # alone, with SystemExit(0).
    if _after(error, KeyboardInterrupt):
        _exit(f"\n{signals.stopped(signal.SIGINT)}", status=130)
    if _after(error, signals.Terminated) or type(error).__name__ == "SIGTERMException":
        _exit(f"\n{signals.stopped(signal.SIGTERM)}", status=143)
    # Rich ends a program itself where it cannot print, with SystemExit(1).
    if _after(error, BrokenPipeError) and (_nobody_reads() or isinstance(error, SystemExit)):
        _exit("Stopped, since nobody reads the output; what was written until now is kept.", 141)
    if sentence := _of_the_machine(error):
        _exit(f"\n{sentence}", failed)
    if isinstance(error, OSError):
        _exit(f"error: the system refused: {error}.", status=2)
    if type(error).__module__.startswith("wandb."):
        # Asked to go online, without a network. It says what to do in many lines.
        said = str(error).splitlines()[0].rstrip(".")
        _exit(f"error: Weights & Biases refused: {said}; unset WANDB_MODE to stay offline.", 2)
    if failed != 1 and isinstance(error, Exception):
        traceback.print_exception(error)
        raise SystemExit(failed)
    raise error


def _is_broken_pipe(error: BaseException) -> bool:
    """Tell whether the other end of a pipe between two processes is gone."""
    return isinstance(error, ConnectionError | EOFError) and any(
        "multiprocessing" in frame.f_code.co_filename
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _of_the_machine(error: BaseException) -> str | None:
    """Say which of the machine's limits an error stands for, None if for none."""
    text = str(error)
    worker = isinstance(error, RuntimeError) and "DataLoader worker" in text
    # Its end of a pipe may be gone before the system tells of its end.
    if (worker and "Caught" not in text) or _is_broken_pipe(error):
        how = re.search(r"killed by signal: ([\w ]+)", text)
        return (
            f"A process that loads images was ended by the system ({how[1] if how else 'unheard'}),"
            " as where memory is short; use fewer --num-workers. What was written until now is "
            "kept."
        )
    words = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
    if isinstance(error, MemoryError) or any(word in text for word in words):
        asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ \w+)", text)
        much = f" ({asked[0].removeprefix('allocate ')} were asked for)" if asked else ""
        return (
            f"There is not enough memory{much}; use a smaller --batch-size, or fewer processes. "
            "What was written until now is kept."
        )
    return None


def _nobody_reads() -> bool:
    """Tell whether the reader of this program's output is gone, as behind `| head -1`."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is no file of the system's
            poll = select.poll()
            poll.register(stream.fileno(), 0)  # errors are told in any case
            if poll.poll(0):
                closed = True
                # Or Python, when it ends, would try once more, and complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed


def _exit(sentence: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stdout.flush()
        lead = "\n" * sentence.startswith("\n")
        sentence = printable(sentence.strip())
        # Of several processes, many may have the same to say: the one that started them says it.
        if to := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            said = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
            Path(to).write_text(json.dumps({"message": said}))
        else:
            print(f"{lead}{sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def _after(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Tell whether an exception is of a kind, or was raised while such a one was handled."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_sentence_during_imports() -> None:
    """Let Ctrl-C and SIGTERM end with one sentence also before `main` runs."""
    usual = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        # Some imports swallow Ctrl-C, and then fail in another way.
        if _after(error, KeyboardInterrupt) or signals.is_ending():
            signals.leave(signal.SIGINT)
        # A thread of Python's own hands images on; the main thread says what has happened.
        if threading.current_thread() is threading.main_thread() or not _is_broken_pipe(error):
            usual(kind, error, traceback)

    sys.excepthook = hook
    signals.listen_during_imports()
