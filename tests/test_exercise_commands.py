"""What learners do with the exercises: mistakes of every kind, and the commands as typed."""

from common import ROOT
from common.exercises import __main__ as commands
from common.exercises import check
from common.exercises.catalog import exercises, find
from common.exercises.workspace import OURS, Workspace
from common.messages import BadInput

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from graded import checked
from helpers import count, some

# What learners do.

BAD = {
    "a syntax error": (
        ("        optimizer.zero_grad()\n", "        optimizer.zero_grad(\n"),
        r"Python cannot read line \d+: `optimizer.zero_grad\(` \('\(' was never closed\)",
    ),
    "an indentation": (
        ("        optimizer.zero_grad()\n", "         optimizer.zero_grad()\n"),
        r"Python cannot read line \d+: .*indent",
    ),
    "a name that is none": (
        ("        optimizer.zero_grad()\n", "        optimiser.zero_grad()\n"),
        r"NameError in line \d+, `optimiser.zero_grad\(\)`: name 'optimiser' is not defined",
    ),
    "an error within PyTorch": (
        ("model(images), labels", "model(labels), images"),
        r"RuntimeError in line \d+, `loss = F.cross_entropy\(model\(labels\), images\)`: ",
    ),
    "an endless loop": (
        ("        optimizer.zero_grad()\n", "        while True:\n            pass\n"),
        r"it was still at work after 2 seconds in line \d+, `(while True:|pass)`; does it ever end",
    ),
    "an endless loop that catches all": (
        ("        optimizer.zero_grad()\n",
         "        while True:\n            try:\n                pass\n"
         "            except Exception:\n                pass\n"),
        r"it was still at work after 2 seconds in line \d+",
    ),
    "an endless loop while it is imported": (
        ("# %% Seed and device\n", "while True:\n    pass\n"), "still at work after 2 seconds",
    ),
    "sys.exit": (
        ("    return net\n", "    raise SystemExit\n"),
        r"it ends Python in line \d+, `raise SystemExit`; make check needs main to return",
    ),
    "os._exit": (("    return net\n", "    os._exit(3)\n"), "it ended Python with status 3"),
    "no network": (
        ("    return net\n", ""), "main returned NoneType, and not the network that it trained",
    ),
    "no main": (("def main(args):", "def start(args):"), "there is no main in it any more"),
    "no training": (
        ("        optimizer.step()\n", ""), "without an optimizer's step: nothing was trained",
    ),
    "no test": (
        ('    test = evaluate(model, test_loader, device, "test")\n'
         '    logger.log_metrics({"epoch": args.max_epochs, **test}, steps)\n', ""),
        "did not test the network, or did not log what the test gave",
    ),
    "a question": (
        ("    return net\n", "    input('Go on?')\n    return net\n"), "EOFError in line",
    ),
    "Lightning on the plain side": (
        ("import random\n", "import random\nimport lightning\n"), "it imports lightning",
    ),
    "too many images": (
        ("make_loaders(data, args)", "make_loaders(data, args, 3)"), r"TypeError in line \d+",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(BAD, every=4))
def test_what_breaks_off_is_said_in_one_sentence(name, workspace, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 2 if "endless" in name else 30)
    (old, new), expected = BAD[name]
    outcome = checked(workspace, 1, None, (old, new))
    said = outcome.said
    assert not outcome.solved and outcome.stage == "run", outcome
    assert re.search(expected, said), said
    assert said.endswith(".") and "\n" not in said and "Traceback" not in said
    assert said.startswith(f"{workspace.path(find('1'))}: ")
    count("broken files")


def test_the_trainer_has_to_train(workspace):
    text = re.sub(r"    trainer.fit\(.*\n", "", find("10").solution())
    assert "fit was never called" in checked(workspace, 10, text).said


def test_what_a_file_prints_is_shown(workspace, capsys):
    exercise = find("1")
    workspace.begin(exercise)
    text = exercise.given().replace(
        "    model.train()\n", "    model.train()\n    print('here I am', 1, sep='-')\n"
        "    for n in range(1000):\n        print(n)\n",
    )  # fmt: skip
    workspace.path(exercise).write_text(text)
    assert commands.check_one(exercise, workspace, as_json=False) == 1
    said = capsys.readouterr().out
    assert "  | here I am-1\n" in said and "  | ... and more\n" in said
    assert said.count("\n  | ") < 30


FILES = {
    "gone": (
        lambda path: path.unlink(),
        "there is no file '.*'; `make exercise N=01 .*` writes it",
    ),
    "empty": (lambda path: path.write_text(" \n"), "is empty; remove it, and `make exercise N=01 "),
    "no text": (lambda path: path.write_bytes(b"a\xff"), "is no text in UTF-8 .at byte 2."),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused(name, workspace):
    change, expected = FILES[name]
    workspace.begin(find("1"))
    change(workspace.path(find("1")))
    with pytest.raises(BadInput, match=expected) as refused:
        check.check(find("1"), workspace)
    assert f"{refused.value}".endswith(".")
    count("broken files")


@pytest.mark.parametrize("answer", ['""', '"z"', "7", "b", '"a', "None"])
def test_an_answer_that_is_none_is_refused(answer, workspace):
    exercise = find("5")
    workspace.begin(exercise)
    text = exercise.given().replace('answer = ""', f"answer = {answer}")
    workspace.path(exercise).write_text(text)
    with pytest.raises(BadInput, match="a, b, c, d"):
        check.check(exercise, workspace)
    count("broken files")


@pytest.mark.parametrize("number", ["0", "99", "x", "-1", "1.0", "7; rm -rf /"])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(BadInput, match=r"there is no exercise '.*'; `make exercise` lists them"):
        find(number)


def test_nothing_outside_the_workspace_changes(workspace):
    """A file that writes where it is leaves nothing behind."""

    def state():
        return subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True
        ).stdout

    before, exercise = state(), find("1")
    text = exercise.solution().replace(
        "    return net\n", "    open('mine.txt', 'w').write('1')\n    return net\n"
    )
    assert checked(workspace, 1, text).solved
    assert state() == before
    assert [path.name for path in workspace.folder.iterdir()] == [exercise.file]


# The commands.


def run(workspace, *argv):
    return commands.main([*argv, "--workspace", str(workspace.folder)])


def test_begin_hint_solve_and_go_on(workspace, capsys):
    exercise = find("1")
    assert run(workspace, "list") == 0
    said = capsys.readouterr().out
    assert f"0 of {len(exercises())} are solved" in said and "make exercise N=01" in said
    assert run(workspace, "start", "1") == 0
    assert "is written: " in capsys.readouterr().out
    assert run(workspace, "check", "1") == 1
    said = capsys.readouterr().out
    assert "Equal, bit for bit: the data and its order, the initial weights.\n" in said
    assert "The first difference, in loss of every step: loss of step 3: yours" in said
    assert "first in what was done to the gradients before the step.\n" in said
    assert "zero_grad" not in said
    for hint in exercise.hints:
        assert run(workspace, "hint", "1") == 0
        assert hint[:40] in capsys.readouterr().out
    assert run(workspace, "hint", "1") == 0
    assert all(hint[:40] in capsys.readouterr().out for hint in exercise.hints[:1])
    # Asked for twice.
    run(workspace, "solution", "1")
    assert "zero_grad" not in capsys.readouterr().out
    run(workspace, "solution", "1")
    assert "+        optimizer.zero_grad()" in capsys.readouterr().out
    mine = exercise.solution() + "# my own\n"
    workspace.path(exercise).write_text(mine)
    assert run(workspace, "check", "1") == 0
    said = capsys.readouterr().out
    assert "Exercise 01 is solved." in said and "Gradients add up" in said
    assert f"make exercise N=02 WORKSPACE={workspace.folder}\n" in said
    # Begun again, it is left as it is.
    assert run(workspace, "start", "1") == 0
    assert "is there already, and is left as it is" in capsys.readouterr().out
    assert workspace.path(exercise).read_text() == mine
    run(workspace, "list")
    assert "01  solved  " in capsys.readouterr().out
    assert workspace.progress() == {exercise.name: {"hints": 3, "asked": True, "solved": True}}


def test_the_solution_of_what_is_solved_is_shown_at_once(workspace, capsys):
    workspace.note(find("5"), solved=True)
    run(workspace, "solution", "5")
    assert capsys.readouterr().out.startswith("b  96\n")


def test_a_class_is_graded(workspace, capsys):
    """All that were begun: one is solved, one is not, one is broken, one is an answer."""
    for number in (1, 2, 5):
        workspace.begin(find(f"{number}"))
    workspace.path(find("1")).write_text(find("1").solution())
    workspace.path(find("5")).write_text(find("5").solution())
    workspace.path(find("4")).write_text("")
    assert run(workspace, "check", "--all", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["begun"], said["solved"], said["exercises"]) == (4, 2, len(exercises()))
    stages = {each["number"]: each["stage"] for each in said["checked"]}
    assert stages == {1: "", 2: "steps", 4: "file", 5: "answer"}
    assert run(workspace, "check", "--all") == 1
    assert "Solved: 2 of the 4 that were begun" in capsys.readouterr().out


def test_nothing_begun_is_refused(workspace):
    with pytest.raises(BadInput, match=r"there is no exercise in '.*' yet"):
        run(workspace, "check", "--all")
    with pytest.raises(BadInput, match="which exercise"):
        run(workspace, "check")


def test_a_damaged_progress_is_refused_and_kept(workspace):
    workspace.note(find("1"), hints=1)
    for text in ("{", "[]", '{"a": 1}'):
        (workspace.folder / "progress.json").write_text(text)
        with pytest.raises(BadInput, match="does not hold the progress"):
            run(workspace, "list")
        assert (workspace.folder / "progress.json").read_text() == text


def test_a_folder_that_takes_nothing_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot take exercises"):
        run(Workspace(tmp_path / "file"), "start", "1")


def test_it_checks_at_each_save_and_goes_on(workspace, capsys, monkeypatch):
    """Saved wrong, then right; then the next exercise begins, and Ctrl-C ends it."""
    saves = [find("5").solution().replace('"b"', '"a"'), find("5").solution()]
    told = []

    def sleep(_):
        told.append(capsys.readouterr().out)
        if saves:
            workspace.path(find("5")).write_text(saves.pop(0))
        elif any("Exercise 06 is written" in text for text in told):
            raise KeyboardInterrupt

    monkeypatch.setattr(commands.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, "watch", "5")
    told = "".join(told)
    assert told.count(" is not solved yet") == 1 and told.count("Exercise 05 is solved.") == 1


def test_the_twin_is_trained_once(workspace, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "KEPT", tmp_path / "own")
    started, usual = [], check.start
    monkeypatch.setattr(check, "start", lambda *job: started.append(1) or usual(*job))
    assert checked(workspace, 1).solved and len(started) == 2
    assert checked(workspace, 1).solved and len(started) == 3
    # Another exercise with the same twin and settings has the same result.
    assert checked(workspace, 2).solved and len(started) == 4
    # What it was computed from has changed.
    monkeypatch.setattr(check, "versions", lambda: {"torch": "another"})
    assert checked(workspace, 1).solved and len(started) == 6


def test_a_check_that_is_interrupted_ends_what_it_has_started(workspace, monkeypatch):
    """Ctrl-C while a file trains: nothing goes on."""
    started, usual = [], check.start
    check.twin_of(find("1"))  # not while it is interrupted

    def start(*job):
        started.append(usual(*job))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return started[-1]

    monkeypatch.setattr(check, "start", start)
    text = find("1").solution().replace("    return net\n", "    while True: pass\n")
    with pytest.raises(KeyboardInterrupt):
        checked(workspace, 1, text)
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


@pytest.mark.slow  # a check in processes of its own, which import all anew
def test_by_make(tmp_path):
    """As it is typed, in processes of its own; a mistake ends with 2 and one sentence."""

    def make(*words):
        command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
        return subprocess.run(
            [*command, f"WORKSPACE={tmp_path}/w"], capture_output=True, text=True, timeout=300
        )

    assert make("exercise", "N=06").returncode == 0
    said = make("check", "N=6")
    assert said.returncode == 2 and "Yet to be written" in said.stdout  # make's own status
    (tmp_path / "w" / find("6").file).write_text(find("6").solution())
    said = make("check", "N=06")
    assert said.returncode == 0 and "Exercise 06 is solved." in said.stdout, said.stderr
    for words, expected in (
        (["check"], "error: which exercise?"),
        (["check", "N=99"], "error: there is no exercise '99'"),
        (["hint", "N=$$(touch x)"], "error: there is no exercise"),
        (["exercise", "N='"], "error: there is no exercise"),
    ):
        said = make(*words)
        assert said.returncode == 2 and expected in said.stderr, said.stderr
        assert "Traceback" not in said.stderr and said.stderr.count("error: ") == 1


def test_a_command_names_the_folder_where_it_is_not_ours():
    ours, other = Workspace(OURS), Workspace(OURS.parent / "a class" / "kim")
    assert ours.typed("check", find("7")) == "make check N=07"
    assert other.typed("hint", find("7")).startswith("make hint N=07 WORKSPACE='/")
    assert ours.said(find("1")) == "exercises/01_left_over_gradients.py"
    assert Workspace(Path("/elsewhere")).said(find("1")).startswith("/elsewhere/01_")
