"""What the command says: where its help is, and one sentence when it ends early."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# Where the pages are that explain a cause: beside it in the repository, and published elsewhere.
# The address before `docs/`; all links of the package follow it.
PUBLISHED = "https://github.com/plain-and-lightning/plain-and-lightning/blob/main/"
HOME = "" if (Path(__file__).parents[2] / "docs" / "pitfalls.md").is_file() else PUBLISHED
PAGES = f"{HOME}docs/pitfalls.md"
SAMENESS = f"{HOME}docs/sameness.md"
DOCTOR = f"{HOME}docs/doctor.md"


class BadInput(Exception):
    """Something that the user can mend; the text says in one sentence what, and what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text.replace("\n", " ")))


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
    except MemoryError:
        _leave("error: the traces do not fit into memory; trace fewer steps: every=10.", status=2)
    except KeyboardInterrupt:
        _leave("\nStopped by Ctrl-C.", status=130)


def printable(text: str) -> str:
    """Replace what would steer a terminal: a trace may come from somebody else."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _leave(sentence: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print("\n" * sentence.startswith("\n") + printable(sentence.strip()), file=sys.stderr)
    raise SystemExit(status) from None
