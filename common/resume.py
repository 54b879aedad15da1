"""From which checkpoint a run is resumed, and how it is stopped in order, for both sides."""

from common import checkpoints, signals
from common.folders import EVIDENCE, start_folder
from common.messages import BadInput, Stopped, notice, printable

import contextlib
import os
import random
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

KEPT = 3  # checkpoints from which a run can be resumed, beside the best one
# What every such checkpoint holds, and of which kind it is.
PARTS = {
    "epoch": int, "global_step": int, "state_dict": dict, "optimizer_states": list,
    "lr_schedulers": list, "random": dict,
}  # fmt: skip
# Settings that may change when a run is resumed: the numbers stay those of the run that was never
# stopped. `data` is checked where the images are loaded, and the classes follow from it.
FREE = ("limit_test_batches", "accelerator", "data", "classes")


def begin(
    args: Any,
    free: tuple[str, ...] = (),
    best_too: bool = True,
    parts: dict[str, type] = PARTS,
) -> None:
    """Find the checkpoint that args.ckpt_path names, check it, and note it in `args`.

    It is last, best, or a file's name; args.ckpt_path becomes its path, and args.begun_at its step.
    Where the last one is damaged, the one before it is taken, with a notice. Where there is none
    yet, the run begins at the start, as with the Trainer, so that a job can always ask for the last
    one. Beside those in FREE, the settings in `free` may change. `best_too`: the best checkpoint is
    needed beside it, once an epoch was validated. `parts` are what it must hold.

    Nothing is written here: args.folder does that, once the weights were loaded. Raises BadInput
    where the checkpoint is missing, damaged, of another lesson, or was made with other settings.
    """
    folder = args.runs_dir / args.lesson / args.side
    own, which = folder / "checkpoints", str(args.ckpt_path)
    path = last(own) if which == "last" else own / "best.ckpt" if which == "best" else Path(which)
    args.ckpt_path = path
    if path is None:
        return
    content = _checked(path, args, free, parts)
    source = path.resolve().parent.parent
    previous = folder.with_name(f"{args.side}.previous").resolve()
    if source != folder.resolve() and folder.exists() and previous in path.resolve().parents:
        raise BadInput(
            f"'{path}' is in a folder that makes room for the run in '{folder}' when a new one "
            "begins there; copy the folder elsewhere, and name the file in the copy."
        )
    args.begun_at = content["global_step"]
    _check_parts(path, content, source / EVIDENCE)
    args.rows_before = rows_before(args, source / EVIDENCE, content)
    if best_too and any("val_loss" in row for row in args.rows_before):
        best = path.with_name("best.ckpt")
        _check_parts(best, _checked(best, args, free, parts), source / EVIDENCE)
    # The same images as then: auto must not fall back to others.
    then = content["hyper_parameters"]["data"]
    if args.data not in ("auto", then):
        raise BadInput(
            f"the checkpoint '{path}' was made with --data {then}, not {args.data}; leave out "
            "--data, or leave out --ckpt-path to begin at the start."
        )
    args.data = then
    print(printable(f"Resuming from {path}, after step {args.begun_at:,}."))


def make_ready(args: Any, folder: Path) -> None:
    """Make the folder ready for the rest of the run: what came after the checkpoint is cut off.

    A checkpoint from elsewhere begins a new run in the folder: it is copied there, and so is what
    lies beside it, the best checkpoint and the evidence.
    """
    source = args.ckpt_path.resolve().parent.parent
    elsewhere = source != folder.resolve()
    start_folder(folder, resumed=not elsewhere)
    if elsewhere:
        own = folder / "checkpoints"
        own.mkdir(exist_ok=True)
        for path in (*source.glob("evidence*.jsonl"), *source.glob("checkpoints/best.ckpt")):
            shutil.copyfile(path, folder / path.relative_to(source))
        shutil.copyfile(args.ckpt_path, own / f"step_{args.begun_at:08d}.ckpt")


