"""Writes the list of exercises into docs/exercises.md: `python -m common.exercises.page`."""

from common import ROOT
from common.exercises.catalog import KINDS, exercises
from common.messages import clear_messages

from itertools import groupby

PAGE = ROOT / "docs" / "exercises.md"
BEGIN, END = "<!-- made by common.exercises.page -->\n", "<!-- end -->"


def table() -> str:
    """Return the list: a heading for each lesson, a row for each exercise."""
    parts = []
    for lesson, group in groupby(exercises().values(), key=lambda each: each.lesson):
        rows = "".join(
            f"| {e.label} | {e.title} | {KINDS[e.kind]} | {e.level} | {e.minutes} | {e.row} |\n"
            for e in group
        )
        parts.append(
            f"### {lesson}\n\n"
            "| number | exercise | kind | level | minutes | what the Trainer does |\n"
            f"| --- | --- | --- | --- | --- | --- |\n{rows}"
        )
    return "\n".join(parts)


def page() -> str:
    """Return the page with today's list in it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    with clear_messages(failed=2):
        PAGE.write_text(page(), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: {len(exercises())} exercises.")
