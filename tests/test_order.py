"""The recorded order of a step: equal on both sides, in every precision, and nothing is changed."""

from common import SIDES
from common.messages import BadInput, clear_messages
from common.models import NormNet
from common.proof import order
from common.proof.evidence import Evidence
from common.proof.order import WITH_SCALER, difference, last_step, record, recorded, settings

import contextlib
import functools
import inspect
import os
import subprocess
import sys

import pytest
import torch
from helpers import count, give, load_lesson, small_data

FORWARD = ["autocast on", "forward pass", "compute the loss", "autocast off"]
BACKWARD = ["scale the loss up", "backward pass"]
# One step of two batches, the second half of it where it is logged.
STEP = [*FORWARD, "clear the gradients", *BACKWARD, *FORWARD, *BACKWARD, "scale gradients down"]
STEP += ["measure gradients", "clip their norm", "update if all is finite"]
STEP += ["update the weights", "adjust the scale", "move the schedule on", "update the average"]
HALF = ("autocast on", "autocast off")
SCALER = (
    "scale the loss up",
    "scale gradients down",
    "update if all is finite",
    "adjust the scale",
)
LEFT_OUT = {"32-true": HALF + SCALER, "bf16-mixed": SCALER, "16-mixed": ()}


def names(calls):
    return [call.name for call in calls]


@functools.cache
def images():
    return small_data(lesson="optimize")


def prepared(side, precision, folder, monkeypatch, *changes):
    """The side's lesson, with few images, and the Args with which it is recorded."""
    if side == "lightning" and precision == "16-mixed":
        changes = (*changes, WITH_SCALER)
    lesson = load_lesson(side, "optimize", *changes)
    give(lesson, images(), NormNet, "optimize", monkeypatch)
    args = settings(lesson, side, precision)
    args.runs_dir = folder
    return lesson, args


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """What each side calls in each precision, recorded once."""
    with pytest.MonkeyPatch.context() as patch:
        return {
            (side, precision): record(
                *prepared(side, precision, tmp_path_factory.mktemp("runs"), patch)
            )
            for side in SIDES
            for precision in LEFT_OUT
        }


@pytest.mark.parametrize("precision", LEFT_OUT)
def test_both_sides_call_the_same_in_the_same_order(orders, precision):
    logged = [name for name in STEP if name not in LEFT_OUT[precision]]
    silent = [name for name in logged if name != "measure gradients"]
    for side in SIDES:
        calls = orders[side, precision]
        assert names(calls) == silent + logged
        assert names(last_step(calls)) == logged
        count("calls of a training recorded, in the expected order", len(calls))
    assert difference(orders["plain", precision], orders["lightning", precision]) is None


def test_who_calls(orders):
    plain, lightning = (last_step(orders[side, "16-mixed"]) for side in SIDES)
    assert {call.caller for call in plain} == {"main"}
    # What the learner still writes, and what the Trainer does.
    own = [call for call in lightning if "Lightning's" not in call.caller]
    assert set(names(own)) == {"forward pass", "compute the loss", "measure gradients"}
    assert ("scale gradients down", "Lightning's MixedPrecision.optimizer_step") in lightning


@pytest.mark.parametrize("side", SIDES)
def test_recording_changes_no_number_and_no_function(side, tmp_path, monkeypatch):
    functions = [f for *_, some in order.WATCHED.values() for f in some]
    places = [(inspect.getmodule(f), f.__qualname__.split(".")) for f in functions]

    def found():
        return [functools.reduce(getattr, path, module) for module, path in places]

    def evidence():
        """Of one training; each with Args of its own, since they begin a folder."""
        lesson, args = prepared(side, "16-mixed", tmp_path, monkeypatch)
        with Evidence() as seen:
            net = lesson.main(args)
        return seen.found(net)

    # Before the comparison: PyTorch itself wraps SGD.step when the first SGD is made.
    unrecorded = evidence()
    lesson, _ = prepared(side, "16-mixed", tmp_path, monkeypatch)
    before = found(), dict(vars(lesson)), sys.getprofile()
    assert len(before[0]) >= 18
    with recorded(lesson, NormNet) as calls:
        assert (found(), dict(vars(lesson))) == before[:2]
        assert sys.getprofile() not in (None, before[2])
    assert (found(), dict(vars(lesson)), sys.getprofile()) == before
    assert calls == []
    lesson.args = settings(lesson, side, "16-mixed")
    lesson.args.runs_dir = tmp_path
    with Evidence() as seen, recorded(lesson, NormNet) as calls:
        net = lesson.main(lesson.args)
    again = seen.found(net)
    assert len(calls) > 40 and again["train_loss"] == unrecorded["train_loss"]
    assert again["fingerprints"] == unrecorded["fingerprints"]
    assert again["fingerprints"]["start"] != again["fingerprints"]["weights"]


def test_an_error_ends_the_recording():
    lesson = load_lesson("plain", "optimize")
    before = sys.getprofile()
    with contextlib.suppress(ZeroDivisionError), recorded(lesson, NormNet):
        assert sys.getprofile() not in (None, before)
        raise ZeroDivisionError
    assert sys.getprofile() == before


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_update_is_recorded_where_the_weights_change(optimizer):
    """Also where the forward and the backward pass are in a closure, as Lightning has them."""
    lesson = load_lesson("plain", "optimize")
    weight = torch.nn.Parameter(torch.ones(1))
    seen = []

    def closure():
        (weight**2).sum().backward()
        seen.append(weight.item())

    with recorded(lesson, NormNet) as calls:
        optimizer([weight], lr=0.1).step(closure)
    assert names(calls) == ["backward pass", "update the weights"]
    assert seen == [1.0] and weight.item() < 1


