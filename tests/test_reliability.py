"""Every promise of docs/reliability.md has its test, and every test that it names is there."""

from common import ROOT

import ast
import re

from helpers import count

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def all_tests():
    """The names of all tests, each with its file."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(path.name)
    return found


def test_every_test_that_the_page_names_is_there():
    there, named = all_tests(), re.findall(r"`(test_\w+)`", PAGE)
    assert len(set(named)) >= 55
    for name in named:
        assert name in there, name
        count("promises with a test")


def test_every_promise_of_a_table_names_a_test():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| (?!---)", line)]
    promises = [row for row in rows if not re.search(r"\| tests? \|$", row)]
    assert len(promises) >= 28
    for row in promises:
        assert re.search(r"`test_\w+`[^|]*\|$", row), row


def test_the_files_of_this_kind_are_named_whole():
    """No test of these files holds a promise that the page does not make."""
    own = ("test_lost.py", "test_parts.py", "test_files.py", "test_surroundings.py", "test_ends.py")
    parts = {  # of what the page promises as a whole
        "test_an_error_of_the_program_is_still_shown", "test_of_other_programs_nothing_is_ignored",
        "test_which_lessons_have_processes", "test_any_width_of_a_terminal",
        "test_a_part_that_is_there_many_times_is_looked_at_once",
    }  # fmt: skip
    for name, files in all_tests().items():
        if set(files) & set(own) and name not in parts:
            assert f"`{name}`" in PAGE, f"{files}: {name}"
