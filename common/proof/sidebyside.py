"""Show the two scripts of a lesson side by side in the terminal, cell by cell.

`python -m common.proof.sidebyside LESSON [--no-comments] [--cell TITLE]`. Lines that both sides
share are dim; the others are in colour. `--no-comments` leaves out the comments that teach, `#:`;
`--cell Training` shows the cells whose titles begin so. On a terminal it pages, by `less`.
"""

from common import ROOT, SIDES
from common.messages import BadInput, Parser, clear_messages

import argparse
import difflib
import itertools
import os
import re
import sys

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

# Nothing of PyTorch is imported: to show two files takes no seconds.
LESSONS = sorted(path.stem for path in (ROOT / "plain").glob("*.py"))
COLUMNS = 190  # a terminal of so many breaks no line of a lesson


def cells(source: str) -> dict[str, list[str]]:
    """Split a script at its `# %% Title` lines; what stands before the first has the title ""."""
    parts: dict[str, list[str]] = {"": []}
    title = ""
    for line in source.splitlines():
        if match := re.match(r"# %% (.+)", line):
            title = match[1]
            parts[title] = []
        else:
            parts[title].append(line)
    return parts


def without_comments(source: str) -> str:
    """Leave out the lines that only teach: those that begin with `#:`."""
    return re.sub(r"^ *#:.*\n", "", source, flags=re.MULTILINE)


def aligned(left: list[str], right: list[str]) -> list[tuple[int | None, int | None, bool]]:
    """Pair the lines of two cells: (place on the left, place on the right, equal).

    A place is None where that side has no line. A function on one side is a method on the other:
    lines stand side by side if they differ in indentation and `self.` alone, and those that differ
    in indentation alone are equal.
    """
    rows: list[tuple[int | None, int | None, bool]] = []
    ours, theirs = (
        [line.strip().replace("self.", "") for line in lines] for lines in (left, right)
    )
    # Blank lines and closing brackets are alike everywhere and must not pair what is not.
    matcher = difflib.SequenceMatcher(lambda line: len(line) < 2, ours, theirs, autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        for x, y in itertools.zip_longest(range(a, b), range(c, d)):
            both = x is not None and y is not None
            rows.append((x, y, both and left[x].strip() == right[y].strip()))
    return rows


def table(sources: tuple[str, str], width: int, cell: str = "") -> Table:
    """Return the two sources as one table of `width` columns; of them, the cells named so.

    Raises BadInput, with all titles, where no cell's title begins with `cell`.
    """
    left, right = (cells(source) for source in sources)
    shown = [title for title in left | right if title.lower().startswith(cell.lower())]
    if not shown:
        titles = ", ".join(title for title in left | right if title)
        raise BadInput(f"no cell's title begins with '{cell}'; the cells are: {titles}.")
    view = Table(width=width)
    for side in SIDES:
        view.add_column(side, ratio=1, overflow="fold")
    inside = (width - 7) // 2  # of a column: what the frame leaves
    for title in shown:
        if title:
            view.add_section()
            view.add_row(*[Text(title, style="bold yellow")] * 2)
        ours, theirs = left.get(title, []), right.get(title, [])
        colored = _colored(ours), _colored(theirs)
        for x, y, equal in aligned(ours, theirs):
            row = [
                Text() if n is None else lines[n] for n, lines in zip((x, y), colored, strict=True)
            ]
            if equal:
                row = [Text(text.plain, style="dim") for text in row]
            view.add_row(*[_continued(text, inside) for text in row])
    return view


def _continued(line: Text, width: int) -> Text:
    """Break a line that is too long at a space, and indent what follows deeper than the line."""
    indent = len(line.plain) - len(line.plain.lstrip()) + 8
    parts = []
    while len(line) > width and indent < width // 2:
        cut = line.plain.rfind(" ", indent + 1, width)
        cut = cut if cut > 0 else width
        parts.append(line[:cut])
        line = Text(" " * indent) + line[cut:]
        spaces = len(line.plain) - len(line.plain.lstrip())
        line = line[spaces - indent :]  # the space at which it was broken goes
    return Text("\n").join([*parts, line])


def _colored(lines: list[str]) -> list[Text]:
    """Colour a cell's lines as Python, the comments that teach in green."""
    syntax = Syntax("", "python", theme="ansi_dark")
    texts = list(syntax.highlight("\n".join(lines)).split("\n", allow_blank=True))[: len(lines)]
    for text in texts:
        text.no_wrap = False
        if text.plain.lstrip().startswith("#:"):
            text.stylize("italic green")
    return texts


def main(argv: list[str]) -> None:
    """Print the two scripts of the lesson that `argv` names."""
    parser = Parser(prog="common.proof.sidebyside", description="Show a lesson's two scripts.")
    parser.add_argument("lesson", help=", ".join(LESSONS))
    parser.add_argument(
        "--comments",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with the comments that teach, `#:`, or without them",
    )
    parser.add_argument("--cell", default="", metavar="TITLE", help="only cells that begin so")
    arguments = parser.parse_args(argv)
    if arguments.lesson not in LESSONS:
        raise BadInput(f"there is no lesson '{arguments.lesson}'; there are: {', '.join(LESSONS)}.")
    plain, lightning = (
        (ROOT / side / f"{arguments.lesson}.py").read_text(encoding="utf-8") for side in SIDES
    )
    if not arguments.comments:
        plain, lightning = without_comments(plain), without_comments(lightning)
    # Colour also into a pipe, so that `| less -R` shows it; a pipe has no width of its own.
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=True, width=None if terminal else COLUMNS)
    view = table((plain, lightning), console.width, arguments.cell)
    if not terminal:
        console.print(view)
        return
    os.environ.setdefault("LESS", "-RFX")  # in colour, and without waiting where it fits
    with console.pager(styles=True):
        console.print(view)
        if console.width < COLUMNS:
            console.print(
                f"This terminal has {console.width} columns, and long lines are continued; with "
                f"{COLUMNS} none is."
            )


if __name__ == "__main__":
    with clear_messages(failed=2):
        main(sys.argv[1:])
