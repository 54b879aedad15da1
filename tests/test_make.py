"""The Makefile: what it prints, and what it says where Python is missing."""

from common import ROOT
from common.proof.lessons import lessons

import os
import re
import shutil
import subprocess

import pytest
from helpers import count


def make(*arguments, cwd=ROOT):
    # As typed by hand: `make test` hands its own flags to every make below it.
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))
    }
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=env)


def test_make_alone_prints_every_target_once_in_groups():
    ended = make()
    assert ended.returncode == 0
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z%-]*):", text, re.MULTILINE))
    assert len(targets) >= 24
    for target in targets - {"help", "parity-parallel"}:  # the second is a parity-NAME
        line = rf"^  make {target.replace('%', 'NAME')} +\S.*$"
        assert len(re.findall(line, ended.stdout, re.MULTILINE)) == 1, target
        count("targets explained")
    groups = re.findall(r"^\w.*$", ended.stdout, re.MULTILINE)[1:]
    assert groups == ["Start", "Lessons", "Prove", "Doctor", "Measure", "Pages",
                      "Test and change it"]  # fmt: skip
    assert f"\n  {' '.join(lessons())}\n" in ended.stdout
    assert ended.stdout.count("\n") <= 48  # a screen


MEANT = {
    "cifar": ["plain-cifar", "lightning-cifar", "parity-cifar", "diff-cifar"],
    "plain cifar": ["plain-cifar"],
    "parity cifar": ["parity-cifar"],
    "cifar-plain": ["plain-cifar"],
    "lightning_cifar": ["lightning-cifar"],
    "train-cifar": ["plain-cifar", "lightning-cifar", "parity-cifar", "diff-cifar"],
    "plain": ["plain-cifar"],
    "docs": [],
    "train": [],
}


@pytest.mark.parametrize("typed", MEANT)
def test_a_command_that_is_not_there_is_answered_with_what_was_meant(fresh, typed):
    for folder in ("docs", "lightning"):  # make would find nothing to be done for a folder
        (fresh / folder).mkdir()
    ended = make(*typed.split(), cwd=fresh)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert f"there is no command 'make {typed}'" in ended.stderr
    meant = ended.stderr.partition("; did you mean ")[2]
    assert re.findall(r"'make ([a-z-]+)'", meant) == MEANT[typed]
    assert "`make` alone prints all commands" in ended.stderr
    assert not (fresh / ".venv").exists()


@pytest.mark.parametrize("typed", ["lr=0.1", "EPOCHS=3", "max_epochs=3", "args=--help"])
def test_an_option_that_make_would_pass_over_is_refused(fresh, typed):
    ended = make("plain-cifar", typed, cwd=fresh)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    name = typed.partition("=")[0]
    assert f"'{name}' is no variable of make here; options go into ARGS: " in ended.stderr
    assert not (fresh / ".venv").exists()


@pytest.fixture
def fresh(tmp_path):
    """The Makefile, the lock and a lesson's name, not set up."""
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "cifar.py").touch()
    return tmp_path


def one_sentence(ended):
    assert ended.returncode == 2
    # pip, uv and make may have warnings of their own to give.
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.stderr, ended.stderr
    return lines[0]


def test_python_missing(fresh):
    assert "there is no 'python-nowhere'" in one_sentence(
        make("test", "PYTHON=python-nowhere", cwd=fresh)
    )
    assert not (fresh / ".venv").exists()


@pytest.mark.parametrize("version", ["3.10.2", "3.16.0"])
def test_python_too_old_or_too_new(fresh, version):
    old = fresh / "python-other"
    old.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {version}"\nexit 1\n')
    old.chmod(0o755)
    sentence = one_sentence(make("test", f"PYTHON={old}", cwd=fresh))
    assert f"Python {version}" in sentence and "3.11 to 3.15" in sentence
    assert not (fresh / ".venv").exists()


def test_no_second_set_up_unless_the_lock_changed(fresh):
    ready = fresh / ".venv" / "ready"
    ready.parent.mkdir()
    ready.touch()
    assert "Setting up" not in make("--dry-run", "test", cwd=fresh).stdout
    assert "Setting up" not in make("--dry-run", "plain-cifar", cwd=fresh).stdout
    os.utime(ready, (0, 0))  # older than the lock, also where the clock was set back meanwhile
    assert "Setting up" in make("--dry-run", "test", cwd=fresh).stdout


@pytest.mark.parametrize("target", ["plain-nope", "lightning-nope", "parity-nope", "diff-nope"])
def test_no_such_lesson(fresh, target):
    ended = make(target, cwd=fresh)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert f"there is no lesson for '{target}'; there are: " in ended.stderr
    assert not (fresh / ".venv").exists()


def test_predict_needs_both_names(fresh):
    (fresh / ".venv").mkdir()
    (fresh / ".venv" / "ready").touch()
    for arguments in ([], ["CHECKPOINT=a.ckpt"], ["IMAGE=a.png"]):
        assert "predict needs both names" in one_sentence(make("predict", *arguments, cwd=fresh))
    said = make("--dry-run", "predict", "CHECKPOINT=a b.ckpt", "IMAGE=c.png", cwd=fresh).stdout
    assert '-m common.predict "a b.ckpt" "c.png"' in said


def test_arguments_are_passed_on(fresh):
    (fresh / ".venv").mkdir()
    (fresh / ".venv" / "ready").touch()
    for target, command in (
        ("plain-cifar", "plain/cifar.py"),
        ("lightning-cifar", "lightning/cifar.py"),
        ("parity-cifar", "-m common.proof.parity cifar"),
        ("diff-cifar", "-m common.proof.sidebyside cifar"),
        ("parity", "-m common.proof.parity"),
    ):
        said = make("--dry-run", target, "ARGS=--max-epochs 5", cwd=fresh).stdout
        assert f"{command} --max-epochs 5" in " ".join(said.split())
    said = make("--dry-run", "plain-cifar", "DEVICES=2", "NODES=2", "RDZV=a:1", cwd=fresh).stdout
    assert "plain/cifar.py --devices 2 --num-nodes 2 --rdzv-endpoint a:1" in said
