"""However a command ends early: one sentence, the right exit status, and nothing that goes on."""

from common import ROOT, messages, signals
from common.messages import BadInput, Stopped, clear_messages
from common.proof import parity

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import LIMIT, serving
from helpers import SIDES, count, some

KEPT = "what was written until now is kept."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("forked")) as server:
        yield server


def is_there(pid):
    """Tell whether a process goes on; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def of_group(pid):
    """The processes of the session that a command leads."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                found.append(int(folder.name))
    return found


def assert_all_gone(pid):
    end = time.monotonic() + 20
    while left := of_group(pid):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.05)


# SIGTERM and Ctrl-C.


MOMENTS = {
    "cifar": {"a step": dict(step=3), "the test": dict(test=True),
              "a picture": dict(write="weights.pt"), "the result": dict(write="result.json")},
    "resume": {"the test": dict(test=True), "the result": dict(write="result.json")},
}  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lesson, moment", [
    # Each third is run by `make test`, all by `make test-slow`.
    pytest.param(*pair, marks=[pytest.mark.slow] * (number % 3 > 0))
    for number, pair in enumerate((a, b) for a in MOMENTS for b in MOMENTS[a])
])  # fmt: skip
@pytest.mark.parametrize("name", ["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_a_lesson(name, lesson, moment, side, server, tmp_path):
    number, status = {"SIGTERM": (15, 143), "Ctrl-C": (2, 130)}[name]
    command = server.lesson(side, lesson, tmp_path, at=MOMENTS[lesson][moment])
    command.until((command.out / "there").exists)
    command.signal(number)
    assert command.sentence(status) == f"Stopped by {name}; {KEPT}"
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob(".half-*"))
    assert not list(tmp_path.rglob("*.lock"))
    count("signals, each with its sentence and status")


@pytest.mark.parametrize("side", SIDES)
def test_a_resumable_lesson_saves_before_it_ends(side, server, tmp_path):
    command = server.lesson(side, "resume", tmp_path, at=dict(step=3))
    command.until((command.out / "there").exists)
    command.signal(signal.SIGTERM)
    (command.out / "go").touch()  # it was told of the signal within the step, which goes on
    assert command.sentence(143).startswith("Stopped by SIGTERM after step 3, which was saved;")
    again = server.lesson(side, "resume", tmp_path, "--ckpt-path", "last")
    assert again.status == 0, again.said()
    count("signals, each with its sentence and status")


@pytest.mark.slow  # on a busy machine a second signal may come when all has ended
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("numbers", [(2,), (2, 2), (15,), (15, 2), (2, 2, 2), (15, 15)], ids=str)
def test_while_processes_load_images(numbers, side, server, tmp_path):
    """As a terminal does it, to all of the group; nothing is left, and nobody complains."""
    lesson = "resume" if numbers[1:] == (2, 2) else "cifar"
    command = server.lesson(side, lesson, tmp_path, "--num-workers", 2, at=dict(step=3))
    command.until((command.out / "there").exists)
    assert len(of_group(command.pid)) >= 3
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, number)
        time.sleep(0.02)
    assert command.status in (128 + numbers[0], 128 + numbers[-1]), command.said()
    lines = [line for line in command.stderr.splitlines() if line]
    assert {line.partition(" by ")[0] for line in lines} == {"Stopped"}, command.said()
    assert len(lines) == 1, command.said()
    assert_all_gone(command.pid)
    count("signals while processes load images")


def test_a_third_ctrl_c_is_no_traceback(server, tmp_path):
    command = server.lesson("plain", "resume", tmp_path, at=dict(test=True))
    command.until((command.out / "there").exists)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):
            command.signal(signal.SIGINT)
    assert command.sentence(130) == f"Stopped by Ctrl-C; {KEPT}"


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("what", ["common", "common.data"])
def test_a_signal_during_the_imports(what, number, tmp_path):
    program = f"import common, time; time.sleep({0 if '.' in what else 60}); import {what}, torch"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)  # fmt: skip
    time.sleep(1.0)
    process.send_signal(number)
    _, said = process.communicate(timeout=LIMIT)
    name = {2: "Ctrl-C", 15: "SIGTERM"}[number]
    assert (process.returncode, said.strip()) == (128 + number, f"Stopped by {name}; {KEPT}")


# What the machine does to a run.


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_process_that_loads_images_is_killed(number, side, server, tmp_path):
    command = server.lesson(side, "cifar", tmp_path, "--num-workers", 2, "--max-epochs", 500)
    metrics = tmp_path / "cifar" / side / "metrics.csv"
    command.until(lambda: metrics.exists() and len(of_group(command.pid)) >= 2)
    while command.ended is None and not (command.out / "ended").exists():
        for pid in of_group(command.pid):
            if pid != command.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.05)
    assert command.status == 1, command.said()
    # PyTorch's C code has a line of its own for some signals.
    said = command.stderr.replace("\0", "").splitlines()
    lines = [line for line in said if line and "ERROR: Unexpected" not in line]
    assert len(lines) == 1, command.said()
    assert "A process that loads images was ended by the system" in lines[0]
    assert "use fewer --num-workers" in lines[0] and "Traceback" not in command.said()
    assert_all_gone(command.pid)
    count("processes killed by the system")


