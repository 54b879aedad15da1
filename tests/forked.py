"""Commands in processes of their own that can be killed: forked from one that has imported all.

A lesson that is typed takes ten seconds to import what it needs; one that is forked takes none.
"""

from common import ROOT, SIDES, data
from common.messages import clear_messages
from common.proof.lessons import load
from common.run import run

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import helpers
import pytest
import torch
from helpers import Noisy, give, small_data
from torch.optim.optimizer import register_optimizer_step_post_hook

LIMIT = 60  # seconds for anything


class Forked:
    """A command that goes on beside the test; what it prints goes to files."""

    def __init__(self, server, pid, out):
        self.server, self.pid, self.out, self.ended = server, pid, out, None

    @property
    def stdout(self):
        return (self.out / "stdout").read_text(errors="backslashreplace")

    @property
    def stderr(self):
        return (self.out / "stderr").read_text(errors="backslashreplace")

    def said(self):
        return f"{self.stdout}\n--- stderr:\n{self.stderr}"

    def signal(self, number):
        os.kill(self.pid, number)

    @property
    def status(self):
        """Wait for the end; the exit status, or the signal's number below 0."""
        if self.ended is None:
            self.ended = self.server.ask(wait=self.pid)
        return self.ended

    def until(self, there, what="what it waits for"):
        """Wait until `there()` is true; fail where the command ended before."""
        end = time.monotonic() + LIMIT
        while not (found := there()):
            assert not (self.out / "ended").exists(), f"ended before {what}: {self.said()}"
            assert time.monotonic() < end, f"never: {what}\n{self.said()}"
            time.sleep(0.01)
        return found

    def sentence(self, status):
        """Wait for the end with this status; return the one sentence on stderr."""
        assert self.status == status, (self.status, self.said())
        lines = [line for line in self.stderr.splitlines() if line]
        assert len(lines) == 1 and lines[0].endswith("."), self.said()
        assert "Traceback" not in self.said()
        return lines[0]


class Server:
    """Forks a process for each command."""

    def __init__(self, folder):
        self.folder, self.numbers, self.running = folder, itertools.count(), []
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip

    def ask(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def lesson(self, side, lesson, runs_dir, *argv, **more):
        """Type a lesson, on a few drawn images; `more` is what `act` may be asked for."""
        out = self.folder / f"{next(self.numbers)}"
        out.mkdir()
        usual = "--accelerator cpu --threads 1 --batch-size 8 --log-every-n-steps 1".split()
        argv = [*usual, "--runs-dir", str(runs_dir), *map(str, argv)]
        job = dict(side=side, lesson=lesson, argv=argv, out=str(out), **more)
        command = Forked(self, self.ask(**job), out)
        self.running.append(command)
        return command

    def command(self, module, *argv):
        """Type `python -m common.proof.MODULE`; what it starts sleeps, and leaves its number."""
        out = self.folder / f"{next(self.numbers)}"
        out.mkdir()
        sleeper = out / "python"
        sleeper.write_text(
            f"#!/bin/sh\nexec {sys.executable} -c 'import common, os, sys, time\n"
            f'open("{out}/half", "w").write(str(os.getpid()))\n'
            f'os.rename("{out}/half", "{out}/child")\n'
            "with common.messages.clear_messages(): time.sleep(60)'\n"
        )
        sleeper.chmod(0o755)
        job = dict(command=module, argv=list(map(str, argv)), out=str(out), python=str(sleeper))
        command = Forked(self, self.ask(**job), out)
        self.running.append(command)
        return command

    def close(self):
        for command in self.running:
            if command.ended is None:
                with contextlib.suppress(ProcessLookupError):
                    command.signal(signal.SIGKILL)
                assert command.status is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


@contextlib.contextmanager
def serving(folder):
    with contextlib.closing(Server(folder)) as server:
        yield server


def serve():
    torch.set_num_threads(1)
    drawn = helpers.some_images.__wrapped__("cifar10")
    helpers.some_images = lambda name: drawn
    modules = {
        (side, lesson): load(side, lesson) for side in SIDES for lesson in ("cifar", "resume")
    }
    commands = {
        name: importlib.import_module(f"common.proof.{name}")
        for name in ("parity", "devices", "order", "__main__")
    }
    assert threading.active_count() == 1  # a fork copies no other thread
    out = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            status = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
            (out[job["wait"]] / "ended").touch()
            print(status, flush=True)
        elif child := os.fork():
            out[child] = Path(job["out"])
            print(child, flush=True)
        else:
            work(job, commands.get(job.get("command")) or modules[job["side"], job["lesson"]])


def work(job, module):
    """Do what one job says, and end this process as Python would."""
    out, status = Path(job["out"]), 0
    os.setsid()  # a group of its own, as of a terminal
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job.get("closed"):  # as behind `| head`, which has read enough
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        os.close(read)
    try:
        if "command" in job:
            sys.executable = job["python"]
            os.environ["ENDS_WITH"] = f"{os.getpid()}"  # as an import in this process does
            with clear_messages(failed=2):
                sys.exit(module.main(job["argv"]))
        sys.argv = [str(ROOT / job["side"] / f"{job['lesson']}.py"), *job["argv"]]
        with pytest.MonkeyPatch.context() as monkeypatch:
            # Too short for validation to be over before it is seen.
            give(module, small_data(**job.get("images", {})), Noisy, job["lesson"], monkeypatch)
            act(monkeypatch, out, **job.get("at", {}))
            run(module.main, module.Args)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    (out / "ended").touch()
    os._exit(status)


def act(monkeypatch, out, step=0, test=False, write="", fail=""):
    """Leave the file `there` and wait for the file `go`.

    That is after a step, in the test, or before a file has its name.
    `fail` is the text of a RuntimeError in the first forward pass, or the name of another error.
    """

    def wait():
        (out / "there").touch()
        end = time.monotonic() + LIMIT
        while not (out / "go").exists() and time.monotonic() < end:
            time.sleep(0.01)

    steps = []

    def after(*_):
        steps.append(1)
        if len(steps) == step:
            wait()

    register_optimizer_step_post_hook(after)
    if test or fail:

        def forward(network, _):
            if fail:
                raise {"MemoryError": MemoryError}.get(fail, RuntimeError)(fail)
            if test and steps and not network.training and tests:
                wait()

        tests = []
        count = data.DataLoader.__iter__

        def begin(loader):
            if loader.dataset.split == "test":
                tests.append(1)
            return count(loader)

        monkeypatch.setattr(data.DataLoader, "__iter__", begin)
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda network, given: forward(network, given) if isinstance(network, Noisy) else None
        )
    if write:
        replace = os.replace

        def before(source, target, **where):
            if Path(target).name == write:
                wait()
            replace(source, target, **where)

        monkeypatch.setattr(os, "replace", before)


if __name__ == "__main__":
    serve()
