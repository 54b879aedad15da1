"""The README is true: its lines, its code, its commands."""

from common import ROOT
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


@pytest.mark.slow
@pytest.mark.skipif(not real_data(), reason="needs the real images: set DATA_DIR")
def test_the_default_run_on_the_real_images(tmp_path):
    """The README's run: the same weights and losses on both sides, 50 to 60 % right."""
    command = [sys.executable, "-m", "common.parity", "cifar", "--runs-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    plain, lightning = (
        json.loads((tmp_path / "cifar" / side / "result.json").read_text()) for side in SIDES
    )
    assert plain["data"] == lightning["data"] == "cifar10"
    assert plain["weights_sha256"] == lightning["weights_sha256"]
    assert plain["train_loss"] == lightning["train_loss"]
    assert len(plain["train_loss"]) == 2 * 45_000 // 4
    assert plain["test_accuracy"] == lightning["test_accuracy"]
    assert 0.5 < plain["test_accuracy"] < 0.6
    count("default runs on the real images")
