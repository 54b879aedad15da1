"""Hold runs on several devices against each other, and against one: `make parity-parallel`.

`python -m common.proof.devices [options of the lesson parallel]` runs what has not been run, for 2
and for 4 devices unless --devices says for how many. Exit status 0: all is as it should be; 1: it
is not; 2: a run did not end.

What several processes compute is what one computes, but for rounding. In single precision rounding
stays small for some hundred steps, until it decides a maximum or a ReLU: then the runs go apart. In
double precision it stays far too small for that, so that every step can be compared.
"""

from common.messages import BadInput, clear_messages
from common.proof.compare import compare_results
from common.proof.parity import read_result, run_if_needed, settings_of, show
from common.proof.watch import Result

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

# Relative differences of the losses; 2^-23 is 1.2e-7, 2^-52 is 2.2e-16.
SINGLE, DOUBLE = 1e-6, 1e-12
FIRST = 100  # steps that are compared in single precision
APART = 1e-3  # by how much, at least, BatchNorm on shares of the batch differs from that on all


@dataclass(frozen=True)
class Row:
    """One line of the last table: what was compared, how many numbers, and what came of it."""

    what: str
    compared: int
    result: str
    passed: bool


class Runs:
    """Runs the lesson with further options, each kind of run in a folder of its own."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def get(self, devices: int, kind: str, *more: str, sides: tuple[str, ...]) -> list[Result]:
        folder = settings_of("parallel", self.argv).runs_dir / "devices" / f"{kind}-{devices}"
        argv = [*self.argv, *more, "--devices", f"{devices}", "--runs-dir", f"{folder}"]
        args = settings_of("parallel", argv)
        results = []
        for side in sides:
            print(f"{side}, {kind}, {devices} devices:", flush=True)
            if status := run_if_needed(side, args, argv):
                raise SystemExit(status)
            results.append(read_result(side, args))
        return results


def pair(runs: Runs, devices: int, kind: str, *more: str) -> tuple[Result, Row]:
    """Compare both sides bit for bit; return the plain side's result and the row."""
    a, b = runs.get(devices, kind, *more, sides=("plain", "lightning"))
    comparison = compare_results(a, b)
    show(a, b, comparison)
    compared = sum(stage.compared for stage in comparison.stages)
    result = "equal, bit for bit" if comparison.agree else "DIFFERENT"
    return a, Row(
        f"{kind}, {devices} devices: plain and lightning", compared, result, comparison.agree
    )


def largest(a: Result, b: Result, steps: int | None = None) -> tuple[int, float]:
    """Return how many losses were compared, and the largest relative difference."""
    if len(a["train_loss"]) != len(b["train_loss"]):
        return 0, float("inf")
    losses = list(zip(a["train_loss"], b["train_loss"], strict=True))[:steps]
    if not losses or any(not x or y is None for x, y in losses):  # 0, or no number at all
        return 0, float("inf")
    return len(losses), max(abs(x - y) / abs(x) for x, y in losses)


def rounding(what: str, a: Result, b: Result, tolerance: float, steps: int | None = None) -> Row:
    """Compare the losses within rounding; in double precision also what was counted in the test."""
    compared, difference = largest(a, b, steps)
    passed = compared > 0 and difference <= tolerance
    if steps is None:
        compared += 100
        passed &= a["confusion_matrix"] == b["confusion_matrix"]
    result = f"largest difference {difference:.1e}, at most {tolerance:.0e}"
    return Row(what, compared, result if passed else f"DIFFERENT: {difference:.1e}", passed)


def main(argv: list[str]) -> int:
    """Run and compare everything; return the exit status."""
    given = settings_of("parallel", argv)
    words = [word.partition("=")[0] for word in argv]
    for name in ("--strategy", "--precision", "--batch-norm", "--num-nodes"):
        if name in words:
            raise BadInput(
                f"parity-parallel tries out several values of {name} itself; leave it out, or name "
                "the two sides: make plain-parallel, make lightning-parallel."
            )
    chosen = "--devices" in words
    if chosen and given.devices == 1:
        raise BadInput("one device cannot be compared with one; use --devices 2, or leave it out.")
    runs, double, rows = Runs(argv), ("--precision", "64-true"), []
    only_plain = ("plain",)
    (one,) = runs.get(1, "ddp", sides=only_plain)
    (one_double,) = runs.get(1, "ddp-double", *double, sides=only_plain)
    (one_norm,) = runs.get(1, "batch-norm-double", *double, "--batch-norm", sides=only_plain)
    for n in [given.devices] if chosen else [2, 4]:
        ddp, row = pair(runs, n, "ddp")
        rows.append(row)
        fsdp, row = pair(runs, n, "fsdp", "--strategy", "fsdp")
        rows.append(row)
        first = f"the first {FIRST} losses"
        rows.append(rounding(f"ddp, {n} devices and 1: {first}", ddp, one, SINGLE, FIRST))
        rows.append(rounding(f"fsdp and ddp, {n} devices: {first}", fsdp, ddp, SINGLE, FIRST))
        (ddp_double,) = runs.get(n, "ddp-double", *double, sides=only_plain)
        rows.append(
            rounding(f"ddp in double precision, {n} devices and 1", ddp_double, one_double, DOUBLE)
        )
        fsdp_double = ("--strategy", "fsdp", *double)
        (fsdp,) = runs.get(n, "fsdp-double", *fsdp_double, sides=only_plain)
        rows.append(
            rounding(f"fsdp and ddp in double precision, {n} devices", fsdp, ddp_double, DOUBLE)
        )
        (norm,) = runs.get(n, "batch-norm-double", *double, "--batch-norm", sides=only_plain)
        compared, difference = largest(norm, one_norm)
        apart = f"they differ, as they must: {difference:.1e}"
        what = f"BatchNorm, ddp in double precision, {n} devices and 1"
        rows.append(Row(what, compared, apart, difference > APART))
    table = Table(title="parallel: several devices", title_justify="left")
    table.add_column("what")
    table.add_column("compared", justify="right")
    table.add_column("result")
    for row in rows:
        table.add_row(row.what, f"{row.compared:,}", row.result)
    Console().print(table)
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} comparisons came out as they should.")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
