"""Records one `fit` from start to end: each hook of Lightning beside the plain lines of its moment.

`python -m common.proof.hooks`, or `make hooks`, trains both sides of the lesson `cifar` on one
batch, each in a process of its own, and writes the table of docs/hooks.md and its picture. Both
pass the same milestones: a batch is read, the network is called, the weights change. What each side
does up to a milestone stands in one row.
"""

from common import ROOT, SIDES
from common.data import EpochSampler, Images
from common.messages import BadInput, Parser, clear_messages
from common.models import Net
from common.proof.lessons import load
from common.proof.recording import give_few_images, record_elsewhere, save_small
from common.run import ready

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.optim import SGD

PAGE, PICTURE = ROOT / "docs" / "hooks.md", ROOT / "docs" / "hooks" / "fit.png"
BEGIN, END = "<!-- made by make hooks -->", "<!-- end -->"
# What both trainings call, and of which moment it is a sign.
MILESTONES: dict[str, Callable] = {
    "set the order of the epoch": EpochSampler.set_epoch,
    "read a batch": Images.__getitems__,
    "forward pass": Net.forward,
    "backward pass": torch.autograd.backward,
    "change the weights": SGD.step,
    "eval mode": torch.nn.Module.eval,
}
LINES = ("main", "train_epoch", "evaluate", "count", "compute_metrics")  # of plain/cifar.py
BEGINS, ENDS = "device = choose_device(", "test = evaluate("  # the part of main that is a `fit`
SANITY = ["eval mode", "read a batch", "forward pass"]  # Lightning's alone, before the first epoch
# The functions of Lightning's pytorch/trainer/call.py that call a hook, and whose hook it is.
CALLERS = {
    "_call_callback_hooks": None,
    "_call_lightning_datamodule_hook": "datamodule",
    "_call_lightning_module_hook": "lightning_module",
    "_call_strategy_hook": "lightning_module",  # that hands its steps on to the module
}
OF_STRATEGY = ("training_step", "validation_step")  # its other hooks are not for users


class Row(NamedTuple):
    """What one side does up to a milestone, "" at the end: lines of plain/cifar.py, or hooks.

    A hook that the lesson defines itself ends with "*".
    """

    milestone: str
    done: list[str]


@contextlib.contextmanager
def recorded(lesson: ModuleType) -> Iterator[list[Row]]:
    """Record what one side of `cifar` does into the list of rows that it hands out.

    Nothing is replaced: Python itself tells of each call, and of each line of the lesson.
    """
    own = str(lesson.__file__)
    source = Path(own).read_text(encoding="utf-8").splitlines()
    names = {inspect.unwrap(function).__code__: name for name, function in MILESTONES.items()}
    rows, done = list[Row](), list[str]()

    def add(text: str) -> None:
        """Note a line or hook; callbacks, module and strategy have hooks of one name in turn."""
        if done and done[-1].rstrip("*") == text.rstrip("*"):
            text = max(text, done.pop())  # the one with a star
        done.append(text)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        name = names.get(code)
        # The weights change when step returns: Lightning does forward and backward pass within it.
        if name and event == ("return" if name == "change the weights" else "call"):
            rows.append(Row(name, done[:]))
            done.clear()
        elif event == "call" and code.co_filename.endswith("pytorch/trainer/call.py"):
            hook = frame.f_locals.get("hook_name", "")
            if code.co_name in CALLERS and (
                code.co_name != "_call_strategy_hook" or hook in OF_STRATEGY
            ):
                owner = getattr(frame.f_locals["trainer"], CALLERS[code.co_name] or "", None)
                add(hook + "*" * (hook in _defined_in(own, owner)))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != own or frame.f_code.co_name not in LINES:
            return None
        if event == "line":
            add(source[frame.f_lineno - 1].strip())
        return trace

    before = sys.getprofile(), sys.gettrace()
    sys.setprofile(profile)
    sys.settrace(trace if Path(own).parent.name == "plain" else before[1])
    try:
        yield rows
    finally:
        sys.setprofile(before[0])
        sys.settrace(before[1])
        rows.append(Row("", done))


def _defined_in(path: str, owner: object) -> list[str]:
    """Return the names of the methods that an object's class defines in this file."""
    return [
        name
        for each in type(owner).mro()
        for name, value in vars(each).items()
        if inspect.isfunction(value) and value.__code__.co_filename == path
    ]


def fit(side: str, rows: list[Row]) -> list[Row]:
    """Return the rows of `fit` alone: not the summary before it, and not the test after it."""
    if side == "plain":
        first = next(n for n, row in enumerate(rows) if _place(row.done, BEGINS) < len(row.done))
        last = next(n for n, row in enumerate(rows) if _place(row.done, ENDS) < len(row.done))
        begin, end = _place(rows[first].done, BEGINS), _place(rows[last].done, ENDS)
    else:
        first = next(n for n, row in enumerate(rows) if row.done)
        last = next(n for n, row in enumerate(rows) if "teardown" in row.done)
        begin, end = 0, rows[last].done.index("teardown") + 1
    cut = [*rows[first:last], Row("", rows[last].done[:end])]
    return [Row(cut[0].milestone, cut[0].done[begin:]), *cut[1:]]


