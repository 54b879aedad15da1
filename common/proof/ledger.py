"""Writes docs/ledger.md from docs/ledger.toml: what the Trainer does, and the lines by hand.

`python -m common.proof.ledger`, or `make ledger`. A row names pieces of code, in the lessons and in
the installed library; their line numbers are found here, so that they are right whenever the page
is written anew.
"""

from common import ROOT, SIDES
from common.messages import BadInput, clear_messages

import importlib.metadata
import itertools
import re
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

DATA, PAGE = ROOT / "docs" / "ledger.toml", ROOT / "docs" / "ledger.md"
LIBRARY = Path(sysconfig.get_path("purelib"), "lightning")
VERSION = importlib.metadata.version("lightning")
# Where the library's source can be read, at the version that is installed here.
SOURCE = f"https://github.com/Lightning-AI/pytorch-lightning/blob/{VERSION}/src/lightning"
HEAD = f"""\
# The ledger: what the Trainer did that the loop had to

Each row is one behaviour of the Trainer: the lines that do it by hand, the line that asks the
Trainer for it, and the method in Lightning {VERSION} that does it. Every row is proved: both sides
of its lesson reach the same bits, and the test in the last column compares this behaviour.

The number behind a line leads to that line, and a method's name to the library's source. `make
ledger` writes this page from [ledger.toml](ledger.toml). A test fails where a line is gone. What
of Lightning no lesson uses stands in [coverage.md](coverage.md); seven things more, by hand and by
the Trainer, in [tuning.md](tuning.md).
"""
COLUMNS = """
| the Trainer | the loop had to | with the Trainer | in the library | lesson |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Line:
    """A line of code: the piece that names it, its file, its number from 1 on."""

    code: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"`{self.code}` [{self.number}](../{self.path}#L{self.number})"


def rows() -> list[dict]:
    """Return the rows of the ledger, as docs/ledger.toml has them."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))["row"]


def line(side: str, lesson: str, text: str) -> Line:
    """Find the first line that holds a text; raise BadInput where there is none.

    "lightning/cifar: text" is looked for in that file, every other text in SIDE/LESSON.py.
    """
    place, _, code = text.partition(": ")
    path = f"{place}.py" if place.startswith("lightning/") else f"{side}/{lesson}.py"
    code = code if place.startswith("lightning/") else text
    return Line(code, path, _find(ROOT / path, path, code))


def method(text: str) -> tuple[str, str]:
    """Return the method of the library that a text such as "file.py: code" names, and its address.

    It is the class and the function around the first line with that code. Raises BadInput where
    the file has no such line.
    """
    path, _, code = text.partition(": ")
    number = _find(LIBRARY / path, f"Lightning {VERSION}'s {path}", code)
    names: list[str] = []
    margin = 1000
    for above in reversed((LIBRARY / path).read_text(encoding="utf-8").splitlines()[:number]):
        found = re.match(r"( *)(?:def|class) (\w+)", above)
        if found and len(found[1]) < margin:
            names, margin = [found[2], *names], len(found[1])
    return ".".join(names), f"{SOURCE}/{path}#L{number}"


def _find(file: Path, name: str, code: str) -> int:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, found in enumerate(lines, 1):
        if code in found and not found.lstrip().startswith("#"):
            return number
    raise BadInput(f"the ledger names a line that is not in {name} any more: {code}")


def check_test(name: str) -> None:
    """Raise BadInput unless there is a test such as "test_x.py::test_y[case]"."""
    file, _, function = name.partition("::")
    function, _, case = function.rstrip("]").partition("[")
    for code in (f"def {function}(", case):
        _find(ROOT / "tests" / file, f"tests/{file}", code)


def page() -> str:
    """Return the page."""
    text = HEAD
    for topic, group in itertools.groupby(rows(), key=lambda row: row["topic"]):
        text += f"\n## {topic}\n{COLUMNS}"
        for row in group:
            lesson = row["lesson"]
            found = [[str(line(side, lesson, code)) for code in row[side]] for side in SIDES]
            names = dict(method(code) for code in row["library"])
            found.append([f"[`{name}`]({address})" for name, address in names.items()])
            check_test(row["test"])
            proved = f'[test](../tests/{row["test"].partition("::")[0]} "{row["test"]}")'
            cells = [
                row["behaviour"],
                *map("<br>".join, found),
                f"[{lesson}]({lesson}.md), {proved}",
            ]
            text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    with clear_messages(failed=2):
        PAGE.write_text(page(), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows.")