def test_the_thread_that_hands_images_on_says_nothing(capsys, monkeypatch):
    """Python's own thread tells sys.excepthook when a worker is killed while it connects."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(signals, "listen_during_imports", lambda: None)
    messages.one_sentence_during_imports()
    code = compile("raise ConnectionResetError('reset')", "multiprocessing/connection.py", "exec")

    def tell():
        try:
            exec(code)
        except ConnectionResetError as error:
            sys.excepthook(type(error), error, error.__traceback__)

    thread = threading.Thread(target=tell)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""
    with pytest.raises(ConnectionResetError):
        exec(code)
    tell()
    assert "ConnectionResetError: reset" in capsys.readouterr().err


NO_MEMORY = [
    "MemoryError",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 14400000000 bytes. Error code 12 (Cannot allocate memory)",
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "std::bad_alloc",
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fail", NO_MEMORY, ids=range(len(NO_MEMORY)))
def test_there_is_no_memory(fail, side, server, tmp_path):
    command = server.lesson(side, "cifar", tmp_path, at=dict(fail=fail))
    said = command.sentence(1)
    assert said.startswith("There is not enough memory") and "--batch-size" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    count("ends for want of memory")


def test_an_error_of_the_program_is_still_shown(server, tmp_path):
    command = server.lesson("plain", "cifar", tmp_path, at=dict(fail="shapes do not match"))
    assert command.status == 1 and "RuntimeError: shapes do not match" in command.stderr
    assert "Traceback" in command.stderr


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lesson", ["cifar", "resume"])
def test_nobody_reads_the_output(lesson, side, server, tmp_path):
    command = server.lesson(side, lesson, tmp_path, closed=True)
    said = command.sentence(141)
    assert said == f"Stopped, since nobody reads the output; {KEPT}"
    # `resume` prints its table alone, when all is written.
    assert len(list(tmp_path.rglob("result.json"))) == (lesson == "resume")
    count("closed pipes")


@pytest.mark.parametrize(
    "words", some(["-c 'print(1)'", "order --help", "sidebyside cifar", "parity -h"], every=2)
)
def test_a_closed_pipe_from_the_shell(words, tmp_path):
    module, *more = words.split()
    if module == "-c":
        program = "from common.messages import *\nwith clear_messages():\n  print(1); print(2)"
        command = [sys.executable, "-c", program]
    else:
        command = [sys.executable, "-m", f"common.proof.{module}", *more]
    read, write = os.pipe()
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    os.close(read)
    _, said = process.communicate(timeout=LIMIT)
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert process.returncode == 141 and said.count("\n") == 1, (process.returncode, said)
    count("closed pipes")


# What a killed run leaves.


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("file", ["curves.png", "weights.pt", "result.json"])
def test_what_a_kill_leaves_half_written_is_no_result(file, side, server, tmp_path):
    killed = server.lesson(side, "cifar", tmp_path, at=dict(write="weights.pt"))
    killed.until((killed.out / "there").exists)
    killed.signal(signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    folder = tmp_path / "cifar" / side
    (half,) = folder.glob(".half-*")
    half.rename(folder / f".half-x{file}")
    after = server.lesson(side, "cifar", tmp_path)
    assert after.status == 0, after.said()
    assert not list(tmp_path.rglob(".half-*"))
    folder, _, listed = after.stdout.splitlines()[-1].partition("/: ")
    assert folder.startswith("Written to ") and "half" not in listed and " ." not in listed
    assert "result.json" in listed


# A command that starts others.


ASKS = {
    "parity": ["cifar", "--data", "shapes", "--accelerator", "cpu"],
    "devices": ["--data", "shapes", "--accelerator", "cpu"],
    "order": [],
    "__main__": [str(ROOT / "plain" / "cifar.py"), str(ROOT / "lightning" / "cifar.py")],
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("module", ASKS)
def test_what_a_command_started_ends_with_it(module, number, server, tmp_path):
    more = ["--runs-dir", tmp_path] if module in ("parity", "devices") else []
    command = server.command(module, *ASKS[module], *more)
    child = int(command.until(lambda: (command.out / "child").exists()
                              and (command.out / "child").read_text()))  # fmt: skip
    time.sleep(0.1)
    if number == signal.SIGINT:  # as a terminal does it
        os.killpg(command.pid, number)
    else:
        command.signal(number)
    assert command.status == (-9 if number == signal.SIGKILL else 128 + number), command.said()
    end = time.monotonic() + 20
    while is_there(child):
        assert time.monotonic() < end, command.said()
        time.sleep(0.05)
    lines = [line for line in command.stderr.splitlines() if line]
    assert {line.partition(" by ")[0] for line in lines} <= {"Stopped"}, command.said()
    assert "Traceback" not in command.said()
    assert lines or module == "order"  # which keeps what its child says to itself
    count("commands that were ended, and what they had started with them")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_make_started_ends_with_it(number, tmp_path):
    """A Makefile as ours, with a program that sleeps in the place of the lesson."""
    text = (ROOT / "Makefile").read_text()
    assert "export ENDS_WITH := make\n" in text
    (tmp_path / "sleeps.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport common, os, time\n"
        "open('child', 'w').write(str(os.getpid())); time.sleep(60)\n"
    )
    (tmp_path / "Makefile").write_text(
        f"export ENDS_WITH := make\nall:\n\t@{sys.executable} sleeps.py --cell Training\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFL"))}
    make = subprocess.Popen(["make", "-s"], cwd=tmp_path, env=environment, start_new_session=True)
    end = time.monotonic() + 20
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    child = int((tmp_path / "child").read_text())
    make.send_signal(number)
    make.wait(LIMIT)
    while is_there(child):
        assert time.monotonic() < end
        time.sleep(0.05)
    count("commands that were ended, and what they had started with them")


@pytest.mark.parametrize("status, expected", [(143, 143), (130, 130), (1, 2), (2, 2), (141, 2)])
def test_the_status_of_a_side_that_broke_off(status, expected, tmp_path, monkeypatch):
    class Ends:
        def __init__(self, command):
            pass

        def wait(self):
            return status

    monkeypatch.setattr(subprocess, "Popen", Ends)
    assert parity.main(["cifar", "--runs-dir", str(tmp_path), "--data", "shapes"]) == expected


def test_a_side_that_was_killed_is_told(tmp_path, monkeypatch):
    class Killed:
        def __init__(self, command):
            pass

        def wait(self):
            return -9

    monkeypatch.setattr(subprocess, "Popen", Killed)
    with pytest.raises(BadInput, match="the plain side of cifar was ended by SIGKILL"):
        parity.main(["cifar", "--runs-dir", str(tmp_path), "--data", "shapes"])


# The parts.


@pytest.mark.parametrize("error, failed, status", [
    (ValueError("unknown"), 2, 2), (BadInput("bad."), 2, 2), (Stopped("end.", 124), 2, 124),
    (MemoryError(), 1, 1), (MemoryError(), 2, 2), (KeyboardInterrupt(), 1, 130),
    (signals.Terminated(), 1, 143), (OSError(28, "No space left on device"), 1, 2),
])  # fmt: skip
def test_each_end_has_its_status(error, failed, status, capsys):
    with pytest.raises(SystemExit) as end, clear_messages(failed):
        raise error
    assert end.value.code == status
    said = capsys.readouterr().err
    assert ("Traceback" in said) == isinstance(error, ValueError)
    assert isinstance(error, ValueError) or len(said.strip().splitlines()) == 1


class SaidWhileOneEnds(BadInput):
    """An error; while it is put into words, a second process that loads images ends."""

    def __str__(self):
        os.kill(os.getpid(), signal.SIGCHLD)
        return super().__str__()


def test_an_end_is_told_while_another_process_ends(capsys):
    def as_pytorch_does(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error.")

    usual = signal.signal(signal.SIGCHLD, as_pytorch_does)
    try:
        with pytest.raises(SystemExit) as end, clear_messages():
            raise SaidWhileOneEnds("bad.")
    finally:
        signal.signal(signal.SIGCHLD, usual)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: bad.\n")


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"), ("a\nb", "a\\nb"), ("\x1b[31mred", "\\x1b[31mred"),
    ("\udcff", "\\udcff"), ("\u202ereversed", "\\u202ereversed"), ("Käse ✓", "Käse ✓"),
])  # fmt: skip
def test_a_name_is_only_shown(text, shown):
    assert messages.printable(text) == shown
    assert str(BadInput(text)) == shown and str(Stopped(text, 1)) == shown


def test_the_fallback_without_pdeathsig(tmp_path):
    """On macOS, where the system has no such thing, the process looks who its parent is."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.platform = 'darwin'\n"
        "import common, os, time\nopen('child', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time\nos.environ['ENDS_WITH'] = str(os.getpid())\n"
        f"subprocess.Popen([sys.executable, '-c', {program!r}]); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    end = time.monotonic() + 20
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    child = int((tmp_path / "child").read_text())
    while is_there(child):
        assert time.monotonic() < end
        time.sleep(0.05)
