"""Record in which order both sides of the lesson `optimize` call what makes up a step.

`python -m common.order [--picture FILE]` trains each side for four batches, which are two optimizer
steps, in a process of its own: in single precision, in bfloat16 and in float16. It prints both
orders of the last step and whether all are equal. Exit status 0: they are; 1: they differ; 2: a
side could not be recorded.

The Trainer has no float16 on a CPU: it takes bfloat16 instead, which needs no scaler. To record the
scaler on any machine, lightning/optimize.py is run with one line replaced, see `WITH_SCALER`.
"""

from common import ROOT, SIDES, data, shapes
from common.data import PIXELS, Data, EpochSampler, Images
from common.messages import BadInput, Parser, clear_messages
from common.options import Options
from common.recipes import RECIPES

import contextlib
import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
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

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the last one has most calls: it is drawn
WITH_SCALER = (
    "precision=recipe.precision,",
    'plugins=[L.pytorch.plugins.MixedPrecision("16-mixed", "cpu")],',
)
COLORS = {
    "forward": "#cfe2f3",
    "backward": "#f9dfc0",
    "scaler": "#e2d5f0",
    "clipping": "#f6cfcf",
    "update": "#cfe8cf",
    "schedule": "#fbf1bf",
    "average": "#cdeae8",
}
EPOCH, ON, OFF, UPDATE, AVERAGE = (
    "begin the epoch",
    "autocast on",
    "autocast off",
    "update the weights",
    "update the average",
)
# What is recorded: (functions, what it does, its kind, how it is written).
WATCHED: tuple[tuple[tuple[Callable, ...], str, str, str], ...] = (
    ((EpochSampler.set_epoch,), EPOCH, "", ""),
    ((torch.autocast.__enter__,), ON, "forward", "with torch.autocast(...):"),
    ((F.cross_entropy,), "compute the loss", "forward", "F.cross_entropy(...)"),
    ((torch.autocast.__exit__,), OFF, "forward", "end of that block"),
    ((Optimizer.zero_grad,), "clear the gradients", "backward", "optimizer.zero_grad()"),
    ((GradScaler.scale,), "scale the loss up", "scaler", "scaler.scale(loss)"),
    ((torch.autograd.backward,), "backward pass", "backward", "loss.backward()"),
    ((GradScaler.unscale_,), "scale gradients down", "scaler", "scaler.unscale_(optimizer)"),
    ((get_total_norm,), "measure, to log", "clipping", "get_total_norm(...)"),
    ((clip_grad_norm_,), "clip the gradients", "clipping", "clip_grad_norm_(...)"),
    ((clip_grad_value_,), "clip each gradient", "clipping", "clip_grad_value_(...)"),
    ((GradScaler.step,), "update if all is finite", "scaler", "scaler.step(optimizer)"),
    ((SGD.step, Adam.step), UPDATE, "update", "optimizer.step()"),
    ((GradScaler.update,), "adjust the scale", "scaler", "scaler.update()"),
    (
        (LRScheduler.step, SequentialLR.step, ReduceLROnPlateau.step),
        "move the schedule on",
        "schedule",
        "scheduler.step()",
    ),
)
KINDS = {name: kind for _, name, kind, _ in WATCHED} | {"forward pass": "forward", AVERAGE: "average"}
CODE = {name: code for _, name, _, code in WATCHED} | {"forward pass": "model(images)"}
AVERAGES = {"plain": "update_average(...)", "lightning": "average.update_parameters(...)"}


class Call(NamedTuple):
    """One recorded call: what it does, and the function of the lesson or of Lightning it is in."""

    name: str
    caller: str


