"""Write the file that a trace is, and read it: only whole ones, and none that is endless."""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import stat
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from .messages import DOCTOR, BadInput

Line = dict[str, Any]

FORMAT = 4  # raised when the content of a trace changes
LARGEST = 1 << 30  # characters of a trace that are read
LONGEST = 1 << 27  # of one line
CHUNK = 1 << 20


def path_of_rank(path: Path, rank: int, ranks: int) -> Path:
    """Return the path of one process's file: it.rank0.trace, where there are several."""
    return path if ranks == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


class Writer:
    """Writes a trace: lines as they come, the last one when it is closed; the file is then whole.

    The last line is a part of its own at the file's end, so that a trace that is opened again goes
    on where it ended. It has a digest of all lines before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of each process one: they may only later learn that they are several.
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        self.digest = hashlib.sha256()
        self.whole = 0  # bytes before the last line, once the file was whole

    def open(self) -> bool:
        """Open the file, and tell whether it goes on; raise BadInput where that is impossible."""
        again = bool(self.whole) and self.path.is_file()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if again:
                self.path.replace(self.temporary)
                self.raw: BinaryIO = self.temporary.open("r+b")
                self.raw.truncate(self.whole)
                self.raw.seek(0, os.SEEK_END)
            else:
                self.digest = hashlib.sha256()
                self.raw = self.temporary.open("wb")
            self.file = self._part()
        except OSError as error:
            raise BadInput(
                f"no trace can be written to '{self.path}': {error.strerror}; name another path."
            ) from error
        return again

    def _part(self) -> gzip.GzipFile:
        # Without a name and a time in it: traces of the same content are the same file.
        return gzip.GzipFile("", "wb", 4, self.raw, 0)

    def write(self, line: Line) -> str:
        """Write a line; return what went wrong."""
        text = (json.dumps(line) + "\n").encode()
        try:
            self.file.write(text)
        except (OSError, ValueError) as error:
            return f"nothing more could be written ({error})"
        self.digest.update(text)
        return ""

    def close(self, end: Line) -> str:
        """Write the last line and let the file appear; return what went wrong."""
        try:
            self.file.close()
            self.raw.flush()
            self.whole = self.raw.tell()
            with self._part() as last:
                last.write((json.dumps(end | {"digest": self.digest.hexdigest()}) + "\n").encode())
            self.raw.close()
            self.temporary.replace(self.path)
        except (OSError, ValueError) as error:
            return f"it could not be written to its end ({error})"
        return ""

    def give_up(self, why: str) -> None:
        """Leave nothing half-written, and say so; raise nothing."""
        with contextlib.suppress(OSError):
            self.raw.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
            print(f"samebits: there is no trace '{self.path}': {why}.", file=sys.stderr)


def read(path: Path | str) -> list[str]:
    """Return the lines of a trace, as they are written.

    Raises BadInput where there is no such file, or it is no whole trace of this format.
    """
    path = Path(path)
    damaged = BadInput(f"'{path}' is no trace, or not a whole one; make it again.")
    try:
        lines = _lines(path)
        head, end = json.loads(lines[0]), json.loads(lines[-1])
    except FileNotFoundError as error:
        part = any(path.parent.glob(f"{glob.escape(path.name)}*.part"))
        why = "; only its beginning, .part: the run was killed, or still goes on" if part else ""
        raise BadInput(
            f"there is no trace '{path}'{why}; make one: with Trace(net, path=...), see {DOCTOR}."
        ) from error
    except (OSError, EOFError, ValueError, IndexError, RecursionError, zlib.error) as error:
        raise damaged from error
    if not isinstance(head, dict) or not isinstance(end, dict):
        raise damaged
    if head.get("trace") != FORMAT or "end" not in end:
        raise BadInput(f"'{path}' is no trace of format {FORMAT}; make it again.")
    whole = hashlib.sha256("".join(f"{line}\n" for line in lines[:-1]).encode()).hexdigest()
    if end.get("digest") != whole:
        raise damaged
    return lines


def _lines(path: Path) -> list[str]:
    """Read and decompress a file, but no more than is bearable; only a regular one."""
    # Without waiting: opening a pipe that nobody writes to would never return.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as raw:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadInput(f"'{path}' is no regular file; name the file of a trace.")
        content = bytearray()
        with gzip.open(raw, "rb") as file:
            while chunk := file.read(CHUNK):
                content += chunk
                if len(content) > LARGEST:
                    raise BadInput(
                        f"'{path}' holds more than {LARGEST:,} characters; "
                        "trace fewer steps: every=10."
                    )
    lines = content.decode().removesuffix("\n").split("\n")
    if max(map(len, lines), default=0) > LONGEST:
        raise BadInput(f"'{path}' has a line of more than {LONGEST:,} characters; trace less.")
    return lines
