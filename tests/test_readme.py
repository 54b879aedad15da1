"""The README is true: its lines, its code, its commands."""

from common import ROOT
from common.messages import BadInput
from common.networks import NETWORKS
from common.proof import ledger
from common.proof.sidebyside import cells

import json
import re
import subprocess
import sys
import tomllib

import pytest
import samebits.messages
from helpers import SIDES, count, lessons, real_data
from test_negative_controls import CHANGES

README = (ROOT / "README.md").read_text()


def test_the_ledger_is_current():
    """`make ledger` would change nothing: every line that it names is there, at that number."""
    assert ledger.PAGE.read_text() == ledger.page()
    rows = ledger.rows()
    assert len(rows) >= 61 and {row["lesson"] for row in rows} == set(lessons())
    assert f"{len(rows)} behaviours" in README
    assert len({row["topic"] for row in rows}) == ledger.page().count("\n## ") >= 10
    for row in rows:
        assert row["behaviour"] and len(row["library"]) <= 3
        # The Trainer's one call answers for many rows; the method of the library tells them apart.
        for kind in ("plain", "lightning", "library"):
            assert row[kind], row
            count("lines of the ledger", len(row[kind]))


def test_a_method_of_the_library_is_found_by_its_line():
    name, address = ledger.method("pytorch/loops/fit_loop.py: _set_sampler_epoch(dl,")
    assert name == "_FitLoop.on_advance_start"
    file, _, number = address.rpartition("#L")
    assert file == f"{ledger.SOURCE}/pytorch/loops/fit_loop.py"
    source = (ledger.LIBRARY / "pytorch" / "loops" / "fit_loop.py").read_text().splitlines()
    assert "_set_sampler_epoch(dl," in source[int(number) - 1]
    assert ledger.method("fabric/utilities/seed.py: def seed_everything(")[0] == "seed_everything"
    for text in ("pytorch/loops/fit_loop.py: self.fly()", "pytorch/no_loop.py: def fly("):
        with pytest.raises(BadInput, match=r"not in Lightning .* any more: "):
            ledger.method(text)


@pytest.mark.parametrize("name", [
    "test_parity.py::test_fly", "test_none.py::test_combinations",
    "test_negative_controls.py::test_one_change_is_found[flying]",
])  # fmt: skip
def test_a_test_that_is_gone_is_named(name):
    ledger.check_test("test_negative_controls.py::test_one_change_is_found[no zero_grad]")
    with pytest.raises(BadInput, match=r"not in tests/test_\w+.py any more: "):
        ledger.check_test(name)


def test_a_line_that_is_gone_is_named():
    with pytest.raises(BadInput, match=r"not in plain/cifar.py any more: optimizer.fly\(\)"):
        ledger.line("plain", "cifar", "optimizer.fly()")
    assert ledger.line("plain", "cifar", "optimizer.step()").number > 50


def test_the_quoted_code_stands_in_the_lessons():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    sides = ("plain", "lightning", "lightning")
    for block, side in zip(blocks, sides, strict=True):
        source = [line.strip() for line in (ROOT / side / "cifar.py").read_text().splitlines()]
        place = 0
        for line in block.splitlines():
            place = source.index(line.strip(), place) + 1  # in this order
            count("lines of code in the README")


def test_it_names_the_addresses_of_the_project():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f"git clone {urls['repository']}\n" in README
    assert f"[The website]({urls['homepage']})" in README
    assert f"{urls['repository']}/blob/main/" == samebits.messages.PUBLISHED


def test_the_commands_exist():
    commands = re.findall(r"^make(?: ([a-z-]+))?(?: |$)", README, re.MULTILINE)
    assert len(commands) >= 7
    for target in filter(None, commands):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_exercises_are_tested_changes():
    page = (ROOT / "docs" / "cifar.md").read_text()
    rows = re.findall(r"^\| (.+) \| (plain|lightning) \| (\w+) \|$", page, re.MULTILINE)
    assert len(rows) >= 14
    for name, side, stage in rows:
        assert CHANGES[name][:2] == (side, stage), name
        count("exercises")
    titles = re.findall(r"^\| ([A-Z][^|]+?) \|", page, re.MULTILINE)
    assert titles == [title for title in cells((ROOT / "plain" / "cifar.py").read_text()) if title]


# What the lessons reach with their defaults on the real images: (steps, least and most accuracy).
DEFAULTS = {
    "cifar": (2 * 45_000 // 4, 0.5, 0.6),
    "fashion": (5 * 860, 0.6, 0.7),
    "callbacks": (None, 0.65, 0.8),  # it stops by itself
}


@pytest.mark.slow
@pytest.mark.parametrize("lesson", DEFAULTS)
def test_the_default_run_on_the_real_images(lesson, tmp_path):
    """The README's runs: the same weights and losses on both sides."""
    data = next(network.data for network in NETWORKS if network.lesson == lesson)
    if not real_data(data):
        pytest.skip("needs the real images: set DATA_DIR")
    steps, least, most = DEFAULTS[lesson]
    command = [sys.executable, "-m", "common.proof.parity", lesson, "--runs-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    plain, lightning = (
        json.loads((tmp_path / lesson / side / "result.json").read_text()) for side in SIDES
    )
    assert plain["data"] == lightning["data"] == data
    assert plain["weights_sha256"] == lightning["weights_sha256"]
    assert plain["train_loss"] == lightning["train_loss"]
    assert len(plain["train_loss"]) == (steps or len(plain["val_loss"]) * 1407)
    assert plain["test_accuracy"] == lightning["test_accuracy"]
    assert least < plain["test_accuracy"] < most
    if lesson == "callbacks":
        assert len(plain["val_loss"]) < 50  # early stopping
    count("default runs on the real images")