@contextlib.contextmanager
def recorded(lesson: ModuleType, model: type[torch.nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of one side's lesson, in order, into the list that it hands out.

    Nothing is replaced: Python itself tells a profile function of each call, and a function is
    known by its code, by whatever name a module has imported it.
    """
    average: Callable = getattr(lesson, "update_average", AveragedModel.update_parameters)
    watched = [(function, name) for functions, name, *_ in WATCHED for function in functions]
    watched += [(model.forward, "forward pass"), (average, AVERAGE)]
    names: dict[CodeType, str] = {_code(function): name for function, name in watched}
    calls: list[Call] = []
    inside: list[str] = []  # the kinds of the watched functions that have not returned yet

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or frame.f_code not in names:
            return
        name = names[frame.f_code]
        kind = KINDS[name]
        if event == "return":
            inside.pop()
        # Clipping measures too, and a sequence of schedules moves one of its own on.
        part = kind in ("clipping", "schedule") and kind in inside
        if event == "call":
            inside.append(kind)
        # Where the weights change is where step returns, not where it is called: Lightning hands it
        # the forward and the backward pass, as a closure, which every optimizer runs first.
        if part or event != ("return" if name == UPDATE else "call"):
            return
        # Scaler and autocast stand also in a training in single precision, switched off.
        if not getattr(frame.f_locals.get("self"), "_enabled", True):
            return
        if kind == "forward" and not torch.is_grad_enabled():
            return  # validation and test
        if name == OFF and calls[-1].name == ON:
            calls.pop()  # around a validation: no forward pass of the training
        else:
            calls.append(Call(name, _caller(frame)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _code(function: Callable) -> CodeType:
    """Return the code of a function, without the decorators around it."""
    unwrapped: Any = inspect.unwrap(function)
    return unwrapped.__code__


def _caller(frame: FrameType) -> str:
    """Name the nearest function around a call that is not PyTorch's."""
    outer = frame.f_back
    while outer and outer.f_code.co_filename.startswith(str(Path(torch.__file__).parent)):
        outer = outer.f_back
    assert outer is not None
    path, name = Path(outer.f_code.co_filename), outer.f_code.co_qualname
    return name if path.parent.parent == ROOT else f"Lightning's {name}"


def settings(precision: str) -> tuple[Any, Options]:
    """Return recipe and options of what is recorded: two steps, of which the second is logged."""
    recipe = replace(RECIPES["optimize"], batch_size=8, max_epochs=1, precision=precision)
    limits = {f"limit_{stage}_batches": 1 for stage in ("val", "test")}
    options = Options(accelerator="cpu", limit_train_batches=4, log_every_n_steps=2, **limits)
    return recipe, options


def record(lesson: ModuleType, recipe: Any, options: Options) -> list[Call]:
    """Run one side of the lesson and return the calls of all its steps."""
    with recorded(lesson, recipe.model) as calls:
        lesson.run(recipe, options)
    return calls[1 + [call.name for call in calls].index(EPOCH) :]


def last_step(calls: list[Call]) -> list[Call]:
    """Return the calls of the last optimizer step: after the update of the average before it."""
    ends = [place for place, call in enumerate(calls) if call.name == AVERAGE]
    before, end = [-1, -1, *ends][-2:]
    return calls[before + 1 : end + 1]


def difference(plain: list[Call], lightning: list[Call]) -> str | None:
    """Say which call is the first that differs, None where both sides call the same."""
    for number, (ours, theirs) in enumerate(itertools.zip_longest(plain, lightning), start=1):
        names = [call.name if call else "nothing more" for call in (ours, theirs)]
        if names[0] != names[1]:
            return f"call {number}: plain '{names[0]}', lightning '{names[1]}'"
    return None if plain else "no call was recorded"


def draw(plain: list[Call], lightning: list[Call]) -> Figure:
    """Draw both orders side by side, a box for each call; what differs has a red frame."""
    rows = list(itertools.zip_longest(plain, lightning))
    versions = " and ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1.4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(len(rows) + 1.3, -2.2))
    axis.axis("off")
    heading = "The calls of one optimizer step, in order, as recorded"
    axis.text(50, -1.65, heading, ha="center", fontsize=13)
    detail = f"two batches, precision 16-mixed, on the CPU; {versions}"
    axis.text(50, -1.05, detail, ha="center", fontsize=9)
    # A batch ends with its backward pass, the last one with the step.
    ends = [n for n, call in enumerate(plain, start=1) if call.name == "backward pass"]
    starts = [0, *ends[:-1], len(rows)]
    for batch, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        middle = (start + end) / 2
        axis.text(1.5, middle, f"batch {batch}", rotation=90, va="center", ha="center", fontsize=10)
        axis.axhline(start, color="black", linewidth=0.8)
    for column, (side, left) in enumerate(zip(SIDES, (6, 53.5), strict=True)):
        axis.text(left, -0.25, side, fontsize=12, weight="bold")
        for row, pair in enumerate(rows):
            axis.text(5, row + 0.5, f"{row + 1}", ha="right", va="center", fontsize=10)
            if call := pair[column]:
                equal = pair[0] and pair[1] and pair[0].name == pair[1].name
                edge, color = "dimgray" if equal else "red", COLORS[KINDS[call.name]]
                axis.barh(row + 0.5, 46, 0.84, left=left, color=color, edgecolor=edge)
                code = AVERAGES[side] if call.name == AVERAGE else CODE[call.name]
                text = {"va": "center", "fontsize": 9.5}
                axis.text(left + 0.7, row + 0.31, call.name, **text)
                axis.text(left + 45.5, row + 0.31, code, ha="right", family="monospace", **text)
                inside = f"in {call.caller}"
                axis.text(left + 0.7, row + 0.69, inside, va="center", fontsize=8, color="dimgray")
    for place, (kind, color) in enumerate(COLORS.items()):
        box = {"facecolor": color, "edgecolor": "dimgray"}
        axis.text(12 + 13 * place, len(rows) + 0.7, kind, ha="center", fontsize=9, bbox=box)
    return figure


# From here on: the command.


def load(side: str, *changes: tuple[str, str]) -> ModuleType:
    """Return SIDE/optimize.py as a module, after replacing each old text by a new one.

    Its folder stays on the path: one process loads one side, since both have the same names.
    """
    path = ROOT / side / "optimize.py"
    source = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{path} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    sys.path.insert(0, str(path.parent))
    lesson = ModuleType("optimize")
    exec(compile(source, str(path), "exec"), lesson.__dict__)
    return lesson


def record_side(side: str) -> dict[str, list[Call]]:
    """Record one side in each precision, on a few drawn images; writes into the current folder."""
    images = Images(*shapes.draw_shapes(32, seed=1), PIXELS[RECIPES["optimize"].pixels])
    few = Data("shapes", shapes.CLASSES, images, images, images)
    data.load_data = lambda recipe, options: few  # before the lesson imports it
    calls = {}
    for precision in PRECISIONS:
        changed = side == "lightning" and precision == "16-mixed"
        lesson = load(side, *([WITH_SCALER] if changed else []))
        calls[precision] = record(lesson, *settings(precision))
    return calls


def _record_elsewhere(side: str) -> dict[str, list[Call]]:
    """Return what `record_side` does, from a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="order-") as folder:
        command = [sys.executable, "-m", "common.order", "--side", side]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip() or "nothing").splitlines()[-1]
        raise BadInput(f"the {side} side could not be recorded; its last words were: {said}")
    found = json.loads(ended.stdout.splitlines()[-1])
    return {precision: [Call(*call) for call in calls] for precision, calls in found.items()}


def show(plain: list[Call], lightning: list[Call]) -> None:
    """Print both orders as one table."""
    table = Table(title="one optimizer step of optimize, 16-mixed", title_justify="left")
    table.add_column("", justify="right")
    for side in SIDES:
        table.add_column(side)
        table.add_column("in", style="dim")
    for number, pair in enumerate(itertools.zip_longest(plain, lightning), start=1):
        table.add_row(f"{number}", *(text for call in pair for text in call or ("", "")))
    Console().print(table)


def main(argv: list[str]) -> int:
    """Record both sides, print and draw the last step; return the exit status."""
    parser = Parser(prog="common.order", description="Record the order of a step on both sides.")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it into this .png file")
    parser.add_argument("--side", choices=SIDES, help="record this side alone, and print it as JSON")
    arguments = parser.parse_args(argv)
    if arguments.side:
        print(json.dumps(record_side(arguments.side)))
        return 0
    picture: Path | None = arguments.picture
    if picture and picture.suffix != ".png":
        raise BadInput(f"--picture '{picture}' must end with .png.")
    plain, lightning = (_record_elsewhere(side) for side in SIDES)
    drawn = [last_step(calls[PRECISIONS[-1]]) for calls in (plain, lightning)]
    show(*drawn)
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(*drawn).savefig(picture, dpi=150)
    status = 0
    for precision in PRECISIONS:
        differs = difference(plain[precision], lightning[precision])
        counted = f"{len(plain[precision])} calls in two steps of each side"
        print(f"{precision}: " + (f"DIFFERENT, first in {differs}" if differs else f"{counted}, equal"))
        status = 1 if differs else status
    return status


if __name__ == "__main__":
    with clear_messages():
        sys.exit(main(sys.argv[1:]))
