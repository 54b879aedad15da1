"""Which checkpoint to carry on from, and how a run is stopped in order, for both sides."""

from common import checkpoints
from common.messages import BadInput, Stopped, notice
from common.options import Options
from common.runs import run_folder, start_folder, versions

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = 3  # checkpoints that can be carried on from, beside the best one
LAYOUT = 1  # of what the lesson adds to a checkpoint under "run"
PARTS = {
    "optimizer_states": list,
    "lr_schedulers": list,
    "random": dict,
    "losses": Tensor,
    "order": dict,
    "rows": list,
    "reason": str,
    "versions": dict,
}
# Settings that may change when a run is carried on: the numbers stay those of the run that was
# never stopped, up to where it ends. The classes follow from the data.
FREE = ("max_steps", "num_workers", "limit_test_batches", "accelerator", "classes")


def begin(
    recipe: Any,
    options: Options,
    side: str,
    settings: dict[str, Any],
    free: tuple[str, ...] = (),
    best_too: bool = True,
) -> tuple[Path, Path | None]:
    """Return the run's folder, and the checkpoint to carry on from; None to begin at the start.

    The recipe's `ckpt_path` is "", for the start, last, best, or a file's name. Where the last one
    is damaged, the one before it is taken, with a notice; where there is none yet, the run begins
    at the start, as with the Trainer, so that a job can always ask for the last one. A file from
    elsewhere begins a new run in the folder, and brings the best checkpoint beside it along, unless
    the lesson keeps none (`best_too`). Beside those in FREE, the settings in `free` may change.

    Raises BadInput where the checkpoint is missing, damaged, of another lesson, of an older layout,
    was made with other settings, or is past --max-steps.
    """
    which, folder = recipe.ckpt_path, run_folder(options, recipe.lesson, side)
    own = folder / "checkpoints"
    settings = {name: value for name, value in settings.items() if name not in (*FREE, *free)}
    if which == "last":
        path = _last(own)
    else:
        path = {"": None, "best": own / "best.ckpt"}.get(which, Path(which))
    if path is None:
        return start_folder(options, recipe.lesson, side), None
    content = _checked(path, settings)
    if -1 != options.max_steps < content["global_step"]:
        raise BadInput(
            f"the checkpoint '{path}' is after step {content['global_step']:,}, and --max-steps is "
            f"{options.max_steps:,}; leave out one of the two."
        )
    best = None
    if best_too and any("val_loss" in row for row in content["run"]["rows"]):
        best = _checked(path.with_name("best.ckpt"), settings)
    _tell_versions(path, content)
    for half in own.glob(".*.ckpt"):  # what a kill left while it was written
        half.unlink()
    if path.resolve().parent == own.resolve():
        return start_folder(options, recipe.lesson, side, carry_on=True), path
    previous = folder.with_name(f"{side}.previous").resolve()
    if folder.exists() and previous in path.resolve().parents:
        raise BadInput(
            f"'{path}' is in a folder that makes room for the run in '{folder}' when a new one "
            "begins there; copy the folder elsewhere, and name the file in the copy."
        )
    start_folder(options, recipe.lesson, side)
    if best:
        checkpoints.save(own / "best.ckpt", best)
    return folder, path


def _last(folder: Path) -> Path | None:
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