def _place(done: list[str], text: str) -> int:
    """Return where a line that begins with a text is, or the length of the list."""
    return next((n for n, line in enumerate(done) if line.startswith(text)), len(done))


def beside(plain: list[Row], lightning: list[Row]) -> list[tuple[str, list[str], list[str]]]:
    """Return each moment with what both sides do: the milestone, plain lines, Lightning's hooks.

    Raises BadInput unless Lightning passes the plain side's milestones, after its sanity check.
    """
    ours, theirs = ([row.milestone for row in rows] for rows in (plain, lightning))
    if theirs != SANITY + ours:
        raise BadInput(f"the sides pass other milestones: plain {ours}, lightning {theirs}.")
    extra = len(SANITY)
    before = [(f"sanity check: {row.milestone}", [""], row.done) for row in lightning[:extra]]
    pairs = zip(plain, lightning[extra:], strict=True)
    return before + [(a.milestone or "the end", a.done, b.done) for a, b in pairs]


def record_side(side: str) -> list[Row]:
    """Record one side on drawn images; writes into the current folder."""
    lesson = load(side, "cifar")
    give_few_images(lesson)
    args = lesson.Args(
        batch_size=8, max_epochs=1, limit_train_batches=1, accelerator="cpu", refresh_rate=0
    )
    args = ready(args, ROOT / side / "cifar.py")
    torch.set_num_threads(args.threads)
    with recorded(lesson) as rows:
        lesson.main(args)
    return fit(side, rows)


def table(moments: list[tuple[str, list[str], list[str]]]) -> str:
    """Return the moments as a table in Markdown; what the lesson defines itself is bold."""
    text = "| up to | the lines of plain/cifar.py | the hooks that Lightning calls |\n"
    text += "| --- | --- | --- |\n"
    for milestone, lines, hooks in moments:
        code = [f"`{line}`".replace("|", "\\|") for line in lines if line]
        named = [f"**`{hook[:-1]}`**" if hook.endswith("*") else f"`{hook}`" for hook in hooks]
        text += f"| {milestone} | {'<br>'.join(code)} | {'<br>'.join(named)} |\n"
    return text


def draw(moments: list[tuple[str, list[str], list[str]]]) -> Any:
    """Draw the moments as rows: the milestone, the plain lines, Lightning's hooks."""
    from matplotlib.figure import Figure

    heights = [max(len(lines), len(hooks), 1) + 0.6 for _, lines, hooks in moments]
    total = sum(heights) + 4
    figure = Figure(figsize=(14.5, 0.2 * total))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(total, 0))
    axis.axis("off")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    axis.text(
        50, 1, "One fit from start to end, as recorded", ha="center", va="center", fontsize=15
    )
    detail = f"{packages}; bold: the lesson defines this hook itself"
    axis.text(50, 2.2, detail, ha="center", va="center", fontsize=9)
    for x, title in ((1, "up to"), (17, "plain/cifar.py"), (75, "the hooks that Lightning calls")):
        axis.text(x, 3.4, title, fontsize=12, weight="bold", va="center")
    y = 4.0
    for (milestone, lines, hooks), height in zip(moments, heights, strict=True):
        shade = "#fbe9dd" if milestone.startswith("sanity") else "#e8f1f8"
        axis.barh(y + height / 2, 99, height - 0.15, left=0.5, color=shade)
        axis.text(1, y + 0.35, milestone.replace(": ", ":\n"), fontsize=9, va="top")
        for row, line in enumerate(lines):
            axis.text(17, y + 0.8 + row, line[:86], fontsize=8.5, va="center", family="monospace")
        for row, hook in enumerate(hooks):
            weight = "bold" if hook.endswith("*") else "normal"
            text: dict[str, Any] = {"fontsize": 8.5, "va": "center", "family": "monospace"}
            axis.text(75, y + 0.8 + row, hook.rstrip("*"), weight=weight, **text)
        y += height
    return figure


# From here on: the command.


def main(argv: list[str]) -> None:
    """Record both sides, and write the page's table and its picture.

    Raises BadInput where a side breaks off, or both pass other milestones.
    """
    parser = Parser(prog="common.proof.hooks", description="Record the hooks of one fit.")
    parser.add_argument("--side", choices=SIDES, help="print, as JSON, what this side alone does")
    arguments = parser.parse_args(argv)
    if arguments.side:
        print(json.dumps(record_side(arguments.side)))
        return
    found = (record_elsewhere("common.proof.hooks", side) for side in SIDES)
    moments = beside(*([Row(*row) for row in rows] for rows in found))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(moments)}{END}{rest.partition(END)[2]}", "utf-8")
    save_small(draw(moments), PICTURE, dpi=110)
    called = sum(len(hooks) for _, _, hooks in moments)
    print(f"{PAGE.relative_to(ROOT)}: {len(moments)} moments, {called} calls of hooks.")


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
