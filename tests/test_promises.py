"""What a scheduled run reports: each broken promise in the words of its test module."""

import re
import subprocess
import sys

from helpers import count
from promises import ROOT, promise, report

PASSES = "def test_one():\n    pass\n"
FAILS = "def test_two():\n    assert 0\n"


def run(folder, **modules):
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    results = folder / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", "-p",
               "no:cacheprovider", "--rootdir", folder, folder]  # fmt: skip
    subprocess.run(command, cwd=folder, capture_output=True)
    return report(results)


def test_a_broken_promise_is_named(tmp_path):
    said = run(tmp_path, test_hooks=PASSES, test_parity=FAILS)
    assert f"- **broken: {promise('test_parity')}**\n  - test_parity.py::test_two" in said
    assert promise("test_hooks") not in said and "torch " in said and "lightning " in said


def test_what_cannot_be_imported_is_broken_too(tmp_path):
    said = run(tmp_path, test_hooks=PASSES, test_parity="import nothing_of_this_name\n")
    assert f"- **broken: {promise('test_parity')}**" in said


def test_all_is_well_or_nothing_ran(tmp_path):
    assert "Every promise holds." in run(tmp_path, test_hooks=PASSES)
    assert "did not run to their end" in report(tmp_path / "none.xml")


def test_every_module_makes_a_promise():
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        assert re.fullmatch(r".{20,}", promise(path.stem)), path
        count("test modules with a promise")
