"""What people type, and what they type wrongly: one sentence, exit status 2, nothing lost."""

from common import ROOT, download
from common.folders import FILES
from common.messages import BadInput
from common.proof import parity as parity_module
from common.proof.fingerprints import versions
from common.proof.lessons import lessons as in_order
from common.proof.parity import main as parity
from common.proof.sidebyside import main as sidebyside
from common.proof.sidebyside import table
from common.run import run as run_lesson

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SIDES, be_alone, count, lessons, load_lesson, some
from rich.console import Console

GPU = torch.cuda.is_available()
NOT_A_FOLDER = ROOT / "Makefile" / "folder"

# The first ones tyro refuses, in a box; the others are one sentence of ours.
BOXED = {
    "unknown option": (["--foo"], "--foo"),
    "abbreviated option": (["--max-epoch", "3"], "--max-epochs"),
    "the name of other libraries": (["--epochs", "3"], "--max-epochs"),
    "value missing": (["--max-epochs"], "--max-epochs"),
    "unknown data": (["--data", "mnist"], "cifar10"),
    "batch size in words": (["--batch-size", "four"], "'four'"),
    "batch size with a point": (["--batch-size", "4.5"], "'4.5'"),
    "a limit in words": (["--limit-val-batches", "all"], "'all'"),
    "an option of another lesson": (["--patience", "3"], "--patience"),
}
BAD = {
    "batch size 0": (["--batch-size", "0"], "--batch-size 0: expected a whole number from 1 on"),
    "negative epochs": (["--max-epochs", "-1"], "--max-epochs -1: expected a whole number from 1"),
    "no epochs": (["--max-epochs", "0"], "--max-epochs"),
    "learning rate 0": (["--lr", "0"], "--lr 0.0: expected a number above 0"),
    "learning rate nan": (["--lr", "nan"], "--lr"),
    "learning rate inf": (["--lr", "inf"], "--lr"),
    "momentum below 0": (["--momentum", "-0.1"], "--momentum"),
    "momentum nan": (["--momentum", "nan"], "--momentum"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "too large a seed": (["--seed", "4294967296"], "--seed"),
    "limit 0": (["--limit-train-batches", "0"], "--limit-train-batches"),
    "limit above 1": (["--limit-val-batches", "1.5"], "--limit-val-batches"),
    "limit nan": (["--limit-val-batches", "nan"], "--limit-val-batches"),
    "share below one batch": (["--data", "shapes", "--limit-test-batches", "0.01"], "less than"),
    "threads 0": (["--threads", "0"], "--threads"),
    "more threads than cores": (["--threads", "1000000"], "--threads"),
    "huge batch": (["--batch-size", "99999999999999999999"], "--batch-size"),
    "data of another lesson": (["--data", "fashionmnist"], "trains on cifar10"),
    "data folder is a file": (["--data-dir", str(ROOT / "Makefile")], "is a file"),
    "negative workers": (["--num-workers", "-1"], "--num-workers"),
    "devices 0": (["--devices", "0"], "--devices"),
    "too many devices": (["--devices", "64"], "--devices 64 asks for as many CUDA GPUs"),
    "two CPUs": (["--accelerator", "cpu", "--devices", "2"], "use --devices 1"),
    "missing data folder": (["--data-dir", "no/such/folder"], "'no/such/folder' is not there"),
    "runs folder below a file": (["--runs-dir", str(NOT_A_FOLDER)], "--runs-dir"),
    "no network": (["--data", "cifar10", "--data-dir", "."], "could not be downloaded"),
}
if not GPU:
    BAD["no GPU"] = (["--accelerator", "cuda"], "PyTorch finds no such device")
if not torch.backends.mps.is_available():
    BAD["no MPS"] = (["--accelerator", "mps"], "PyTorch finds no such device")
if sys.platform == "linux":
    BAD["unwritable runs folder"] = (["--runs-dir", "/proc/runs"], "--runs-dir")
    BAD["unwritable data folder"] = (["--data-dir", "/proc"], "nothing can be written there")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*BOXED, *BAD])
