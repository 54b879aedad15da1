"""Read the file that a trace is, and what is in it."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .messages import BadInput

Line = dict[str, Any]

FORMAT = 1  # raised when the content of a trace changes


def read(path: Path | str) -> list[str]:
    """Return the lines of a trace, as they are written.

    Raises BadInput where there is no such file, or it is no trace of this format.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        head, end = json.loads(lines[0]), json.loads(lines[-1])
    except FileNotFoundError as error:
        part = Path(f"{path}.part").exists()
        why = "only its beginning, .part: the run was killed, or still goes on" if part else ""
        raise BadInput(
            f"there is no trace '{path}'{'; ' + why if why else ''}; "
            "make one: with Trace(net, path=...), see docs/doctor.md."
        ) from error
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise BadInput(f"'{path}' is no trace, or not a whole one; make it again.") from error
    if not isinstance(head, dict) or head.get("trace") != FORMAT or "end" not in end:
        raise BadInput(f"'{path}' is no trace of format {FORMAT}; make it again.")
    return lines


@dataclass
class Run:
    """One trace: its first and last line, and those of the steps as they are written."""

    name: str
    head: Line
    steps: list[str]
    end: Line

    @classmethod
    def of(cls, path: Path | str, name: str) -> "Run":
        lines = read(path)
        return cls(name, json.loads(lines[0]), lines[1:-1], json.loads(lines[-1]))

    def step(self, index: int) -> Line:
        """Return the recorded step with that index, from 0."""
        return json.loads(self.steps[index])

    def every_step(self) -> Iterator[Line]:
        return (json.loads(line) for line in self.steps)


def weights_before(run: Run, index: int) -> Line:
    """Return the weights before a recorded step, of the recorded step before it."""
    return run.step(index - 1)["weights"] if index else run.head["start"]
