"""Says why two sides of a lesson differ, and draws both.

`explain` trains both sides once more, each in a process of its own, up to the first step that
differs, traces the steps around it, and lets the doctor name the cause.
"""

from common import SIDES, figures, script_of
from common.folders import write_whole
from common.messages import clear_messages
from common.proof.evidence import observed
from common.proof.lessons import load
from common.run import parse

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import samebits
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Stages that some step differs in, or what comes before it.
TRACED = ("data", "start", "steps", "weights", "optimizer", "random")


def explain(args: Any, argv: list[str], stage: str, losses: list[list[Any]]) -> str:
    """Return what the doctor says of two sides that differ first in this stage.

    `losses` are those of each side, batch by batch.
    """
    if stage not in TRACED:
        return "Both trained alike: look at how each side counts and averages."
    if getattr(args, "devices", 1) > 1:
        return "Trace one process of each side to hear why: docs/doctor.md."
    pairs = zip(*losses, strict=False)
    same = next((n for n, (x, y) in enumerate(pairs) if x != y), min(map(len, losses)))
    # At least so many steps came before: the last group of an epoch may be smaller.
    before = same // getattr(args, "accumulate_grad_batches", 1)
    first, last = max(1, before - 1), before + 2 + args.max_epochs
    print(f"Training both sides once more, to trace the steps from {first:,} on.", flush=True)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        traces = [Path(folder, f"{side}.trace") for side in SIDES]
        for side, path in zip(SIDES, traces, strict=True):
            command = [sys.executable, "-m", "common.proof.explain", side, args.lesson, str(path)]
            command += [f"{first}", f"{last}", *argv, "--runs-dir", folder]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                said = (ended.stderr.splitlines() or ["nothing"])[-1]
                return f"The {side} side could not be traced; its last words were: {said}"
        return f"A is plain, B is lightning.\n{samebits.compare(*traces)}"


class Enough(Exception):
    """Ends a training whose steps of interest are recorded."""


def trace(side: str, lesson: str, path: Path, first: int, last: int, argv: list[str]) -> None:
    """Train one side of a lesson up to a step, and trace it from another one on."""
    module = load(side, lesson)
    args = parse(module.Args, script_of(side, lesson), argv)
    torch.set_num_threads(args.threads)
    steps = range(first, last + 1)  # few, so each is recorded in full
    traces: list[samebits.Trace] = []
    inside: list[nn.Module] = []

    def observer(usual: Any) -> Any:
        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # The outermost module that has parameters takes the batch. What is tried out before
            # the training, for a summary, is another one: its trace is overwritten.
            is_new = not traces or network is not traces[0].model
            if not inside and is_new and torch.is_grad_enabled() and _parameters(network):
                close()
                traces.append(
                    samebits.Trace(network, path=path, first=first, full=steps).__enter__()
                )
            inside.append(network)
            try:
                return usual(network, *args, **kwargs)
            finally:
                inside.pop()

        return call

    def close() -> None:
        while traces:
            traces.pop().__exit__(None, None, None)

    def count(*_: Any) -> None:
        if traces and traces[0].steps >= last:
            raise Enough

    with observed(nn.Module, "__call__", observer):
        hook = register_optimizer_step_post_hook(count)
        try:
            module.main(args)
        except Enough:
            pass
        finally:
            hook.remove()
            close()


def _parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def draw(losses: list[list[Any]], title: str, path: Path) -> None:
    """Draw the losses of both sides over each other, and below them their difference, bit by bit.

    A picture of nothing but zeros is the point: so the differences are drawn on a scale on which
    the last bit of a loss of 1, 1.2e-7, can be seen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    draw_losses(figure, losses, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda half: figure.savefig(half, dpi=110))


def draw_losses(figure: Any, losses: list[list[Any]], title: str) -> None:
    """Draw the two panels of `draw` into a figure, or into a part of one."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    ours, theirs = ([math.nan if x is None else x for x in side] for side in losses)
    # The losses of single batches are a wall; their differences, below, are of every batch.
    window = max(1, len(ours) // 100)
    wide: dict[str, Any] = {"color": figures.BLUE, "linewidth": 4, "alpha": 0.4}
    thin: dict[str, Any] = {"color": figures.ORANGE, "linewidth": 1.2, "linestyle": "--"}
    for side, style, name in zip((ours, theirs), (wide, thin), figures.SIDES.values(), strict=True):
        means = torch.tensor(side).unfold(0, min(window, len(side)), 1).mean(1).tolist()
        above.plot(range(window, window + len(means)), means, label=name, **style)
    label = "training loss" + (f",\nmean of {window:,} batches" if window > 1 else "")
    above.set(title=title, ylabel=label, ylim=(0, None))
    above.legend()
    differences = [x - y for x, y in zip(ours, theirs, strict=False)]
    below.plot(range(1, len(differences) + 1), differences, color="black", linewidth=1)
    largest = max((abs(x) for x in differences if not math.isnan(x)), default=0.0)
    reach = max(1.2 * largest, 5e-7)
    below.set(xlabel="batch", ylabel="plain - Lightning", ylim=(-reach, reach))
    text = "0 in every step" if largest == 0 else f"at most {largest:.1e}"
    below.set_title(f"Their difference: {text}", fontsize=10)


if __name__ == "__main__":
    with clear_messages(failed=2):
        side, lesson, path, first, last, *argv = sys.argv[1:]
        trace(side, lesson, Path(path), int(first), int(last), argv)
