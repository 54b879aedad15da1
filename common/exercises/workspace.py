"""The learner's folder: a file for each exercise that was begun, and progress.json.

Nothing of the learner's is ever overwritten: a file is written only where there is none.
"""

from common import ROOT
from common.exercises.catalog import Exercise
from common.folders import is_writable, write_whole
from common.messages import BadInput

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = ROOT / "exercises"
KEPT = OURS / ".twins"  # what the twins reached, on this machine


@dataclass(frozen=True)
class Workspace:
    """A folder with a learner's files."""

    folder: Path

    def path(self, exercise: Exercise) -> Path:
        return self.folder / exercise.file

    def said(self, exercise: Exercise) -> str:
        """Name a file: within this repository as the learner types it."""
        path = self.path(exercise)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    def typed(self, command: str, exercise: Exercise) -> str:
        """Return the command that does something with an exercise in this folder."""
        more = "" if self.folder == OURS else f" WORKSPACE={shlex.quote(str(self.folder))}"
        return f"make {command} N={exercise.label}{more}"

    def begin(self, exercise: Exercise) -> bool:
        """Write the file of an exercise; return False, and leave it alone, where there is one."""
        path = self.path(exercise)
        if path.exists() or path.is_symlink():
            return False
        self._writable()
        write_whole(path, lambda half: half.write_text(exercise.given(), encoding="utf-8"))
        return True

    def read(self, exercise: Exercise) -> str:
        """Return what the learner wrote; raise BadInput where it is no text, empty or not there."""
        path, again = self.path(exercise), self.typed("exercise", exercise)
        said = self.said(exercise)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise BadInput(f"there is no file '{said}'; `{again}` writes it.") from None
        except UnicodeDecodeError as error:
            raise BadInput(
                f"'{said}' is no text in UTF-8 (at byte {error.start + 1}); save it in that form."
            ) from None
        except OSError as error:
            raise BadInput(f"'{said}' cannot be read: {error.strerror}.") from None
        if not text.strip():
            raise BadInput(f"'{said}' is empty; remove it, and `{again}` writes it anew.")
        return text

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"

    def progress(self) -> dict[str, dict[str, Any]]:
        """Return what is noted of each exercise, by its name: solved, hints, asked."""
        try:
            found = json.loads(self._progress.read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()):
                return found
        except FileNotFoundError:
            return {}
        except (ValueError, OSError):
            pass
        raise BadInput(
            f"'{os.path.relpath(self._progress)}' does not hold the progress of exercises any "
            "more; remove it, and `make check ALL=1` finds out again what is solved."
        )

    def note(self, exercise: Exercise, **facts: Any) -> None:
        """Note something of an exercise."""
        noted = self.progress()
        noted[exercise.name] = noted.get(exercise.name, {}) | facts
        self._writable()
        text = json.dumps(noted, indent=1) + "\n"
        write_whole(self._progress, lambda half: half.write_text(text, encoding="utf-8"))

    def of(self, exercise: Exercise) -> dict[str, Any]:
        return self.progress().get(exercise.name, {})

    def _writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_writable(self.folder):
                raise PermissionError(13, "you may not write there")
        except OSError as error:
            raise BadInput(
                f"the folder '{self.folder}' cannot take exercises ({error.strerror}); name "
                "another one: make exercise N=01 WORKSPACE=folder."
            ) from None