def test_bad_input(side, name, tmp_path, monkeypatch, capsys):
    arguments, expected = (BOXED | BAD)[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    real = download.source("cifar10")
    ((_, file, md5),) = real.archives
    nobody = replace(real, archives=(("http://127.0.0.1:9/nobody", file, md5),))
    monkeypatch.setitem(download.SOURCES, "cifar10", nobody)
    kept = tmp_path / "runs" / "cifar" / side / "result.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier result")
    with pytest.raises(SystemExit) as exit_:
        typed(side, "cifar", *arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert_refused(said, boxed=name in BOXED)
    assert expected in said
    assert kept.read_text() == "an earlier result"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    count("bad inputs")


def typed(side, lesson, *arguments):
    """Run a lesson, in this process, with what was typed behind its name."""
    module = load_lesson(side, lesson)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [f"{lesson}.py", *arguments])
        run_lesson(module.main, module.Args)


def assert_refused(said, boxed):
    assert "Traceback" not in said
    if boxed:
        assert said.count("For full helptext, ") == 1, said
    else:
        assert said.startswith("error: ") and said.count("\n") == 1, said


def test_there_are_bad_inputs():
    assert len(BOXED) >= 9 and len(BAD) >= 27


def run(side, *arguments, **settings):
    command = [sys.executable, str(ROOT / side / "cifar.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def test_bad_input_from_the_shell(tmp_path):
    ended = run("plain", "--batch-size", "0", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    texts = []
    for side in SIDES:
        with pytest.raises(SystemExit) as exit_:
            typed(side, "cifar", "--help")
        assert exit_.value.code == 0
        texts.append(capsys.readouterr().out)
    assert options_of(texts[0]) == options_of(texts[1])
    options = """
        max-epochs limit-train-batches limit-val-batches limit-test-batches batch-size
        lr momentum seed data data-dir accelerator devices threads num-workers runs-dir
        log-every-n-steps refresh-rate
    """.split()
    for option in options:
        assert f"--{option} " in texts[0], option
    assert texts[0].count("(default:") == len(options) == 17
    # The comment beside a field is its help.
    assert "learning rate (default: 0.001)" in texts[0] and "of SGD (default: 0.9)" in texts[0]


def options_of(text):
    """What a help says from its box on; above it stands what each side's docstring says."""
    return text[text.index("--help  ") :]


SMALL = """
    --accelerator cpu --data shapes --max-epochs 1 --limit-train-batches 50 --limit-val-batches 1
    --limit-test-batches 2 --log-every-n-steps 20
""".split()


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """Both sides from the shell."""
    folder = tmp_path_factory.mktemp("main job")
    arguments = [*SMALL, "--runs-dir", str(folder)]
    ended = {side: run(side, *arguments) for side in SIDES}
    return folder, arguments, ended


def test_the_main_job(main_job):
    folder, _, ended = main_job
    tables = {}
    for side in SIDES:
        assert ended[side].returncode == 0, ended[side].stderr
        assert "Total params: 62,006" in ended[side].stdout
        assert "Data: shapes, 45,000 images" in ended[side].stdout
        for noise in ("Tip", "GPU available", "Warning", "deprecated", "Traceback"):
            assert noise not in ended[side].stdout + ended[side].stderr, noise
        lines = ended[side].stdout.splitlines()
        table = [line for line in lines if "│" in line and "seconds" not in line]
        tables[side] = table
        left = {path.name for path in (folder / "cifar" / side).iterdir()}
        assert left - {"hparams.yaml"} == set(FILES)
    assert tables["plain"] == tables["lightning"] and len(tables["plain"]) == 16
    assert ended["plain"].stdout.count("Epoch 0: val_loss") == 1


def test_parity_does_not_run_again_what_was_run(main_job, capsys):
    assert parity(["cifar", *main_job[1]]) == 0
    said = capsys.readouterr().out
    assert (main_job[0] / "cifar" / "parity.png").exists()
    assert "running the" not in said
    assert said.count("equal, bit for bit") == 6 and "The two sides agree" in said


def test_parity_runs_the_side_that_is_missing_or_of_other_settings(main_job, monkeypatch, capsys):
    arguments = main_job[1]
    monkeypatch.setattr(
        parity_module, "why_run", lambda result, side, *_: "Told so" * (side == "plain")
    )
    commands = []

    class Instead:
        def __init__(self, command):
            commands.append(command)
            self.interrupts = 1

        def wait(self):
            if self.interrupts:  # Ctrl-C reaches both: wait for the other one to end by itself
                self.interrupts = 0
                raise KeyboardInterrupt
            return 0

    monkeypatch.setattr(subprocess, "Popen", Instead)
    assert parity(["cifar", *arguments]) == 0
    assert [command[1] for command in commands] == [str(ROOT / "plain" / "cifar.py")]
    assert commands[0][2:] == arguments
    assert "running the plain side of cifar" in capsys.readouterr().out


def test_parity_says_why_a_side_is_run_again(main_job, monkeypatch, tmp_path):
    args = parity_module.settings_of("cifar", main_job[1])
    result = parity_module.read_result("plain", args)
    why = partial(parity_module.why_run, side="plain")
    assert why(result, args=args) == ""
    assert why({}, args=args) == "There is no result yet"
    for name, value in (("lr", 0.5), ("threads", 2), ("max_epochs", 7), ("seed", 3)):
        other = replaced(args, **{name: value})
        then = getattr(args, name)
        expected = f"Its last run had {name} {then}, and {value} is asked for"
        assert why(result, args=other) == expected
        count("reasons to run a side")
    old = result | {"versions": result["versions"] | {"torch": "2.14.0"}}
    assert why(old, args=args).startswith("Its last run had torch 2.14.0, and ")
    own = "plain/cifar.py"
    for edited, said in (
        ({own: "x"}, own),
        ({own: "x", "common/data.py": "x"}, f"{own} (and 1 more)"),
    ):
        before = result | {"code_sha256": result["code_sha256"] | edited}
        assert why(before, args=args) == f"{said} has changed since its run"
        count("reasons to run a side")
    # The shapes stood in; now the real images are there.
    auto = replaced(args, data="auto", data_dir=tmp_path)
    assert why(result, args=auto) == ""
    (tmp_path / download.source("cifar10").folder).mkdir()
    assert why(result, args=auto) == (
        "The shapes stood in for cifar10, but the real images are here now"
    )


def replaced(args, **changes):
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def test_parity_says_that_sides_differ(main_job, monkeypatch, capsys):
    folder, arguments, _ = main_job
    monkeypatch.setattr(parity_module, "why_run", lambda *_: "")
    explained = []
    monkeypatch.setattr(parity_module, "explain", lambda *a: explained.append(a[2]) or "Because.")
    path = folder / "cifar" / "plain" / "result.json"
    text = path.read_text()
    result = json.loads(text)
    result["train_loss"][30] += 1e-7
    path.write_text(json.dumps(result))
    assert parity(["cifar", *arguments]) == 1
    said = capsys.readouterr().out
    assert said.count("DIFFERENT") == 1 and said.count("not compared") == 4
    assert "The two sides differ, first in loss of every step: loss of step 31: plain " in said
    assert "\nBecause.\n" in said and explained == ["steps"]
    path.write_text(text)


def test_unknown_lessons():
    for command in (parity, sidebyside):
        with pytest.raises(BadInput, match=r"there is no lesson 'nope'; there are: c.*, fashion"):
            command(["nope"])


class InThisProcess:
    """Stands for a process that parity starts: starting 16 of them would take minutes."""

    def __init__(self, command):
        path = Path(command[1])
        with pytest.MonkeyPatch.context() as monkeypatch:
            if path.stem == "parallel":
                be_alone(monkeypatch)
            if path.stem == "finetune":
                command = [*command, "--backbone", "mobilenet_v3_small", "--weights", "random"]
            typed(path.parent.name, path.stem, *command[2:])

    def wait(self):
        return 0


@pytest.mark.slow
def test_parity_of_all_lessons(tmp_path, monkeypatch, capsys):
    """`make parity`: every lesson from its command line to one table."""
    # VGG16 would take most of the time; the parity is asked for its settings all the same.
    why_run = parity_module.why_run
    monkeypatch.setattr(
        parity_module, "why_run",
        lambda result, side, args: "" if result and args.lesson == "finetune"
        else why_run(result, side, args),
    )  # fmt: skip
    versions()  # starts a process of its own, once
    monkeypatch.setattr(subprocess, "Popen", InThisProcess)
    arguments = ["--accelerator", "cpu", "--data", "shapes", "--max-epochs", "1",
                 "--limit-train-batches", "3", "--limit-val-batches", "1",
                 "--limit-test-batches", "1", "--runs-dir", str(tmp_path)]  # fmt: skip
    # As torchrun's processes do: without it, the lesson parallel would start some.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert parity(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("There is no result yet: running the ") == 2 * len(lessons())
    rows = [line for line in said.splitlines() if line.endswith("│ equal  │")]
    assert [row.split()[1] for row in rows] == in_order()
    assert f"The two sides agree in {len(lessons())} of {len(lessons())} lessons." in said
    for name in lessons():
        for side in SIDES:
            assert {path.name for path in (tmp_path / name / side).iterdir()} >= set(FILES)
            count("lessons run from the command line")
    # Once more: nothing is run. One loss altered: the table says which lesson, and where.
    path = tmp_path / "fashion" / "lightning" / "result.json"
    result = json.loads(path.read_text())
    result["train_loss"][2] += 1e-7
    path.write_text(json.dumps(result))
    assert parity(arguments) == 1
    said = capsys.readouterr().out
    assert "running the" not in said
    assert f"The two sides agree in {len(lessons()) - 1} of {len(lessons())} lessons." in said
    assert len([line for line in said.splitlines() if "DIFFERENT:" in line]) == 1


def test_parity_of_all_takes_only_options_that_all_have(capsys):
    with pytest.raises(SystemExit) as exit_:
        parity(["--one-hot"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert_refused(said, boxed=True)
    assert "--one-hot" in said


@pytest.mark.parametrize(
    "lesson, arguments, expected, boxed",
    [
        ("fashion", ["--one-hot", "yes"], "yes", True),
        ("fashion", ["--data", "cifar10"], "trains on fashionmnist", False),
        ("fashion", ["--logger", "csv"], "--logger", True),
        ("finetune", ["--backbone", "alexnet"], "'vgg16', 'resnet18',", True),
        ("finetune", ["--weights", "mine.pt"], "'auto', 'imagenet', 'random'", True),
        ("finetune", ["--unfreeze-at-epoch", "-1"], "a whole number from 0 on", False),
        ("optimize", ["--ema-decay", "1.5"], "--ema-decay 1.5: expected a number from 0", False),
        ("optimize", ["--precision", "16-mixed", "--accelerator", "cpu"], "needs a GPU", False),
        ("callbacks", ["--patience", "0"], "--patience 0: expected a whole number", False),
        ("speed", ["--freeze-at", "-0.1"], "--freeze-at", False),
        ("resume", ["--max-time", "soon"], "--max-time", False),
    ],
)
def test_bad_input_to_a_lessons_own_options(
    lesson, arguments, expected, boxed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for side in SIDES:
        with pytest.raises(SystemExit) as exit_:
            typed(side, lesson, *arguments)
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert_refused(said, boxed)
        assert expected in " ".join(said.split()), said
        count("bad inputs")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("lesson", lessons())
def test_both_sides_have_the_same_options(lesson, capsys):
    texts = []
    for side in SIDES:
        with pytest.raises(SystemExit):
            typed(side, lesson, "--help")
        texts.append(capsys.readouterr().out)
    assert options_of(texts[0]) == options_of(texts[1])
    own = [one.name for one in fields(load_lesson("plain", lesson).Args) if one.init]
    for name in own:
        assert (
            f"--{name.replace('_', '-')} " in texts[0] or f"--{name.replace('_', '-')}," in texts[0]
        )
    assert texts[0].count("(default:") == len(own) >= 16  # each has a help and a default


@pytest.mark.parametrize("side", some(reversed(SIDES)))  # the Trainer catches Ctrl-C itself
def test_ctrl_c_ends_with_one_sentence_and_keeps_what_was_written(side, tmp_path):
    arguments = "--accelerator cpu --data shapes --log-every-n-steps 50 --runs-dir".split()
    arguments.append(str(tmp_path))
    folder = tmp_path / "cifar" / side
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("an earlier result")
    command = [sys.executable, str(ROOT / side / "cifar.py"), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = folder / "metrics.csv"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= 4:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip() == "Stopped by Ctrl-C; what was written until now is kept."
    rows = metrics.read_text().splitlines()
    assert len(rows) >= 4 and rows[-1].count(",") == rows[0].count(",")
    # No result of an earlier run beside the metrics of this one; but that is not lost.
    assert {path.name for path in folder.iterdir()} - {"hparams.yaml"} == {"metrics.csv"}
    kept = folder.with_name(f"{side}.previous") / "result.json"
    assert kept.read_text() == "an earlier result"


@pytest.mark.parametrize(
    "moment", some([(2, "plain"), (5, "plain"), (2, "lightning"), (5, "lightning")], 3)
)
def test_ctrl_c_during_the_imports(moment, tmp_path):
    seconds, side = moment
    command = [sys.executable, str(ROOT / side / "cifar.py"), "--data", "shapes"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip() == "Stopped by Ctrl-C; what was written until now is kept."


def test_side_by_side(capsys):
    sidebyside(["cifar"])
    with_comments = capsys.readouterr().out
    sidebyside(["cifar", "--no-comments"])
    without = capsys.readouterr().out
    assert "#:" in with_comments and "#:" not in without
    assert "\x1b[" in without  # in colour
    for title in ("Imports", "Hyperparameters", "Training and evaluation", "Run"):
        assert any(line.count(title) == 2 for line in without.splitlines()), title
    pairs = [line for line in without.splitlines() if line.count("lr: float = 1e-3") == 2]
    assert len(pairs) == 1  # what corresponds stands in one row


def test_side_by_side_shows_one_cell(capsys):
    sidebyside(["cifar", "--cell", "training"])
    shown = capsys.readouterr().out
    assert "Training and evaluation" in shown and "Hyperparameters" not in shown
    with pytest.raises(BadInput, match="the cells are: Imports, Hyperparameters, Seed"):
        sidebyside(["cifar", "--cell", "Fit"])


def test_a_continued_line_is_indented_deeper():
    source = "# %% A\n    first = function(with_many, arguments_that, do_not_fit, in_one_line)\n"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table((source, source), 80))
    lines = [line for line in console.export_text().splitlines() if "│" in line][1:]
    left = [line.split("│")[1][1:].rstrip() for line in lines]
    assert left == [
        "    first = function(with_many,", "            arguments_that,",
        "            do_not_fit, in_one_line)",
    ]  # fmt: skip
    joined = "".join(part.strip() for part in left).replace(" ", "")
    assert joined == source.splitlines()[1].replace(" ", "")  # nothing is lost


@pytest.mark.parametrize("lesson", lessons())
def test_190_columns_break_no_line(lesson, capsys):
    sidebyside([lesson])
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines())) <= 190
    sources = tuple((ROOT / side / f"{lesson}.py").read_text() for side in SIDES)
    for source in sources:
        assert max(map(len, source.splitlines())) <= (190 - 7) // 2
    count("scripts that fit side by side", 2)


def test_a_side_that_breaks_off_is_no_difference(tmp_path, monkeypatch):
    """Exit status 1 says that the sides differ; a traceback has the same one."""
    for status, expected in ((1, 2), (2, 2), (130, 130)):

        class BreaksOff:
            def __init__(self, command):
                pass

            def wait(self, status=status):
                return status

        monkeypatch.setattr(subprocess, "Popen", BreaksOff)
        assert parity(["cifar", "--runs-dir", str(tmp_path)]) == expected


def test_parity_explains_itself(capsys):
    assert parity(["--help"]) == 0
    assert "Compare both sides of a lesson (cifar, fashion" in capsys.readouterr().out
