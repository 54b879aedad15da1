"""The doctor on code that it has never seen: the right stage and cause, and no false alarm."""

import controls
import pytest
import torch
from case_table import EQUAL, row, table
from cases import CASES
from cases.pairs import PAIRS
from helpers import count, some
from samebits import compare

TABLE = controls.PAGE.read_text().partition("<!-- made by make cases -->\n")[2]


def test_there_are_enough():
    assert len(CASES) >= 53
    assert all(case.source and case.mistake for case in CASES.values())
    assert sum(case.cause is None for case in CASES.values()) == 2
    rows = [line for line in TABLE.partition("<!-- end -->")[0].splitlines() if "| `" in line]
    assert len(rows) == len(CASES)


@pytest.mark.parametrize("name", some(CASES, every=3))
def test_a_mistake_is_named(name):
    case = CASES[name]
    diagnosis = case.diagnose(fixed=False)
    assert diagnosis.stage == case.stage, str(diagnosis)
    if case.cause is not None:
        assert diagnosis.causes[0].name.startswith(case.cause), str(diagnosis)
        assert not diagnosis.rounding
    assert row(name, case, diagnosis) in TABLE
    count("strangers' mistakes named")


@pytest.mark.parametrize("name", some(CASES, every=3))
def test_a_mended_port_gives_no_alarm(name):
    case = CASES[name]
    diagnosis = case.diagnose(fixed=True)
    assert diagnosis.rounding if case.rounding else diagnosis.equal, str(diagnosis)
    count("mended ports without an alarm")


@pytest.mark.parametrize("name", some(PAIRS, every=3))
def test_equal_trainings_that_are_written_otherwise(name, tmp_path):
    build, *ways = PAIRS[name]
    for side, way in zip("ab", ways, strict=True):
        torch.manual_seed(0)
        net = build()
        torch.manual_seed(1)
        way(net, tmp_path / f"{side}.trace")
    diagnosis = compare(tmp_path / "a.trace", tmp_path / "b.trace")
    assert diagnosis.equal and diagnosis.steps >= 2, str(diagnosis)
    count("equal trainings without an alarm")


def test_there_are_enough_equal_pairs():
    """Those of the lessons, the mended ports, and those that are written otherwise."""
    assert EQUAL >= 103
    assert f"{EQUAL} pairs of equal trainings" in TABLE


def test_the_table_counts_what_it_shows():
    shown = TABLE.partition("<!-- end -->")[0]
    rows = [line for line in shown.splitlines() if "| `" in line]
    assert table(rows, 0) == shown.rstrip("\n")
