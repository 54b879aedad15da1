"""Checks a learner's file: trains it beside its twin, and says what still differs.

Both train in processes of their own, in a folder that is removed afterwards. What the twin reached
is kept: it is the same each time, on one machine.
"""

from common import ROOT, script_of
from common.exercises.catalog import TWIN, Exercise
from common.exercises.workspace import KEPT, Workspace
from common.folders import write_whole
from common.messages import BadInput
from common.proof.compare import NAMES, compare_stages
from common.proof.fingerprints import code_sha256, versions
from common.small import ALONE, free_port

import ast
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import samebits
import torch
from samebits import STAGES

SECONDS = 30  # for a file's training; the longest of them takes 2 on a quiet machine
PATIENCE = 15  # more, until a process that does not react is killed
IMPORTS = 300  # for the libraries: a minute on a slow disk
FEW = 20  # lines that are shown of what a file printed


@dataclass(frozen=True)
class Outcome:
    """What a check found: `solved`; else `stage` and `said`, what to tell the learner."""

    solved: bool
    stage: str = ""
    said: str = ""
    compared: tuple[str, ...] = ()  # the stages that are equal
    printed: tuple[str, ...] = field(default=(), compare=False)


def check(exercise: Exercise, workspace: Workspace) -> Outcome:
    """Grade a learner's file; raise BadInput where there is nothing to grade."""
    text = workspace.read(exercise)
    if exercise.kind == "predict":
        return _answer(exercise, text)
    if text == exercise.given() and exercise.stage == "run":
        todo = next(new for _, new in exercise.changes if "NotImplementedError" in new)
        what = todo.partition('NotImplementedError("')[2].partition('")')[0]
        return Outcome(False, "run", f"It is as it was given. Yet to be written: {what}.")
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        twin = twin_of(exercise)
        folder = Path(name)
        script = folder / exercise.file
        script.write_text(text, encoding="utf-8")
        found = train(exercise, exercise.side, script, folder)
        printed = tuple(found.get("printed", ()))
        if found["error"]:
            said = f"{workspace.said(exercise)}: {found['error']}."
            return Outcome(False, "run", said, printed=printed)
        yours = found["result"] | {"side": "yours"}
        comparison = compare_stages(yours, json.loads(twin.read_text()) | {"side": "the twin"})
        stages = comparison.stages
        equal = tuple(s.name for s in stages if s.compared and s.difference is None)
        first = comparison.first_difference
        if first is None:
            return Outcome(True, compared=equal, printed=printed)
        said = f"The first difference, in {NAMES[first.name]}: {first.difference}."
        if diagnosis := _doctor(folder / "trace", twin.with_suffix(".trace"), first.name):
            said += f"\n{diagnosis}"
        return Outcome(False, first.name, said, equal, printed)


def _doctor(yours: Path, twin: Path, stage: str) -> str:
    """Say where in a step the two differ first, and not by which cause: that is the exercise."""
    if stage not in ("start", "steps", "weights", "optimizer") or not yours.is_file():
        return ""
    try:
        diagnosis = samebits.compare(twin, yours)
    except samebits.BadInput:
        return ""
    if diagnosis.stage is None:
        return ""
    when = f"from step {diagnosis.step} on" if diagnosis.step else "before the first step"
    return f"Within a step, as the doctor sees it: {when}, first in {STAGES[diagnosis.stage]}."


def _answer(exercise: Exercise, text: str) -> Outcome:
    """Grade a question's answer; raise BadInput where there is none."""
    letters = list(exercise.answers)
    wanted = f"one of the letters {', '.join(letters)}"
    try:
        nodes = ast.parse(text).body
    except SyntaxError as error:
        raise BadInput(
            f"Python cannot read line {error.lineno} of {exercise.file} ({error.msg}); expected "
            f'answer = "a", with {wanted}.'
        ) from None
    given: Any = None
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "answer":
            given = node.value.value if isinstance(node.value, ast.Constant) else None
    letter = given.strip().lower() if isinstance(given, str) else None
    if letter == "":
        raise BadInput(f'{exercise.file} has no answer yet; write {wanted}: answer = "a".')
    if letter not in letters:
        raise BadInput(f'expected {wanted} in {exercise.file}: answer = "a".')
    _, why = exercise.answers[letter]
    return Outcome(letter == exercise.right, "answer", why)


