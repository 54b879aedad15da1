"""Try the doctor on all cases, and write the table in docs/doctor.md: `make cases`."""

from common.messages import clear_messages

import os
import sys

from cases import CASES, Case
from controls import PAGE, quietly, written
from samebits import Diagnosis


def row(name: str, case: Case, diagnosis: Diagnosis) -> str:
    """Return a line of the table: source, mistake, what was said, whether that is right."""
    first = diagnosis.causes[0].name if diagnosis.causes else "equal"
    where = f"step {diagnosis.step}, {diagnosis.stage}: " if diagnosis.stage else ""
    if case.cause is None:
        right = diagnosis.equal
    else:
        right = diagnosis.stage == case.stage and first.startswith(case.cause)
    verdict = "right" if right else "**wrong**"
    return f"| `{name}` | {case.source} | {case.mistake} | {where}{first} | {verdict} |"


def table(rows: list[str]) -> str:
    right = sum(line.endswith("| right |") for line in rows)
    return "\n".join([
        "| case | report | the mistake | what the doctor says first | |",
        "| --- | --- | --- | --- | --- |", *rows, "",
        f"{len(rows)} cases: {right} right, stage and first cause.",
    ])  # fmt: skip


def main() -> None:
    rows = []
    for name, case in CASES.items():
        rows.append(row(name, case, quietly(case.diagnose, False)))
        print(rows[-1], flush=True)
        mended = quietly(case.diagnose, True)
        if not (mended.rounding if case.rounding else mended.equal):
            print(f"a false alarm: {name}: {mended}")
    written(PAGE, "made by make cases", table(rows))
    print(table(rows).splitlines()[-1])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with clear_messages():
        sys.exit(main())
