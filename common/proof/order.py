"""Record in which order both sides of the lesson `optimize` call what makes up a step.

`python -m common.proof.order [--picture FILE]` trains each side for four batches, which are two
optimizer steps, in a process of its own: in single precision, in bfloat16 and in float16. It prints
both orders of the last step, and whether all are equal. Exit status 0: they are; 1: they differ; 2:
a side could not be recorded.

On a CPU the Trainer takes bfloat16 where float16 is asked for, and that needs no scaler. To record
the scaler on any machine, lightning/optimize.py then runs with one line replaced: `WITH_SCALER`.
"""

from common import ROOT, SIDES
from common.data import EpochSampler
from common.messages import BadInput, Parser, clear_messages
from common.models import NormNet
from common.proof.lessons import load
from common.proof.recording import give_few_images, record_elsewhere, save_small
from common.run import ready

import contextlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import AveragedModel

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the last one, with most calls, is drawn
WITH_SCALER = (
    "precision=args.precision,",
    'plugins=[L.pytorch.plugins.MixedPrecision("16-mixed", "cpu")],',
)
SCHEDULES = (LRScheduler.step, SequentialLR.step, ReduceLROnPlateau.step)
# What is recorded: what it does, its kind, how it is written, and the functions that do it.
WATCHED: dict[str, tuple[str, str, tuple[Callable, ...]]] = {
    "begin the epoch": ("", "", (EpochSampler.set_epoch,)),
    "autocast on": ("forward", "with torch.autocast(...):", (torch.autocast.__enter__,)),
    "forward pass": ("forward", "model(images)", ()),  # that of the lesson's network
    "compute the loss": ("forward", "F.cross_entropy(...)", (F.cross_entropy,)),
    "autocast off": ("forward", "(its block ends)", (torch.autocast.__exit__,)),
    "clear the gradients": ("backward", "optimizer.zero_grad()", (Optimizer.zero_grad,)),
    "scale the loss up": ("scaler", "scaler.scale(loss)", (GradScaler.scale,)),
    "backward pass": ("backward", "loss.backward()", (torch.autograd.backward,)),
    "scale gradients down": ("scaler", "scaler.unscale_(optimizer)", (GradScaler.unscale_,)),
    "measure gradients": ("clipping", "get_total_norm(...)", (get_total_norm,)),
    "clip their norm": ("clipping", "clip_grad_norm_(...)", (clip_grad_norm_,)),
    "clip their values": ("clipping", "clip_grad_value_(...)", (clip_grad_value_,)),
    "update if all is finite": ("scaler", "scaler.step(optimizer)", (GradScaler.step,)),
    "update the weights": ("update", "optimizer.step()", (SGD.step, Adam.step)),
    "adjust the scale": ("scaler", "scaler.update()", (GradScaler.update,)),
    "move the schedule on": ("schedule", "scheduler.step()", SCHEDULES),
    "update the average": ("average", "", ()),  # that of each side
}
AVERAGES = {"plain": "update_average(...)", "lightning": "average.update_parameters(...)"}
KINDS = "forward backward scaler clipping update schedule average".split()
COLORS = "#cfe2f3 #f9dfc0 #e2d5f0 #f6cfcf #cfe8cf #fbf1bf #cdeae8".split()


class Call(NamedTuple):
    """One recorded call: what it does, and the function of a lesson or of Lightning it is in."""

    name: str
    caller: str