def rows_before(args: Any, evidence: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv before the step args.begun_at, as the evidence has them.

    `content` is the checkpoint's. Raises BadInput where the evidence does not reach it, or lacks
    something of the steps before.
    """
    from common.proof.evidence_file import check, check_rows, read  # which no lesson needs

    lines, found = read(evidence, args.begun_at), dict[Any, dict[str, Any]]()
    groups = [group for each in content["optimizer_states"] for group in each["param_groups"]]
    check(lines, evidence, args, sum(len(group["params"]) for group in groups))
    for row in [row for line in lines for row in line["rows"]]:
        if row["step"] < args.begun_at:
            found.setdefault((row["step"], *sorted(row)), row)  # each once
    rows, last_step = list(found.values()), args.begun_at - 1
    due = args.begun_at % args.log_every_n_steps == 0
    there = any(row["step"] == last_step and "train_loss" in row for row in rows)
    # The Trainer writes the checkpoint of a step before its row. (In 16-mixed the loss was seen
    # scaled up: then the row stays out.)
    if due and not there and getattr(args, "precision", "") != "16-mixed":
        row = {"epoch": content["epoch"], "step": last_step, "train_loss": lines[-1]["losses"][-1]}
        after = next((n for n, r in enumerate(rows) if r["step"] >= last_step), len(rows))
        rows.insert(after, row)
    check_rows(rows, evidence, content["epoch"], args)
    return rows


def _check_parts(path: Path, content: dict[str, Any], evidence: Path) -> None:
    """Raise BadInput unless a checkpoint has all parts with which its run wrote it."""
    from common.proof.evidence_file import form, read

    same = False
    with contextlib.suppress(TypeError, RecursionError):  # whatever its parts may be
        same = form(content) in read(evidence, content["global_step"])[-1]["forms"]
    if not same:
        raise BadInput(
            f"the checkpoint '{path}' lacks a part with which it was written, or has another one; "
            "name another file, or leave out --ckpt-path to begin at the start."
        )


def last(folder: Path) -> Path | None:
    """Return the last checkpoint that can be read; None, with a notice, where there is none yet.

    Raises BadInput where there are some, and none can be read.
    """
    paths = sorted(folder.glob("step_*.ckpt"), reverse=True)
    for path in paths:
        try:
            checkpoints.read(path)
        except BadInput as error:
            notice(f"{error}".partition(";")[0], "The one before it is taken.")
            continue
        return path
    if paths:
        raise BadInput(
            f"none of the {len(paths)} checkpoints in '{folder}' can be read; leave out "
            "--ckpt-path to begin at the start."
        )
    notice(f"There is no checkpoint in {folder} yet: this run begins at the start.")
    return None


def _checked(
    path: Path, args: Any, free: tuple[str, ...], parts: dict[str, type]
) -> dict[str, Any]:
    """Return a checkpoint; raise BadInput unless a run with these settings wrote it."""
    if not path.is_file():
        raise BadInput(
            f"there is no file '{path}', which is needed to resume; name a checkpoint of a run of "
            "this lesson, in its folder, or leave out --ckpt-path to begin at the start."
        )
    content = checkpoints.read(path)
    settings = {k: v for k, v in args.settings().items() if k not in (*FREE, *free)}
    if fault := _fault(content, settings, args.side, parts):
        raise BadInput(
            f"the checkpoint '{path}' {fault}, or leave out --ckpt-path to begin at the start."
        )
    return content


def _fault(
    content: dict[str, Any], settings: dict[str, Any], side: str, parts: dict[str, type]
) -> str | None:
    """Say why a run cannot be resumed from a checkpoint, and what to do; None if it can."""
    then, advice = content.get("hyper_parameters"), "name another file"
    if not isinstance(then, dict) or "lesson" not in then:
        return f"holds weights alone, from which no training can be resumed; {advice}"
    if not isinstance(then["lesson"], str) or then["lesson"] != settings["lesson"]:
        return f"is of the lesson {then['lesson']}, not of {settings['lesson']}; {advice}"
    wrote = "lightning" if "pytorch-lightning_version" in content else "plain"
    if wrote != side:
        return f"is of the {wrote} side, and each side resumes its own; {advice}"
    for name, kind in parts.items():
        if type(content.get(name)) not in (kind, OrderedDict):
            return f"lacks {name!r}; {advice}"
    if content["global_step"] < 1 or content["epoch"] < 0 or not isinstance(then.get("data"), str):
        return f"has no step, epoch or data that a run can be resumed from; {advice}"
    for name in sorted(settings):
        if repr(then.get(name)) != repr(settings[name]):  # of whatever kind it is
            return (
                f"was made with {name} {then.get(name)!r}, and now it is {settings.get(name)!r}; "
                "resume with the options of the run that wrote it"
            )
    return None


def random_states() -> dict[str, Any]:
    """Return the states of all random generators, as plain values and tensors."""
    of_numpy: Any = np.random.get_state()
    name, numbers, *rest = of_numpy
    return {
        "python": random.getstate(),
        "numpy": (name, numbers.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the random generators back into the states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def prune(written: Path) -> None:
    """Remove all checkpoints but the best one, the last KEPT, and the one just written."""
    for path in sorted(written.parent.glob("step_*.ckpt"))[:-KEPT]:
        if path != written:
            path.unlink()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, and remove those that need not be kept."""
    checkpoints.save(path, content)
    prune(path)


class Stop:
    """Notices Ctrl-C, SIGTERM and the end of the time, and waits to be asked.

    A signal strikes anywhere, also between the gradients and the optimizer's step, where nothing
    can be saved from which a run can be resumed. So it is only noted here, and the loop asks
    after each step. A second Ctrl-C ends the run at once.
    """

    def __init__(self, max_time: str) -> None:
        days, hours, minutes, seconds = map(int, (max_time or "99:00:00:00").split(":"))
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        self.deadline = time.monotonic() + limit
        self.max_time, self.signal, self.pid = max_time, 0, os.getpid()

    @property
    def asked(self) -> bool:
        return bool(self.signal or (self.max_time and time.monotonic() >= self.deadline))

    def end_if_asked(self, step: int) -> None:
        """Raise Stopped if the run is asked to end; the checkpoint of this step was written."""
        if not self.asked:
            return
        why, status = f"--max-time {self.max_time}", 124
        if self.signal:
            why, status = {2: ("Ctrl-C", 130), 15: ("SIGTERM", 143)}[self.signal]
        raise Stopped(
            f"Stopped by {why} after step {step:,}, which was saved; resume with the same "
            "options and --ckpt-path last.",
            status,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return  # a process that loads images: it is ended by this one
        if self.signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signals.leave)  # at the next one, at once
            raise KeyboardInterrupt
        self.signal = number

    def listen(self) -> list[Any]:
        """Take the two signals; return what took them before."""
        return [signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)]

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take the two signals while the block runs."""
        before = self.listen()
        try:
            yield self
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
