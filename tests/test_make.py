"""The Makefile: what it prints, and what it says where Python is missing."""

from common import ROOT
from common.proof.lessons import lessons

import os
import re
import shutil
import subprocess
import sys

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
    assert groups == ["Start", "Lessons", "Practise", "Prove", "Doctor", "Measure", "Pages",
                      "Test and change it"]  # fmt: skip
    assert f"\n  {' '.join(lessons())}\n" in ended.stdout
    assert ended.stdout.count("\n") <= 55  # a screen


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


# Names, and what a set-up may lose.


@pytest.fixture
def told(fresh):
    """A set-up whose Python prints what it is told, one a line."""
    (fresh / ".venv" / "bin").mkdir(parents=True)
    (fresh / ".venv" / "ready").touch()
    python = fresh / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "DATA_DIR=$DATA_DIR"\n')
    python.chmod(0o755)
    return fresh


NAMES = [
    "a b.png", "a`touch x`.png", "$(touch x).png", "$HOME.png", "$$.png", 'a"b.png', "a'b.png",
    "a;touch x;.png", "a&b|c>x.png", "\\n.png", "-x.png", "$(shell touch x).png", "*.png", "#a.png",
    "ä✓.png", b"\xff\xfe.png", "\x1b[31m.png", "a=b.png", "%s.png", "~/a.png",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("by", ["the command line", "the environment"])
def test_a_name_arrives_as_it_was_typed(by, name, told):
    name = os.fsencode(name)
    for target, names, words in (
        ("predict", (b"CHECKPOINT", b"IMAGE"), [b"-m", b"common.predict", b"--"]),
        ("doctor", (b"A", b"B"), [b"-m", b"samebits", b"--"]),
    ):
        given = {each: name for each in (*names, b"DATA_DIR")}
        words = [*words, name, name, b"DATA_DIR=" + name]
        env = {k: v for k, v in os.environb.items() if not k.startswith((b"MAKE", b"MFL"))}
        typed = [k + b"=" + v for k, v in given.items()] if by == "the command line" else []
        ended = subprocess.run(
            ["make", target, *typed],
            cwd=told,
            capture_output=True,
            env=env if typed else env | given,
        )
        assert ended.returncode == 0 and ended.stdout.split(b"\n")[:-1] == words, ended
        count("names that arrived as they were typed")
    assert not list(told.rglob("x"))


@pytest.mark.parametrize("typed", [
    "RDZV=a:1;touch x", "DEVICES=$(touch x)", "NODES=`touch x`", "RDZV=$(shell touch x)",
    "DEVICES=2&touch x", 'RDZV="a:1',
])  # fmt: skip
def test_what_is_no_number_does_not_reach_the_shell(typed, told):
    ended = make("plain-cifar", typed, cwd=told)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "DEVICES and NODES are numbers, and RDZV is HOST:PORT" in ended.stderr
    assert not (told / "x").exists()
    count("names that did not reach the shell")


def test_an_empty_python_is_the_usual_one(fresh):
    said = make("--dry-run", "setup", "PYTHON=", cwd=fresh)
    assert said.returncode == 0 and "Setting up" in said.stdout
    for name in ("nowhere; touch x", "$(touch x)", "`touch x`", '"', "no where"):
        assert f"there is no '{name}'" in one_sentence(make("test", f"PYTHON={name}", cwd=fresh))
    assert not (fresh / "x").exists() and not (fresh / ".venv").exists()


@pytest.fixture
def offline(fresh, monkeypatch):
    """Set up, with another lock than the one that is there now, and without a network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh / ".venv"], check=True)
    (fresh / ".venv" / "lock.installed").write_text("another")
    (fresh / ".venv" / "ready").touch()
    os.utime(fresh / ".venv" / "ready", (0, 0))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1", "UV_OFFLINE": "1", "UV_NO_CACHE": "1", "UV_NO_CONFIG": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return fresh


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.slow
def test_without_a_network_a_set_up_loses_nothing(offline):
    before = everything(offline)
    sentence = one_sentence(make("setup", cwd=offline))
    assert sentence.endswith("what was there is as it was.")
    assert everything(offline) == before and len(before) > 10
    # Where there was none, none is there, and no half of one.
    shutil.rmtree(offline / ".venv")
    one_sentence(make("setup", cwd=offline))
    assert not list(offline.glob(".venv*"))
    count("set-ups without a network")


def test_a_lock_that_was_only_touched_sets_up_nothing(offline):
    """As a change of branch and back does."""
    shutil.copy(offline / "requirements.lock", offline / ".venv" / "lock.installed")
    before = everything(offline)
    for _ in range(2):
        os.utime(offline / ".venv" / "ready", (0, 0))
        ended = make("setup", cwd=offline)
        assert ended.returncode == 0 and "Setting up" not in ended.stdout, ended.stderr
        assert everything(offline) == before
    # Where its Python is gone, the same lock does not count.
    (offline / ".venv" / "bin" / "python").unlink()
    os.utime(offline / ".venv" / "ready", (0, 0))
    assert "was not set up" in one_sentence(make("setup", cwd=offline))
    count("set-ups without a network")


@pytest.mark.slow
def test_a_set_up_that_was_killed_is_put_right(offline):
    """Between the two renames of its end; and before, which leaves a half one beside."""
    (offline / ".venv").rename(offline / ".venv.old.99999999")
    half = offline / ".venv.new.99999998"
    half.mkdir()
    going_on = offline / f".venv.new.{os.getpid()}"
    going_on.mkdir()
    one_sentence(make("setup", cwd=offline))
    assert {path.name for path in offline.glob(".venv*")} == {".venv", going_on.name}
    assert (offline / ".venv" / "bin" / "python").exists()


FAKE_UV = """#!/bin/sh
echo "$@" >>"$TOLD"
case $1 in
venv) for last; do :; done; mkdir -p "$last/bin"; ln -s "$(command -v python3)" "$last/bin/python";;
esac
case "$*" in *sync*) for last; do :; done; cp "$last" "$TOLD.lock";; esac
"""


@pytest.mark.parametrize("cpu_only", [False, True])
def test_a_set_up_without_cuda_leaves_its_packages_out(fresh, monkeypatch, cpu_only):
    """Which commands uv is given; its index of CPU packages cannot be reached in a test."""
    (fresh / "bin").mkdir()
    (fresh / "bin" / "uv").write_text(FAKE_UV)
    (fresh / "bin" / "uv").chmod(0o755)
    told = fresh / "told"
    monkeypatch.setenv("TOLD", str(told))
    monkeypatch.setenv("PATH", f"{fresh / 'bin'}:{os.environ['PATH']}")
    # A Python of a .venv cannot tell where packages go: the last step fails, and nothing is left.
    make("setup", *["CPU_ONLY=1"] * cpu_only, f"PYTHON={sys.executable}", cwd=fresh)
    lock = (fresh / "told.lock").read_text()
    whole = (fresh / "requirements.lock").read_text()
    names = set(re.findall(r"^([a-z0-9-]+)==", whole, re.MULTILINE))
    kept = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    gone = names - kept
    if not cpu_only:
        assert lock == whole and "--torch-backend" not in told.read_text()
        return
    assert {"torch", "torchvision", "triton"} < gone and len(gone) > 15
    assert all(re.match("torch$|torchvision$|triton$|nvidia-|cuda-", name) for name in gone)
    assert lock.count("--hash") > 500 and "lightning==2.6.6" in lock
    (command,) = re.findall(r"^pip install .*--torch-backend cpu (.*)$", told.read_text(), re.M)
    assert command.split() == re.findall(r"^(torch(?:vision)?==[\d.]+)", whole, re.M)