CLIP = """            if args.gradient_clip_val:
                clips[args.gradient_clip_algorithm](parameters, args.gradient_clip_val)
"""
UNSCALE = "            scaler.unscale_(optimizer)\n"
CLEAR = "            if batch % group == 0:\n                optimizer.zero_grad()\n"
AUTOCAST = "            with autocast:\n                loss ="
BACK = "            scaler.scale(loss * weight / group).backward()\n"
UPDATE = "            scaler.step(optimizer)\n"
MOVE = """            if args.interval == "step" and args.schedule != "plateau":
                schedule.step()
"""
WRONG = {
    "clipped before unscale": (
        [(CLIP, ""), (UNSCALE, CLIP + UNSCALE)],
        "call 14: plain 'clip their norm', lightning 'scale gradients down'",
    ),
    "never unscaled but by the scaler itself": (
        [(UNSCALE, "")],
        "call 14: plain 'clip their norm', lightning 'scale gradients down'",
    ),
    "cleared before forward": (
        [(CLEAR, ""), (AUTOCAST, CLEAR + AUTOCAST)],
        "call 1: plain 'clear the gradients', lightning 'autocast on'",
    ),
    "cleared in each batch": (
        [("if batch % group == 0:", "if True:")],
        "call 12: plain 'clear the gradients', lightning 'scale the loss up'",
    ),
    "backward under autocast": (
        [(BACK, f"            with autocast:\n    {BACK}")],
        "call 6: plain 'autocast on', lightning 'scale the loss up'",
    ),
    "schedule before the update": (
        [(MOVE, ""), (UPDATE, "            schedule.step()\n" + UPDATE)],
        "call 16: plain 'move the schedule on', lightning 'update if all is finite'",
    ),
    "no average": (
        [("if args.ema_decay:\n                update", "if False:\n                update")],
        "call 20: plain 'autocast on', lightning 'update the average'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_order_is_found_and_named(orders, wrong, tmp_path, monkeypatch):
    changes, first = WRONG[wrong]
    calls = record(*prepared("plain", "16-mixed", tmp_path, monkeypatch, *changes))
    assert difference(calls, orders["lightning", "16-mixed"]) == first
    count("changed orders, each told by its first call")


def test_a_wrong_order_of_the_other_side_is_found(orders, tmp_path, monkeypatch):
    hook = "    def on_before_optimizer_step(self, optimizer):\n"
    changed = (hook, hook + "        self.lr_schedulers().step()\n")
    calls = record(*prepared("lightning", "16-mixed", tmp_path, monkeypatch, changed))
    assert difference(orders["plain", "16-mixed"], calls) == (
        "call 15: plain 'clip their norm', lightning 'move the schedule on'"
    )


def test_a_missing_end_and_no_call_at_all_are_differences(orders):
    calls = orders["plain", "32-true"]
    last = f"call {len(calls)}: plain 'update the average', lightning nothing more"
    assert difference(calls, calls[:-1]) == last
    assert difference([], []) == "no call was recorded"
    assert last_step([]) == []


def test_the_picture_shows_both_orders_and_what_differs(orders):
    plain, lightning = (last_step(orders[side, "16-mixed"]) for side in SIDES)

    def red(*both):
        (axis,) = order.draw(*both).axes
        texts = [text.get_text() for text in axis.texts]
        assert all(texts.count(name) >= 2 * STEP.count(name) for name in STEP[:-1])
        assert {"plain", "lightning", "batch 1", "batch 2", f"{len(STEP)}"} <= set(texts)
        assert len(axis.patches) == len(both[0]) + len(both[1])
        return [patch.get_edgecolor()[:3] for patch in axis.patches].count((1, 0, 0))

    assert red(plain, lightning) == 0
    assert red(plain, lightning + lightning[:1]) == 1
    swapped = [*lightning[:14], lightning[15], lightning[14], *lightning[16:]]
    assert red(plain, swapped) == 4


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--picture", "order.gif"], "must end with .png"),
        (["--picture"], "--help"),
        (["--side", "left"], "plain"),
    ],
)
def test_bad_input_is_told_in_one_sentence(wrong, said, capsys):
    with pytest.raises(SystemExit) as ended, clear_messages():
        order.main(wrong)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and said in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.fixture
def found(orders, monkeypatch):
    """The command, with the orders that were recorded already."""
    recordings = {s: {p: orders[s, p] for p in LEFT_OUT} for s in SIDES}
    monkeypatch.setattr(order, "recorded_side", recordings.get)
    return recordings


def test_the_command_says_equal_and_writes_the_picture(found, tmp_path, capsys):
    picture = tmp_path / "new" / "order.png"
    assert order.main(["--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal") == 3 and "16-mixed: equal, 41 calls in two steps." in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["order.png"]


def test_the_command_names_the_first_difference(found, capsys):
    calls = found["lightning"]["bf16-mixed"]
    found["lightning"]["bf16-mixed"] = [calls[1], calls[0], *calls[2:]]
    assert order.main([]) == 1
    printed = capsys.readouterr().out
    first = "call 1: plain 'autocast on', lightning 'forward pass'"
    assert f"bf16-mixed: DIFFERENT, first in {first}." in printed and printed.count("equal") == 2


def test_the_command_says_that_a_side_broke_off(monkeypatch):
    monkeypatch.setattr(order.sys, "executable", "/bin/false")
    with pytest.raises(BadInput, match="the plain side could not be recorded"):
        order.main([])


@pytest.mark.slow
def test_the_whole_command_leaves_nothing_behind(tmp_path):
    picture = tmp_path / "order.png"
    command = [sys.executable, "-m", "common.proof.order", "--picture", str(picture)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("equal") == 3 and picture.exists()
    left = {path.name for path in tmp_path.iterdir() if "torchinductor" not in path.name}
    assert left == {"order.png"}  # beside PyTorch's own cache
