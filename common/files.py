"""Opens files to read: regular ones only, and as much of them as there may be."""

import contextlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

MOST_TEXT = 2**28  # bytes of a file of ours that is read as a whole: 256 MB


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read its bytes.

    A device such as /dev/zero has no end, and a FIFO would be waited for, perhaps for ever. Raises
    OSError where it cannot be read, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(0, "Is a directory" if stat.S_ISDIR(mode) else "it is no regular file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Return what a regular file holds; raise OSError as `open_regular` does, and above `most`."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(0, f"it has more than {most:,} bytes")
    return content


def read_text(path: Path) -> str:
    """Return the text of a regular file; what is no UTF-8 in it becomes a mark that says so."""
    return read_bytes(path).decode(errors="replace")
