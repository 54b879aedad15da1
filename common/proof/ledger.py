"""Writes docs/ledger.md from docs/ledger.toml: what the Trainer does, and the lines by hand.

`python -m common.proof.ledger`, or `make ledger`. A row names pieces of code; their line numbers
are found here, so that they are right whenever the page is written anew.
"""

from common import ROOT, SIDES
from common.messages import BadInput, clear_messages

import tomllib
from dataclasses import dataclass

DATA, PAGE = ROOT / "docs" / "ledger.toml", ROOT / "docs" / "ledger.md"
HEAD = """\
# The ledger: what the Trainer did that the loop had to

One row for each behaviour of the Trainer that a lesson shows: the line that does it by hand, and
the line that asks the Trainer for it. Both sides of every lesson reach the same bits (`make
parity`), so each row is also a claim that has been proved. This page is made from
[ledger.toml](ledger.toml) by `make ledger`; a test fails where a line is gone.

| the Trainer | the loop had to | with the Trainer |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class Line:
    """A line of a lesson: the piece of code that names it, its file, its number from 1 on."""

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
    for number, found in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        if code in found and not found.lstrip().startswith("#"):
            return Line(code, path, number)
    raise BadInput(f"the ledger names a line that is not in {path} any more: {code}")


def page() -> str:
    """Return the page."""
    text, lesson = HEAD, ""
    for row in rows():
        if row["lesson"] != lesson:
            lesson = row["lesson"]
            text += f"| **[{lesson}]({lesson}.md)** | | |\n"
        found = [[str(line(side, lesson, code)) for code in row[side]] for side in SIDES]
        text += f"| {row['behaviour']} | {'<br>'.join(found[0])} | {'<br>'.join(found[1])} |\n"
    return text


if __name__ == "__main__":
    with clear_messages():
        PAGE.write_text(page(), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows.")
