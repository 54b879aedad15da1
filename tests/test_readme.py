"""The README is true: its lines, its code, its commands."""

from common import ROOT
from common.recipes import RECIPES
from common.sidebyside import cells

import json
import re
import subprocess
import sys

import pytest
from helpers import SIDES, count, real_data
from test_negative_controls import CHANGES

README = (ROOT / "README.md").read_text()


def test_the_ledger_points_at_the_right_lines():
    links = re.findall(r"`([^`]+)` \[(\d+)\]\(((?:plain|lightning)/\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 36
    for code, shown, path, line in links:
        assert shown == line
        assert code.strip() in (ROOT / path).read_text().splitlines()[int(line) - 1], (path, line)
        count("lines of the ledger")
    rows = re.findall(r"^\| .*\]\(plain/.*\]\(lightning/.*\|$", README, re.MULTILINE)
    assert len(rows) >= 16


def test_the_quoted_code_stands_in_the_lessons():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block, side in zip(blocks, ("plain", "lightning", "lightning"), strict=True):
        source = [line.strip() for line in (ROOT / side / "cifar.py").read_text().splitlines()]
        place = 0
        for line in block.splitlines():
            place = source.index(line.strip(), place) + 1  # in this order
            count("lines of code in the README")


def test_the_commands_exist():
    commands = re.findall(r"^make(?: ([a-z-]+))?(?: |$)", README, re.MULTILINE)
    assert len(commands) >= 9
    for target in filter(None, commands):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


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
    if not real_data(RECIPES[lesson].data):
        pytest.skip("needs the real images: set DATA_DIR")
    steps, least, most = DEFAULTS[lesson]
    command = [sys.executable, "-m", "common.parity", lesson, "--runs-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    plain, lightning = (
        json.loads((tmp_path / lesson / side / "result.json").read_text()) for side in SIDES
    )
    assert plain["data"] == lightning["data"] == RECIPES[lesson].data
    assert plain["weights_sha256"] == lightning["weights_sha256"]
    assert plain["train_loss"] == lightning["train_loss"]
    assert len(plain["train_loss"]) == (steps or len(plain["val_loss"]) * 1407)
    assert plain["test_accuracy"] == lightning["test_accuracy"]
    assert least < plain["test_accuracy"] < most
    if lesson == "callbacks":
        assert plain["decisions"]["stopped by"].startswith("early stopping")
    count("default runs on the real images")
