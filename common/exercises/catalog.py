"""Reads the exercises: docs/exercises/LESSON.toml, and the text that each gives to a learner.

An exercise is a lesson's own script with a change made to it: so it follows the lesson, and undoing
the change solves it. A question has answers in place of a change.
"""

from common import ROOT, script_of
from common.messages import BadInput

import difflib
import functools
import re
import textwrap
import tomllib
from dataclasses import dataclass, field
from typing import Any

FOLDER = ROOT / "docs" / "exercises"
KINDS = {
    "find": "find and mend",
    "write": "write it",
    "port": "port it",
    "predict": "predict first",
}
TWIN = {"plain": "lightning", "lightning": "plain"}
WIDTH = 88  # of the texts that a learner reads


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise.

    `row` is the behaviour in docs/ledger.toml that it trains. `changes` are pairs of texts: the
    lesson's own, and what stands in its place. As given, it fails at `stage`: "run" where it breaks
    off, else a stage of parity. `settings` go to the lesson's Args, on both sides. `resume_at` is
    the step whose checkpoint a second run begins from, which is compared then. `processes` train
    together. A question has `answers`, each a text and what to say of it, and `right`, a letter.
    """

    number: int
    name: str
    title: str
    kind: str
    lesson: str
    level: int
    minutes: int
    row: str
    task: str
    hints: tuple[str, ...]
    explanation: str
    side: str = "plain"
    stage: str = "answer"
    changes: tuple[tuple[str, str], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    resume_at: int = 0
    processes: int = 1
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    right: str = ""

    @property
    def label(self) -> str:
        return f"{self.number:02}"

    @property
    def file(self) -> str:
        """The name of the learner's file."""
        return f"{self.label}_{self.name}.py"

    @property
    def twin(self) -> str:
        """The script that is the specification."""
        return f"{TWIN[self.side]}/{self.lesson}.py"

    @property
    def about(self) -> str:
        return f"{KINDS[self.kind]}, level {self.level} of 3, about {self.minutes} minutes"

    def given(self) -> str:
        """Return what the learner's file holds at the start."""
        return self._question() if self.kind == "predict" else self._script(*self.changes)

    def solution(self) -> str:
        """Return the text of a file that solves it."""
        if self.kind == "predict":
            return self.given().replace('answer = ""', f'answer = "{self.right}"')
        return self._script()

    def difference(self) -> str:
        """Return the lines that solve it, as a difference between the two texts."""
        if self.kind == "predict":
            text, why = self.answers[self.right]
            return f"{self.right}  {text}\n{why}"
        lines = difflib.unified_diff(
            self.given().splitlines(), self.solution().splitlines(), "as given", "solved",
            n=2, lineterm="",
        )  # fmt: skip
        return "\n".join(lines)

    def _head(self) -> str:
        first = f"Exercise {self.label}: {self.title} ({self.about})"
        return paragraphs(f"{first}\n\n{self.task}")

    def _script(self, *changes: tuple[str, str]) -> str:
        """Return the lesson's text after the changes, without what would give them away.

        That is its teaching comments, and its first lines, in whose place the task stands. The last
        lines, which read the command line, are not needed.
        """
        path = script_of(self.side, self.lesson)
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            if text.count(old) != 1:
                raise ValueError(
                    f"exercise {self.label}: {path} has {text.count(old)} times: {old}"
                )
            text = text.replace(old, new)
        text = text.partition('"""\n\n')[2].partition('\n\nif __name__ == "__main__":')[0]
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#:")]
        text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines).rstrip("\n"))
        head = (
            f"{self._head()}\n\n"
            f"    make check N={self.label}      is it what {self.twin} does?\n"
            f"    make hint N={self.label}       one hint, and the next one when you ask again\n"
        )
        return f'"""{head}"""\n\n{text}\n'

    def _question(self) -> str:
        answers = "\n".join(
            textwrap.fill(f"{letter}  {text}", WIDTH, initial_indent="    ",
                          subsequent_indent="       ")
            for letter, (text, _) in self.answers.items()
        )  # fmt: skip
        last = f"Write the letter between the quotation marks, then: make check N={self.label}"
        return f'"""{self._head()}\n\n{answers}\n\n{last}\n"""\n\nanswer = ""\n'


def parts(text: str) -> list[str]:
    """Return the paragraphs of a text; one that is indented is code."""
    return text.strip("\n").split("\n\n")


def paragraphs(text: str) -> str:
    """Break a text into lines of WIDTH letters; code stays as it is."""
    return "\n\n".join(
        part if part.startswith("    ") else textwrap.fill(" ".join(part.split()), WIDTH)
        for part in parts(text)
    )


@functools.cache
def exercises() -> dict[int, Exercise]:
    """Return all exercises by their numbers, in the order in which they are learned."""
    found = []
    for path in FOLDER.glob("*.toml"):
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["exercise"]
        found += [_exercise(path.stem, row) for row in rows]
    return {each.number: each for each in sorted(found, key=lambda each: each.number)}


def _exercise(lesson: str, row: dict[str, Any]) -> Exercise:
    text = script_of(row.get("side", "plain"), lesson).read_text(encoding="utf-8")
    changes = tuple((_old(text, change), change["new"]) for change in row.pop("changes", ()))
    answers = {letter: (text, why) for letter, (text, why) in row.pop("answers", {}).items()}
    return Exercise(lesson=lesson, changes=changes, answers=answers,
                    hints=tuple(row.pop("hints")), **row)  # fmt: skip


def _old(text: str, change: dict[str, str]) -> str:
    """Return the lesson's text that is replaced: `old`, or all from `first` on up to `before`."""
    if "old" in change:
        return change["old"]
    begin = text.index(change["first"])
    return text[begin : text.index(change["before"], begin)]


def find(number: str) -> Exercise:
    """Return the exercise of a number as typed, 7 or 07; raise BadInput where there is none."""
    found = exercises().get(int(number)) if number.isdecimal() and len(number) < 4 else None
    if found is None:
        raise BadInput(
            f"there is no exercise '{number}'; `make exercise` lists them, from "
            f"{min(exercises()):02} to {max(exercises()):02}: make exercise N=01."
        )
    return found


def of_lesson(lesson: str) -> list[Exercise]:
    return [each for each in exercises().values() if each.lesson == lesson]
