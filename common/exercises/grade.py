"""Trains one file in small and writes down what came of it: `python -m common.exercises.grade JOB`.

A process of its own, since a learner's file may do anything: end the process, print without end,
never end. What it says goes into the file that the job names, as JSON: `error`, one sentence of why
it broke off, else "", `result`, what a run's result.json holds, and `printed`, the lines that the
file itself printed. The trace for the doctor lies beside it.
"""

from common.folders import write_whole
from common.messages import BadInput, keep_quiet, printable
from common.proof import watch
from common.proof.lessons import as_module
from common.proof.lessons import load as load_lesson
from common.small import arguments, be_alone, few, give, is_to_be_alone, network_of, traced

import ast
import contextlib
import functools
import io
import json
import linecache
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

LIBRARIES = {"lightning", "pytorch_lightning", "torchmetrics"}
MOST = 40  # lines of what a file printed


class TimeIsUp(BaseException):
    """Raised where the file is when its time is over; no `except Exception` catches it."""


class Unfit(Exception):
    """The file ran, and what it did cannot be compared; the text is a sentence."""


def grade(job: dict[str, Any]) -> dict[str, Any]:
    """Train as a job says, and return what is to be written down."""
    printed: list[str] = []
    found: dict[str, Any] = {"error": "", "result": {}, "printed": printed}
    script = Path(job["script"])
    try:
        with limited(job["seconds"]):
            found["result"] = _train(job, script, printed)
    except BaseException as error:
        found["error"] = printable(say(error, script, job["seconds"]))
    return found


def _train(job: dict[str, Any], script: Path, printed: list[str]) -> dict[str, Any]:
    side, lesson, folder = job["side"], job["lesson"], Path(job["folder"])
    if is_to_be_alone(lesson):
        be_alone()
    module = load(script, side, lesson, printed)
    for name in ("main", "Args"):
        if not callable(getattr(module, name, None)):
            raise Unfit(f"there is no {name} in it any more; make check calls main(Args(...))")
    fitted = _watch_fit(side, lesson)

    def main(args: Any) -> nn.Module:
        net = module.main(args)
        if not isinstance(net, nn.Module):
            raise Unfit(
                f"main returned {type(net).__name__}, and not the network that it trained; "
                "its last line has to return it"
            )
        if fitted == [False]:
            raise Unfit("the Trainer's fit was never called; this exercise is of Lightning's side")
        return net

    def once(**settings: Any) -> dict[str, Any]:
        args = arguments(module, side, lesson, folder, **job["settings"] | settings)
        args.begin()
        try:
            return watch.watch(main, args)
        except (KeyError, IndexError, AttributeError, StopIteration) as error:
            if any(Path(f.filename) == script for f in traceback.extract_tb(error.__traceback__)):
                raise
            raise Unfit(
                "it came to its end, but did not test the network, or did not log what the test "
                "gave: main has to do both"
            ) from error

    network: Any = contextlib.nullcontext(network_of(lesson))
    if job["processes"] == 1 and not job["resume_at"]:
        network = traced(network_of(lesson), folder / "trace")
    with network as build:
        give(module, few(lesson), build, lesson)
        result = once()
        if step := job["resume_at"]:
            path = folder / lesson / side / "checkpoints" / f"step_{step:08d}.ckpt"
            if not path.is_file():
                raise Unfit(f"it left no checkpoint of step {step}, {path.name}, to resume from")
            result = once(ckpt_path=path)
    if result and not (result["train_loss"] and result["fingerprints"]["start"]):
        raise Unfit("it came to its end without an optimizer's step: nothing was trained")
    return result


def load(script: Path, side: str, lesson: str, printed: list[str]) -> ModuleType:
    """Run a file as a module of a lesson, and note what it prints."""
    source = script.read_text(encoding="utf-8-sig")
    if side == "plain" and (found := _imported(source) & LIBRARIES):
        raise Unfit(f"it imports {found.pop()}; this exercise is of the plain side, by hand")

    def note(*values: Any, sep: str | None = " ", end: str | None = "\n", **_: Any) -> None:
        text = io.StringIO()
        print(*values, sep=sep, end=end, file=text)
        if len(printed) <= MOST:  # one more, to tell that there were
            printed.extend(text.getvalue().splitlines())

    return as_module(source, script, side, lesson, print=note)


def _imported(source: str) -> set[str]:
    """Return the packages that a text imports; none where Python cannot read it."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def _watch_fit(side: str, lesson: str) -> list[bool]:
    """Return a list that tells whether the Trainer's fit was called; [] where that is no matter."""
    if side != "lightning" or lesson == "fabric":
        return []
    trainer = sys.modules["lightning"].Trainer  # which the lesson has imported
    fitted, usual = [False], trainer.fit

    @functools.wraps(usual)
    def fit(*args: Any, **kwargs: Any) -> Any:
        fitted[0] = True
        return usual(*args, **kwargs)

    trainer.fit = fit
    return fitted


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp where the block is when its time is over, and again each second after it."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def say(error: BaseException, script: Path, seconds: float) -> str:
    """Say in one sentence why a file broke off, and in which of its lines."""
    if isinstance(error, SyntaxError) and error.filename == str(script):
        text = (error.text or "").strip()
        shown = f": `{text}`" if text else ""
        return f"Python cannot read line {error.lineno}{shown} ({error.msg})"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno or 0 for f in reversed(frames) if f.filename == str(script)), 0)
    text = linecache.getline(str(script), line).strip()
    where = f" in line {line}, `{text}`" if line else ""
    if isinstance(error, NotImplementedError) and text.startswith("raise NotImplementedError"):
        return f"line {line} is yet to be written: {error}"
    if isinstance(error, TimeIsUp):
        return f"it was still at work after {seconds:g} seconds{where}; does it ever end?"
    if isinstance(error, SystemExit):
        return f"it ends Python{where}; make check needs main to return"
    if isinstance(error, Unfit | BadInput):
        return f"{error}".rstrip(".")
    said = " ".join(f"{error}".split())
    said = said if len(said) < 300 else f"{said[:300]} ..."
    return f"{type(error).__name__}{where}" + (f": {said}" if said else "")


def main(path: Path) -> None:
    """Do the job of a file; what came of it lies beside it, under the same name."""
    job = json.loads(path.read_text())
    os.chdir(job["folder"])
    keep_quiet()
    torch.set_num_threads(1)
    load_lesson(job["side"], job["lesson"])  # all that it imports, before the time counts
    path.with_suffix(".begun").touch()
    found = json.dumps(grade(job))
    write_whole(path.with_suffix(".found"), lambda half: half.write_text(found, encoding="utf-8"))
    # A thread or a process that the file has left behind would keep this one.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
