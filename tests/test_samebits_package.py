"""The doctor is a package of its own: installed alone, and without imports of this repository."""

from common import ROOT

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import SIDES, count

DOCTOR = ROOT / "common" / "doctor"
# -S leaves out every .pth file, and with it this repository; -I the folder and PYTHONPATH.
ALONE = f"""
import sys
sys.path[:0] = [sys.argv[1]]
sys.path.append({sysconfig.get_path("purelib")!r})
"""
FOREIGN = {"lightning", "pytorch_lightning", "torchmetrics", "rich", "tyro", "matplotlib", "common"}


def alone(folder, program, *arguments):
    """Run a program that finds what `folder` and site-packages hold, and not this repository."""
    command = [sys.executable, "-I", "-S", "-c", ALONE + program, str(folder), *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made of a copy: setuptools leaves a folder `build` where it works."""
    copy, made = (tmp_path_factory.mktemp("it") / name for name in ("copy", "made"))
    ignored = ".*", "__pycache__", "*.egg-info", "build", "data", "runs", "wandb", "lightning_logs"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(made)!r})"
    made.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    [path] = made.iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_samebits_alone(wheel):
    names = wheel.namelist()
    held = {path.removeprefix("samebits/") for path in names if path.startswith("samebits/")}
    assert held == {path.name for path in DOCTOR.glob("*.py")} and len(held) >= 10
    [info] = {path.split("/")[0] for path in names} - {"samebits"}
    assert info.endswith(".dist-info")
    metadata = wheel.read(f"{info}/METADATA").decode()
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert sorted(needed) == ["numpy", "torch"]
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "samebits = samebits.__main__:command" in entries
    assert "[pytest11]\nsamebits = samebits.pytest_plugin" in entries
    count("files in the wheel", len(names))


def test_it_works_where_this_repository_is_not(wheel, tmp_path):
    """Also beside a stranger's own package `common`."""
    wheel.extractall(tmp_path)
    program = "import json, samebits; print(json.dumps([samebits.__file__, list(sys.modules)]))"
    file, modules = json.loads(alone(tmp_path, program))
    assert not {"torch", "numpy"} & set(modules)  # not before something of it is used
    program = program.replace("samebits;", "samebits; samebits.Trace;")
    file, modules = json.loads(alone(tmp_path, program))
    assert file == str(tmp_path / "samebits" / "__init__.py")
    assert {"torch", "numpy"} <= set(modules) and not FOREIGN & set(modules)
    program = (
        "import importlib.util as u; print(u.find_spec('samebits').name, u.find_spec('common'))"
    )
    assert alone(tmp_path, program) == "samebits None\n"
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('the stranger\\'s own')")
    program = """
import contextlib, torch
from samebits import Trace, assert_parity
from samebits.__main__ import main
for name in ("a.trace", "b.trace"):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1 if name == "a.trace" else 0.2)
    with Trace(net, path=name):
        net(torch.ones(3, 4)).sum().backward()
        optimizer.step()
assert_parity("a.trace", "a.trace")
assert main(["a.trace", "b.trace"]) == 1
"""
    assert "first in the step of the optimizer: lr of weight." in alone(tmp_path, program)


def test_set_up_finds_both_from_any_folder(tmp_path):
    """`common` by the path, `samebits` because it is installed."""
    program = "import common, samebits; print(common.__file__, samebits.__file__, sep='\\n')"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    files = [Path(line).resolve() for line in ended.stdout.splitlines()]
    assert files == [ROOT / "common" / "__init__.py", DOCTOR / "__init__.py"], ended.stderr


def imports(path):
    """What a file imports: whole names, those of `from` with the names that it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (module + alias.name for alias in node.names)


def test_the_doctor_imports_pytorch_and_numpy_alone():
    files = list(DOCTOR.rglob("*.py"))
    assert len(files) >= 10
    for path in files:
        assert len(path.read_text().splitlines()) <= 400, path
        for name in imports(path):
            own = name.startswith(".") and not name.startswith("..")
            top = name.split(".")[0]
            needed = {"torch", "numpy"}
            if path.name == "pytest_plugin.py":  # which only pytest loads
                needed |= {"pytest"}
            assert own or top in sys.stdlib_module_names | needed, f"{path}: {name}"
            count("imports of the doctor")


def test_no_lesson_imports_the_doctor_or_the_proof():
    files = [path for side in SIDES for path in (ROOT / side).glob("*.py")]
    assert len(files) >= 16
    for path in files:
        for name in imports(path):
            assert not re.match(r"samebits\b|common\.(doctor|proof)\b", name), f"{path}: {name}"
        count("lessons without the doctor")


def test_it_has_one_name():
    """A second name would be a second copy, whose errors nobody catches."""
    folders = ("plain", "lightning", "common", "tests", "bench", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".md", ".sh", ".yaml")]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml")]
    assert len(files) >= 100
    for path in files:
        assert not re.search(r"\bcommon\.doctor\b|from common import .*\bdoctor\b",
                             path.read_text()), path  # fmt: skip
        count("files that call the doctor samebits")
