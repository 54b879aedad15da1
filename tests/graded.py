"""Grades a file of an exercise in a process that is forked: it has imported all that it needs."""

from common.exercises import check, grade
from common.exercises.catalog import find

import os
import sys
import traceback

import lightning  # noqa: F401


class Forked:
    """What `subprocess.Popen` is to a check, without a new Python."""

    def __init__(self, job, environment):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.update(environment)
            with job.with_suffix(".said").open("w") as said:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                sys.stdin = open(os.devnull)  # noqa: SIM115
                try:
                    grade.main(job)
                except BaseException:
                    traceback.print_exc(file=said)
                finally:
                    os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def checked(workspace, number, text=None, *changes):
    """Check a text, else the solution after some changes, as the file of an exercise."""
    exercise = find(f"{number}")
    text = exercise.solution() if text is None else text
    for old, new in changes:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    workspace.folder.mkdir(exist_ok=True)
    workspace.path(exercise).write_text(text)
    return check.check(exercise, workspace)
