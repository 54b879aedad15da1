"""What holds for the whole repository: the library's name, twins, independence, lengths."""

from common import ROOT
from common.networks import NETWORKS
from common.proof.sidebyside import cells

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
        parts = [cells((ROOT / side / f"{name}.py").read_text()) for side in SIDES]
        assert list(parts[0]) == list(parts[1]) and len(parts[0]) >= 5
        # Every number of a lesson stands in this cell, and is the same on both sides.
        assert parts[0]["Hyperparameters"] == parts[1]["Hyperparameters"]
        count("pairs with the same cells")
    assert set(lessons()) == {network.lesson for network in NETWORKS} and len(lessons()) >= 8


def test_lessons_can_be_read_side_by_side():
    for path in scripts():
        text = path.read_text()
        lines = text.splitlines()
        assert len(lines) <= 150, f"{path} has {len(lines)} lines"
        assert max(map(len, lines)) <= 88, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert node.end_lineno - node.lineno < 40, f"{path}: {node.name} is too long"
        # A comment that teaches stands on its own line, so that it can be left out.
        assert not [line for line in lines if re.search(r"\S.*#:", line)], path
        assert text.endswith('if __name__ == "__main__":\n    run(main, Args)\n'), path
        count("scripts measured")


# What exists for the proof, the command line or the tests, and not for the training.
MACHINERY = (
    "common.proof", "samebits", "fingerprint", "perf_counter", "time.time", "sha256",
    "losses.append", "self.losses", "handed_out", "argparse", "tyro", "recipe", "evidence",
    "islice",
)  # fmt: skip


def test_no_lesson_carries_the_proofs_machinery():
    for path in scripts():
        text = path.read_text()
        found = [word for word in MACHINERY if word in text]
        # The epoch's mean of what callbacks logs is a training's own number.
        if path == ROOT / "plain" / "callbacks.py":
            assert found == ["losses.append"]
        else:
            assert found == [], f"{path} has {found}"
        count("scripts without machinery")
    assert len(scripts()) == 2 * len(lessons()) >= 16


def test_a_lesson_imports_what_takes_no_time():
    """A run starts at once: what is needed in a lesson's end alone is not imported before it."""
    program = (
        "import sys, runpy; sys.path.insert(0, 'plain'); runpy.run_path('plain/cifar.py');"
        "print({'torchvision', 'matplotlib', 'rich', 'tyro', 'PIL'} & {*sys.modules})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "set()", ended.stdout + ended.stderr


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
