"""What a command says when it ends early: one sentence. Imports nothing that takes time."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

STOPPED = "Stopped by Ctrl-C; what was written until now is kept."


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
        super().__init__(sentence)
        self.status = status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _exit(f"error: {message}; see --help.", status=2)


@contextlib.contextmanager
def clear_messages() -> Iterator[None]:
    """Say in one sentence what the user can mend, and leave with 2, or with 130 after Ctrl-C.

    Also keeps Lightning's advertisements and notes off the screen, and nine warnings: two about
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
    try:
        yield
    except BadInput as error:
        _exit(f"error: {error}", status=2)
    except Stopped as end:
        _exit(f"\n{end}", end.status)
    except OSError as error:
        _exit(f"error: the system refused: {error}.", status=2)
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        # Asked to go online, without a network. It says what to do in many lines.
        said = str(error).splitlines()[0].rstrip(".")
        _exit(f"error: Weights & Biases refused: {said}; unset WANDB_MODE to stay offline.", 2)
    except (KeyboardInterrupt, SystemExit) as error:
        # The Trainer catches Ctrl-C itself and leaves with SystemExit(1).
        if not _after_ctrl_c(error):
            raise
        _exit(f"\n{STOPPED}", status=130)


def _exit(sentence: str, status: int) -> NoReturn:
    sys.stdout.flush()
    # Of several processes, many may have the same to say: the one that started them says it once.
    if to := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        Path(to).write_text(json.dumps({"message": said}))
    else:
        print(sentence, file=sys.stderr)
    raise SystemExit(status) from None


def _after_ctrl_c(error: BaseException | None) -> bool:
    """Tell whether an exception is Ctrl-C's, or was raised while that was handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_sentence_during_imports() -> None:
    """Let Ctrl-C end with one sentence also before `main` runs: importing PyTorch takes seconds."""
    usual, interrupted = sys.excepthook, threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        # To be remembered: some imports swallow it, and then fail in another way.
        interrupted.set()
        signal.default_int_handler(number, frame)

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not _after_ctrl_c(error) and not interrupted.is_set():
            usual(kind, error, traceback)
            return
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # else torchrun's own process says it
            print(f"\n{STOPPED}", file=sys.stderr, flush=True)
        os._exit(130)

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, interrupt)
