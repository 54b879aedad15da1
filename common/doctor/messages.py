"""What the command says when it ends early: one sentence."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


class BadInput(Exception):
    """Something that the user can mend; the text says in one sentence what, and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _leave(f"error: {message}; see --help.", status=2)


@contextlib.contextmanager
def clear_messages() -> Iterator[None]:
    """Say in one sentence what the user can mend, and leave with 2, or with 130 after Ctrl-C."""
    try:
        yield
    except BadInput as error:
        _leave(f"error: {error}", status=2)
    except OSError as error:
        _leave(f"error: the system refused: {error}.", status=2)
    except KeyboardInterrupt:
        _leave("\nStopped by Ctrl-C.", status=130)


def _leave(sentence: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(sentence, file=sys.stderr)
    raise SystemExit(status) from None
