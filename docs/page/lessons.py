"""What a lesson's page shows: both scripts, cell by cell and side by side, and the ledger."""

from common import ROOT, SIDES, THIRD, script_of
from common.proof import ledger

import difflib
import re
from collections import Counter
from dataclasses import dataclass, field

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

LETTER = {
    "plain": "P",
    "lightning": "L",
    "trainer": "T",
}  # an address such as cifar.html#P96 is a line
PYTHON = PythonLexer(stripnl=False)


@dataclass
class Line:
    """A line of code, or a run of `#:` comments (`note`) from line `number` to line `last`."""

    number: int
    source: str
    html: str = ""
    note: str = ""
    last: int = 0
    same: bool = False
    rows: list[int] = field(default_factory=list)  # of the ledger

    @property
    def indent(self) -> int:
        return len(self.source) - len(self.source.lstrip())

    @property
    def key(self) -> str:
        """What a function and a method have in common."""
        return f"#: {self.note}" if self.note else self.source.strip().replace("self.", "")


def read_cells(source: str) -> dict[str, list[Line]]:
    """Split a script at its `# %% Title` lines, and keep the line numbers."""
    # All in one go: Pygments then knows what is inside a docstring, and closes spans at line ends.
    colored = highlight(source, PYTHON, HtmlFormatter(nowrap=True)).split("\n")
    cells: dict[str, list[Line]] = {"": []}
    title = ""
    for number, (line, markup) in enumerate(zip(source.splitlines(), colored, strict=False), 1):
        before = cells[title][-1] if cells[title] else None
        if match := re.match(r"# %% (.+)", line):
            title = match[1]
            cells[title] = []
        elif match := re.match(r"\s*#: ?(.*)", line):
            if before and before.note and before.last == number - 1:
                before.note, before.last = f"{before.note} {match[1]}", number
            else:
                cells[title].append(Line(number, line, note=match[1], last=number))
        elif line.strip() or before:
            indented = re.sub(r"^ +", r'<span class="in">\g<0></span>', markup)
            cells[title].append(Line(number, line, indented))
    for lines in cells.values():
        while lines and not lines[-1].source.strip():
            lines.pop()
    return cells


def blocks(left: list[Line], right: list[Line]) -> list[tuple[list[Line], list[Line]]]:
    """Pair what stands side by side: runs of lines that both have, and what differs in between."""
    keys = [[line.key for line in side] for side in (left, right)]
    matcher = difflib.SequenceMatcher(lambda line: len(line) < 2, *keys, autojunk=False)
    pairs = []
    for tag, a, b, c, d in matcher.get_opcodes():
        pairs.append((left[a:b], right[c:d]))
        for x, y in zip(left[a:b], right[c:d], strict=False):
            x.same = y.same = tag == "equal" and x.source.strip() == y.source.strip()
    return pairs


@dataclass
class Row:
    """A behaviour of the ledger: its lines on each side, as (lesson, line number, code)."""

    number: int
    lesson: str
    topic: str
    title: str
    lines: dict[str, list[tuple[str, int, str]]]
    library: list[tuple[str, str]]  # method, address
    test: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*|:.*", "", self.title).lower()).strip("-")


def read_ledger() -> list[Row]:
    """Return the rows of the ledger, in its order; ValueError where two have one address."""
    rows = []
    for number, row in enumerate(ledger.rows()):
        lines: dict[str, list[tuple[str, int, str]]] = {}
        for side in SIDES:
            found = (ledger.line(side, row["lesson"], code) for code in row[side])
            lines[side] = [
                (line.path[:-3].partition("/")[2], line.number, line.code) for line in found
            ]
        methods = list(dict(ledger.method(code) for code in row["library"]).items())
        rows.append(Row(number, row["lesson"], row["topic"], row["behaviour"], lines, methods,
                        row["test"]))  # fmt: skip
    for address, times in Counter((row.lesson, row.slug) for row in rows).items():
        if times > 1:
            raise ValueError(f"two rows of a lesson have one address: {address}")
    return rows


@dataclass
class Lesson:
    """A lesson's cells, as (title, pairs of blocks), and its rows of the ledger by their number.

    `third` has the cells of a third side's script by their titles, where there is one.
    """

    name: str
    cells: list[tuple[str, list[tuple[list[Line], list[Line]]]]]
    rows: dict[int, Row]
    third: dict[str, list[Line]]

    @property
    def scripts(self) -> dict[str, str]:
        """Return the path of each side's script, within the repository."""
        sides = [*SIDES, "trainer"] if self.third else SIDES
        return {side: script_of(side, self.name).relative_to(ROOT).as_posix() for side in sides}

    def crowded(self) -> list[Line]:
        """Return the lines of Lightning's side that several behaviours hang on."""
        every = [line for _, pairs in self.cells for pair in pairs for line in pair[1]]
        return [line for line in every if len(line.rows) > 1]

    def excerpt(self, row: Row, side: str, around: int = 2) -> list[Line]:
        """Return the lines of a row with some lines around them, for a slide."""
        place = SIDES.index(side)
        every = [line for _, pairs in self.cells for pair in pairs for line in pair[place]]
        marked = [n for n, line in enumerate(every) if row.number in line.rows]
        near = {m + k for m in marked for k in range(-around, around + 1)}
        return [line for n, line in enumerate(every) if n in near and line.source.strip()]


def _first_plain_line(row: Row) -> int:
    return row.lines["plain"][0][1]


def read_lesson(name: str, rows: list[Row]) -> Lesson:
    """Return both scripts of a lesson, with the rows of the ledger at their lines."""
    sides = {side: read_cells((ROOT / side / f"{name}.py").read_text("utf-8")) for side in SIDES}
    # A tour goes down the loop, whatever topics the ledger has.
    own = {row.number: row for row in sorted(rows, key=_first_plain_line) if row.lesson == name}
    for side, cells in sides.items():
        lines = {line.number: line for cell in cells.values() for line in cell}
        for row in own.values():
            for lesson, number, _ in row.lines[side]:
                if lesson == name:
                    lines[number].rows.append(row.number)
    titles = [title for title in sides["plain"] if title]
    pairs = [(title, blocks(*(sides[side][title] for side in SIDES))) for title in titles]
    third = read_cells(script_of("trainer", name).read_text("utf-8")) if name in THIRD else {}
    for title, lines in third.items():
        shared = {line.source.strip() for line in sides["lightning"].get(title, [])}
        for line in lines:
            line.same = line.source.strip() in shared
    return Lesson(name, pairs, own, third)
