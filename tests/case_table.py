"""Try the doctor on all cases, and write the table in docs/doctor.md: `make cases`."""

from common.messages import clear_messages

import os
import sys
import tempfile
from pathlib import Path

import torch
from cases import CASES, Case
from cases.pairs import PAIRS
from controls import EQUAL as OF_LESSONS
from controls import PAGE, quietly, written
from samebits import Diagnosis, compare

# One mended port differs by another order of sums, and is none of them.
EQUAL = len(OF_LESSONS) + len(PAIRS) + sum(not case.rounding for case in CASES.values())


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


def table(rows: list[str], alarms: int) -> str:
    right = sum(line.endswith("| right |") for line in rows)
    return "\n".join([
        "| case | report | the mistake | what the doctor says first | |",
        "| --- | --- | --- | --- | --- |", *rows, "",
        f"{len(rows)} cases: {right} right, stage and first cause. {EQUAL} pairs of equal trainings"
        f" (of the lessons, of mended ports, and {len(PAIRS)} that are written otherwise): {alarms}"
        " false alarms.",
    ])  # fmt: skip


def main() -> None:
    rows, alarms = [], 0
    for name, case in CASES.items():
        rows.append(row(name, case, quietly(case.diagnose, False)))
        print(rows[-1], flush=True)
        mended = quietly(case.diagnose, True)
        if not (mended.rounding if case.rounding else mended.equal):
            alarms += 1
            print(f"a false alarm: {name}: {mended}")
    for name, (build, *ways) in PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{side}.trace") for side in "ab"]
            for path, way in zip(paths, ways, strict=True):
                torch.manual_seed(0)
                net = build()
                torch.manual_seed(1)
                quietly(way, net, path)
            diagnosis = compare(*paths)
        if not diagnosis.equal:
            alarms += 1
            print(f"a false alarm: {name}: {diagnosis}")
    written(PAGE, "made by make cases", table(rows, alarms))
    print(table(rows, alarms).splitlines()[-1])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with clear_messages():
        sys.exit(main())