def key_of(exercise: Exercise) -> str:
    """Return what a twin's result depends on, as one word."""
    side = TWIN[exercise.side]
    parts = [
        exercise.lesson, side, exercise.settings, exercise.resume_at > 0, exercise.processes,
        code_sha256(side), versions(), platform.node(), torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    # The few images, the small network, and how they are trained.
    parts += [(ROOT / "common" / name).read_text() for name in ("small.py", "exercises/grade.py")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def twin_of(exercise: Exercise) -> Path:
    """Return the file with what the twin reached; train it where it is not there yet."""
    path = KEPT / f"{exercise.lesson}-{key_of(exercise)}.json"
    if path.is_file():
        return path
    side = TWIN[exercise.side]
    with tempfile.TemporaryDirectory(prefix="twin-") as name:
        folder = Path(name)
        found = train(exercise, side, script_of(side, exercise.lesson), folder, is_twin=True)
        if found["error"]:
            raise BadInput(
                f"the twin {exercise.twin} itself did not come to its end: {found['error']}; has "
                "it been changed? git diff tells."
            )
        try:
            KEPT.mkdir(parents=True, exist_ok=True)
            if (folder / "trace").is_file():
                shutil.copyfile(folder / "trace", path.with_suffix(".trace"))
            result = json.dumps(found["result"])
            write_whole(path, lambda half: half.write_text(result, encoding="utf-8"))
        except OSError as error:
            raise BadInput(
                f"what the twin reached cannot be kept in '{KEPT}': {error.strerror}."
            ) from None
    return path


def train(
    exercise: Exercise, side: str, script: Path, folder: Path, is_twin: bool = False
) -> dict[str, Any]:
    """Train a file in processes of its own, and return what `grade` found.

    Of several processes that is what the first one found, or the first that broke off.
    """
    world, seconds = exercise.processes, SECONDS * (4 if is_twin else 1)
    settings = exercise.settings | ({"devices": world} if world > 1 else {})
    meet = ALONE | {"MASTER_PORT": free_port(), "WORLD_SIZE": f"{world}"}
    meet |= {"LOCAL_WORLD_SIZE": f"{world}"}
    jobs, running = [], []
    for rank in range(world):
        jobs.append(folder / f"job{rank}.json")
        job = {
            "script": str(script), "side": side, "lesson": exercise.lesson, "settings": settings,
            "resume_at": 0 if is_twin else exercise.resume_at, "processes": world,
            "folder": str(folder), "seconds": seconds,
        }  # fmt: skip
        jobs[-1].write_text(json.dumps(job))
        own = meet | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if world > 1 else {}
        running.append(start(jobs[-1], own))
    try:
        _wait(running, [job.with_suffix(".begun") for job in jobs], seconds)
    finally:
        for process in running:
            _kill(process)
    found = [_found(job, process) for job, process in zip(jobs, running, strict=True)]
    return next((each for each in found if each["error"]), found[0])


def start(job: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start the process that does a job; what it says goes into a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "common.exercises.grade", str(job)], cwd=ROOT,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=job.with_suffix(".said").open("wb"),
    )  # fmt: skip


def _wait(running: list[subprocess.Popen], begun: list[Path], seconds: float) -> None:
    """Wait until all have ended, one has broken off, or the time is over."""
    deadline = time.monotonic() + IMPORTS
    counting = False
    while any(process.poll() is None for process in running):
        if not counting and all(path.exists() for path in begun):
            deadline, counting = time.monotonic() + seconds + PATIENCE, True
        ended = [process for process in running if process.poll() is not None]
        if ended and len(ended) < len(running):  # the others may wait for it for ever
            deadline = min(deadline, time.monotonic() + PATIENCE)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _kill(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _found(job: Path, process: subprocess.Popen) -> dict[str, Any]:
    """Return what a process wrote; where it wrote nothing, how it ended."""
    path = job.with_suffix(".found")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if process.returncode == -signal.SIGKILL:
        why = "it did not react any more, and was killed: does it ever end, or need all memory"
    else:
        why = f"it ended Python with status {process.returncode}, before main had returned"
    return {"error": why, "result": {}, "printed": []}