def _checked(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint; raise BadInput unless a run with these settings wrote it."""
    if not path.is_file():
        raise BadInput(
            f"there is no file '{path}', which is needed to carry on; name a checkpoint of a run "
            "of this lesson, in its folder, or leave out --ckpt-path to begin at the start."
        )
    content = checkpoints.read(path)
    if fault := _fault(content, settings):
        raise BadInput(
            f"the checkpoint '{path}' {fault}, or leave out --ckpt-path to begin at the start."
        )
    return content


def _fault(content: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Say why a checkpoint cannot be carried on from, and what to do; None if it can."""
    then, run, advice = content.get("hyper_parameters"), content.get("run"), "name another file"
    if not isinstance(then, dict) or "lesson" not in then:
        return f"holds weights alone, with which no training can be carried on; {advice}"
    if then["lesson"] != settings["lesson"]:
        return f"is of the lesson {then['lesson']}, not of {settings['lesson']}; {advice}"
    if not isinstance(run, dict) or run.get("layout") != LAYOUT:
        layout = run.get("layout") if isinstance(run, dict) else "unknown"
        return f"has the layout {layout}, and {LAYOUT} is what can be carried on; {advice}"
    for name, kind in PARTS.items():
        if not isinstance((content | run).get(name), kind):
            return f"lacks {name!r}; {advice}"
    if run.get("batches", content.get("global_step")) != len(run["losses"]):
        losses = len(run["losses"])
        return f"says step {content.get('global_step')}, but has {losses} losses; {advice}"
    for name in sorted(settings):
        if then.get(name) != settings[name]:
            return (
                f"was made with {name} {then.get(name)!r}, and now it is {settings.get(name)!r}; "
                "carry on with the options of the run that wrote it"
            )
    return None


def _tell_versions(path: Path, content: dict[str, Any]) -> None:
    print(f"Carrying on from {path}, after step {content['global_step']:,}.")
    then, now = content["run"]["versions"], versions()
    for name in now:
        if then.get(name) != now[name]:
            notice(
                f"{path} was written with {name} {then.get(name)}, and here it is {now[name]}:",
                "the numbers may differ in their last digits from those of a run never stopped.",
            )
            break


def made_with() -> dict[str, Any]:
    """Return what tells whether, and how exactly, a checkpoint can be carried on from."""
    return {"layout": LAYOUT, "versions": versions()}


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


def trained_on(
    order: dict[int, list[int]], steps: int, batches: int, batch_size: int
) -> dict[int, Tensor]:
    """Return the samples of each epoch, int32 [samples], that the first `steps` steps trained on.

    `order` is what the sampler handed out; processes that load ahead have had more of it.
    """
    return {
        epoch: torch.tensor(samples[: min(batches, steps - epoch * batches) * batch_size]).int()
        for epoch, samples in order.items()
        if steps > epoch * batches
    }


def fill_in(checkpoint: dict[str, Any], trainer: Any, batches: int) -> None:
    """Give a checkpoint what Lightning's Trainer restores, as far as it is missing or void.

    The plain side writes none of it: the Trainer's counters, as they are when it saves after a
    step, the state of its callbacks, and the module's "model." before the names of the weights.
    ModelCheckpoint's state is also void where the run's folder has moved.
    """
    weights = checkpoints.weights(checkpoint, Path("checkpoint"))
    checkpoint["state_dict"] = {f"model.{name}": weight for name, weight in weights.items()}
    checkpoint["callbacks"] = {}
    if not trainer.training:
        return  # loaded to be tested: the weights are enough, the callbacks know better
    if "loops" not in checkpoint:
        loop = _counters(trainer.fit_loop.state_dict(), checkpoint["global_step"], batches)
        checkpoint["loops"] = {"fit_loop": loop}
    if checkpoint["run"]["reason"] != "not stopped":  # nothing is left to do in that epoch
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
        for done in loop["epoch_progress"].values():
            done |= {"processed": done["ready"], "completed": done["ready"]}
    losses = [row["val_loss"] for row in checkpoint["run"]["rows"] if "val_loss" in row]
    if losses:
        stopping, best = trainer.early_stopping_callback, trainer.checkpoint_callback
        score, path = torch.tensor(min(losses), dtype=torch.float64), f"{best.dirpath}/best.ckpt"
        checkpoint["callbacks"] = {
            stopping.state_key: stopping.state_dict()
            | {"best_score": score, "wait_count": len(losses) - 1 - losses.index(min(losses))},
            best.state_key: best.state_dict()
            | {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}
            | {"best_model_score": score, "kth_value": score},
        }


def _counters(state: dict[str, Any], step: int, batches: int) -> dict[str, Any]:
    """Return the state of a fit loop as it is when the Trainer saves after a step.

    `state` is that of a fit loop which has not begun, `batches` the number in an epoch.
    """
    epoch, ends = (step - 1) // batches, step % batches == 0
    for part, count in (("total", step), ("current", step - epoch * batches)):
        done = {"ready": count, "started": count, "processed": count}
        # Within an epoch it saves before it counts the batch as completed.
        done["completed"] = count if ends else count - 1
        state["epoch_loop.batch_progress"] |= {part: done, "is_last_batch": ends}
        begun = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
        state["epoch_progress"][part] = begun
        optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        optimizer["step"][part] = {"ready": count, "completed": count}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    return state


def prune(written: Path) -> None:
    """Remove all checkpoints but the best one, the last KEPT, and the one just written."""
    for path in sorted(written.parent.glob("step_*.ckpt"))[:-KEPT]:
        if path != written:
            path.unlink()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, and remove those that need not be kept."""
    checkpoints.save(path, content)
    prune(path)


def best_epoch(folder: Path, val: list[dict[str, float]]) -> int | None:
    """Return the epoch of a run's best checkpoint, None where no epoch was validated.

    Raises BadInput where best.ckpt is of another epoch: whoever carries on from an older checkpoint
    than the last one, and ends before the best epoch comes again, has only that of the future.
    """
    if not val:
        return None
    losses = [scores["loss"] for scores in val]
    path, best = folder / "checkpoints" / "best.ckpt", losses.index(min(losses))
    epoch = checkpoints.read(path)["epoch"]
    if epoch != best:
        raise BadInput(
            f"the checkpoint '{path}' is of epoch {epoch}, and the best one of this run is {best}: "
            "it was carried on from an older checkpoint, and ends too early; leave out --max-steps."
        )
    return best


class Stop:
    """Notices Ctrl-C, SIGTERM and the end of the time, and waits to be asked.

    A signal strikes anywhere, also between the gradients and the optimizer's step, where nothing
    can be saved that a run can be carried on from. So it is only noted here, and the loop asks
    after each step. A second Ctrl-C ends the run at once.
    """

    def __init__(self, max_time: str) -> None:
        days, hours, minutes, seconds = map(int, (max_time or "99:00:00:00").split(":"))
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        self.deadline = time.monotonic() + limit
        self.max_time, self.signal = max_time, 0

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
            f"Stopped by {why} after step {step:,}, which was saved; carry on with the same "
            "options and --ckpt-path last.",
            status,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT:
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