@contextlib.contextmanager
def recorded(lesson: ModuleType, model: type[torch.nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of one side of the lesson, in order, into the list that it hands out.

    Nothing is replaced: Python tells a profile function of each call, and a function is known by
    its code, under whatever name a module has imported it.
    """
    average = getattr(lesson, "update_average", AveragedModel.update_parameters)
    names = {_code(model.forward): "forward pass", _code(average): "update the average"}
    for name, (_, _, functions) in WATCHED.items():
        names |= {_code(function): name for function in functions}
    calls: list[Call] = []
    inside: list[str] = []  # the kinds of the watched functions that have not returned yet

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or frame.f_code not in names:
            return
        name = names[frame.f_code]
        kind = WATCHED[name][0]
        if event == "return":
            inside.pop()
        # Clipping measures too, and a sequence of schedules moves one of its own on.
        part = kind in ("clipping", "schedule") and kind in inside
        if event == "call":
            inside.append(kind)
        # The weights change just before step returns. What Lightning does in between, forward and
        # backward pass and clipping, it hands to step as a closure, which PyTorch's run first.
        if part or event != ("return" if name == "update the weights" else "call"):
            return
        # Without mixed precision, the plain side has autocast and scaler too, switched off.
        if not getattr(frame.f_locals.get("self"), "_enabled", True):
            return
        if kind == "forward" and not torch.is_grad_enabled():
            return  # validation and test
        if name == "autocast off" and calls[-1].name == "autocast on":
            calls.pop()  # around a validation
        else:
            calls.append(Call(name, _caller(frame)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _code(function: Any) -> CodeType:
    """Return the code of a function, without the decorators around it."""
    return inspect.unwrap(function).__code__


def _caller(frame: FrameType) -> str:
    """Name the nearest function around a call that is not PyTorch's own."""
    outer: Any = frame.f_back
    while outer.f_code.co_filename.startswith(str(Path(torch.__file__).parent)):
        outer = outer.f_back
    own = Path(outer.f_code.co_filename).parent.parent == ROOT
    return ("" if own else "Lightning's ") + outer.f_code.co_qualname


def settings(lesson: ModuleType, side: str, precision: str) -> Any:
    """Return the Args of what is recorded: two steps, of which the second is logged."""
    few: dict[str, Any] = {"limit_train_batches": 4, "limit_val_batches": 1}
    few |= {"limit_test_batches": 1, "log_every_n_steps": 2, "refresh_rate": 0}
    args = lesson.Args(batch_size=8, max_epochs=1, accelerator="cpu", **few)
    args = ready(args, ROOT / side / "optimize.py")
    args.precision = precision  # now: for 16-mixed on the CPU `ready` would refuse it
    return args


def record(lesson: ModuleType, args: Any) -> list[Call]:
    """Run one side of the lesson for one epoch and return the calls of all its steps, in order."""
    torch.set_num_threads(args.threads)
    with recorded(lesson, NormNet) as calls:
        lesson.main(args)
    return calls[1 + [call.name for call in calls].index("begin the epoch") :]


def last_step(calls: list[Call]) -> list[Call]:
    """Return the calls of the last step: those after the step before has updated the average."""
    ends = [n for n, call in enumerate(calls, start=1) if call.name == "update the average"]
    before, end = [0, 0, *ends][-2:]
    return calls[before:end]


def difference(plain: list[Call], lightning: list[Call]) -> str | None:
    """Say which call is the first that differs, None where both sides call the same."""
    for number, pair in enumerate(itertools.zip_longest(plain, lightning), start=1):
        ours, theirs = (f"'{call.name}'" if call else "nothing more" for call in pair)
        if ours != theirs:
            return f"call {number}: plain {ours}, lightning {theirs}"
    return None if plain else "no call was recorded"


def draw(plain: list[Call], lightning: list[Call]) -> Figure:
    """Draw both orders side by side, a box for each call; what differs has a red frame."""
    rows = list(itertools.zip_longest(plain, lightning))
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1.4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(len(rows) + 1.3, -2.2))
    axis.axis("off")
    heading = "The calls of one optimizer step, in order, as recorded"
    axis.text(50, -1.65, heading, ha="center", fontsize=13)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    detail = f"two batches in 16-mixed on the CPU; {packages}; grey: in Lightning's own code"
    axis.text(50, -1.05, detail, ha="center", fontsize=9)
    # A batch ends with its backward pass, the last one with the step.
    ends = [n for n, call in enumerate(plain, start=1) if call.name == "backward pass"]
    for batch, (start, end) in enumerate(itertools.pairwise([0, *ends[:-1], len(rows)]), start=1):
        axis.text(1.5, (start + end) / 2, f"batch {batch}", rotation=90, va="center", ha="center")
        axis.axhline(start, color="black", linewidth=0.8)
    text: dict[str, Any] = {"va": "center", "fontsize": 9.5}
    for column, (side, left) in enumerate(zip(SIDES, (6, 53.5), strict=True)):
        axis.text(left, -0.25, side, fontsize=12, weight="bold")
        for row, pair in enumerate(rows):
            axis.text(5, row + 0.5, f"{row + 1}", ha="right", **text)
            if call := pair[column]:
                kind, code, _ = WATCHED[call.name]
                edge = "red" if difference(*([c] if c else [] for c in pair)) else "dimgray"
                color = COLORS[KINDS.index(kind)]
                axis.barh(row + 0.5, 46, 0.86, left=left, color=color, edgecolor=edge)
                axis.text(left + 0.7, row + 0.33, call.name, **text)
                code = code or AVERAGES[side]
                axis.text(left + 45.5, row + 0.33, code, ha="right", family="monospace", **text)
                ink = "dimgray" if call.caller.startswith("Lightning's") else "black"
                inside = text | {"fontsize": 8, "color": ink}
                axis.text(left + 0.7, row + 0.7, f"in {call.caller}", **inside)
    for place, (kind, color) in enumerate(zip(KINDS, COLORS, strict=True)):
        box = {"facecolor": color, "edgecolor": "dimgray"}
        axis.text(12 + 13 * place, len(rows) + 0.7, kind, ha="center", fontsize=9, bbox=box)
    return figure


# From here on: the command.


def record_side(side: str) -> dict[str, list[Call]]:
    """Record one side in each precision, on drawn images; writes into the current folder.

    For a process of its own, that ends then: both sides have modules of the same names.
    """
    found = {}
    for precision in PRECISIONS:
        scaled = side == "lightning" and precision == "16-mixed"
        lesson = load(side, "optimize", *([WITH_SCALER] if scaled else []))
        give_few_images(lesson)
        found[precision] = record(lesson, settings(lesson, side, precision))
    return found


def recorded_side(side: str) -> dict[str, list[Call]]:
    """Return what `record_side` does, from a process and a folder of its own."""
    found = record_elsewhere("common.proof.order", side)
    return {precision: [Call(*call) for call in calls] for precision, calls in found.items()}


def main(argv: list[str]) -> int:
    """Record both sides, print and draw the last step; return the exit status.

    Raises BadInput where a side breaks off, or the picture has another format.
    """
    parser = Parser(
        prog="common.proof.order", description="Record the order of a step on both sides."
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a .png file to draw it into")
    parser.add_argument("--side", choices=SIDES, help="print, as JSON, what this side alone calls")
    arguments = parser.parse_args(argv)
    if arguments.side:
        print(json.dumps(record_side(arguments.side)))
        return 0
    if arguments.picture and arguments.picture.suffix != ".png":
        raise BadInput(f"--picture '{arguments.picture}' must end with .png.")
    found = [recorded_side(side) for side in SIDES]
    drawn = [last_step(calls[PRECISIONS[-1]]) for calls in found]
    table = Table("", *SIDES, title="the calls of one step, 16-mixed", title_justify="left")
    for number, pair in enumerate(itertools.zip_longest(*drawn), start=1):
        table.add_row(f"{number}", *(call.name if call else "" for call in pair))
    Console().print(table)
    if arguments.picture:
        save_small(draw(*drawn), arguments.picture, dpi=150)
    status = 0
    for precision in PRECISIONS:
        first = difference(*(calls[precision] for calls in found))
        status = 1 if first else status
        equal = f"equal, {len(found[0][precision])} calls in two steps"
        print(f"{precision}: {f'DIFFERENT, first in {first}' if first else equal}.")
    return status


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
