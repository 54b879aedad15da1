"""What people meet who have just arrived: a short run shows learning, or says that it does not."""

from common import ROOT, run
from common.folders import read_rows
from common.proof import parity, watch

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import SIDES, count, lessons, load_lesson


@pytest.mark.parametrize("lesson", lessons())
def test_a_short_run_logs_ten_losses(lesson, tmp_path):
    module = load_lesson("plain", lesson)
    default = {own.name: own.default for own in fields(module.Args)}["log_every_n_steps"]

    def every(**settings):
        args = module.Args(accelerator="cpu", runs_dir=tmp_path, **settings)
        return run.ready(args, ROOT / "plain" / f"{lesson}.py").log_every_n_steps

    group = getattr(module.Args, "accumulate_grad_batches", 1)
    for batches in (1, 10, 30, 70):
        steps = -(-batches // group)
        found = every(max_epochs=1, limit_train_batches=batches)
        assert found == min(default, max(1, steps // 10))
        assert steps // found >= min(10, steps)
        count("lengths of a run")
    assert every() == default  # as it stands, each lesson logs often enough
    assert every(max_epochs=1, limit_train_batches=30, log_every_n_steps=7) == 7


def result(accuracy):
    per_class = dict.fromkeys("abcdefghij", accuracy)
    return {"test_accuracy": accuracy, "test_accuracy_per_class": per_class}


@pytest.mark.parametrize(
    "accuracy, said", [(0.1, True), (0.149, True), (0.16, False), (0.5, False)]
)
def test_chance_level_is_named(accuracy, said):
    assert watch.at_chance(result(accuracy)) == ("chance level, 10%" if said else "")


def typed(*command, **environment):
    env = {name: value for name, value in os.environ.items() if name != "MAKELEVEL"}
    return subprocess.run(command, capture_output=True, text=True, env=env | environment)


@pytest.mark.slow
def test_a_notebooks_backend_does_no_harm():
    """Every Jupyter kernel sets it, also for the commands that are typed in a cell."""
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for side in SIDES:
        ended = typed(sys.executable, ROOT / side / "cifar.py", "--help", **inline)
        assert ended.returncode == 0 and ended.stderr == "", ended.stderr
        count("sides in a notebook's shell")


def test_a_refused_option_says_where_options_go_in_make():
    command = (sys.executable, ROOT / "plain" / "cifar.py", "--epochs", "3")
    hint = 'make takes options like this: ARGS="--max-epochs 5 --lr 0.01"\n'
    for environment in ({}, {"MAKELEVEL": "1"}):
        ended = typed(*command, **environment)
        assert ended.returncode == 2 and "--max-epochs" in ended.stderr
        assert ended.stderr.endswith(hint) == bool(environment)
        count("refused options")


def quick(folder):
    """Return the options of `make quick`, with another folder for its results."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (options,) = re.findall(
        r"^quick:.*\n\t@\S+ -m common.proof.parity (.*) \$\(ARGS\)$", text, re.M
    )
    return shlex.split(options.replace("runs/quick", shlex.quote(str(folder))))


@pytest.mark.slow
def test_the_quick_run_learns_and_proves(tmp_path, capfd):
    assert parity.main(quick(tmp_path)) == 0
    said = capfd.readouterr().out
    assert "The two sides agree: 600 batches" in said and "chance" not in said
    for side in SIDES:
        found = json.loads((tmp_path / "cifar" / side / "result.json").read_text())
        assert found["data"] == "shapes" and found["test_accuracy"] >= 0.6
        rows = read_rows(tmp_path / "cifar" / side)
        assert sum("train_loss" in row for row in rows) >= 10
        count("sides that learned")
    assert (tmp_path / "cifar" / "parity.png").stat().st_size > 10_000
