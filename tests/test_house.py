"""What holds for the whole repository: the library's name, twins, independence, lengths."""

from common import ROOT
from common.recipes import RECIPES
from common.sidebyside import cells

import ast
import re
import subprocess
import sys

import pytest
from helpers import SIDES, count, lessons


def scripts():
    return [ROOT / side / f"{name}.py" for side in SIDES for name in lessons()]


@pytest.mark.parametrize("folder", ["", "plain", "lightning", "tests"])
def test_lightning_is_always_the_library(folder):
    """The folder lightning/ has no __init__.py: a regular package anywhere on the path wins."""
    program = "import importlib.util as u; print(u.find_spec('lightning').origin)"
    if not folder:  # the import itself takes ten seconds: once is enough
        program = "import lightning; print(lightning.__file__); lightning.Trainer"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / folder, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "site-packages" in ended.stdout
    assert not (ROOT / "lightning" / "__init__.py").exists()


def test_twins_have_the_same_cells():
    for name in lessons():
        titles = [list(cells((ROOT / side / f"{name}.py").read_text())) for side in SIDES]
        assert titles[0] == titles[1] and len(titles[0]) >= 6
        count("pairs with the same cells")
    assert len(lessons()) == len(RECIPES) >= 4 and set(lessons()) == set(RECIPES)


def test_lessons_can_be_read_side_by_side():
    for path in scripts():
        lines = path.read_text().splitlines()
        assert len(lines) <= 150, f"{path} has {len(lines)} lines"
        assert max(map(len, lines)) <= 100, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path}: {node.name} is too long"
        # A comment that teaches stands on its own line, so that it can be left out.
        assert not [line for line in lines if re.search(r"\S.*#:", line)], path
        count("scripts measured")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_plain_and_common_call_nothing_of_the_other_side():
    files = [*(ROOT / "plain").glob("*.py"), *(ROOT / "common").rglob("*.py")]
    assert len(files) >= 10
    for path in files:
        forbidden = {"lightning", "pytorch_lightning", "torchmetrics"} & set(imported(path))
        assert not forbidden, f"{path} imports {forbidden}"
        count("files that import neither Lightning nor torchmetrics")


def test_plain_runs_without_lightning_in_memory():
    program = (
        "import sys, runpy; sys.path.insert(0, 'plain');"
        f"[runpy.run_path(f'plain/{{name}}.py') for name in {lessons()}];"
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'torchmetrics')])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_the_lock_names_every_package_with_a_hash_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "--index-url" not in lock
    packages = re.findall(r"^([a-z0-9-]+)==(\S+)(.*(?:\n    --hash.*)+)", lock, re.MULTILINE)
    assert len(packages) == len(re.findall(r"^[a-z]", lock, re.MULTILINE)) > 50
    versions = {name: version for name, version, _ in packages}
    assert versions["lightning"] == versions["pytorch-lightning"] == "2.6.6"
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "torchvision", "lightning", "torchmetrics", "torchsummary"):
        assert f'"{name}=={versions[name]}"' in project
