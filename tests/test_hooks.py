"""The map of the hooks is what a fit does today, and it sees what changes."""

from common import SIDES
from common.messages import BadInput
from common.proof import hooks
from common.proof.hooks import BEGIN, END, PAGE, SANITY, Row, beside, record_side, table

import sys

import pytest
from helpers import count, load_lesson


def record(side, folder, monkeypatch, *changes):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(hooks, "load", lambda side, lesson: load_lesson(side, lesson, *changes))
    before = sys.getprofile(), sys.gettrace()
    rows = record_side(side)
    assert (sys.getprofile(), sys.gettrace()) == before
    return rows


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return [record(side, tmp_path_factory.mktemp(side), patch) for side in SIDES]


def test_the_page_is_current(sides):
    made = PAGE.read_text().partition(f"{BEGIN}\n")[2].partition(END)[0]
    assert made == table(beside(*sides))
    assert hooks.PICTURE.stat().st_size > 10_000


def test_both_sides_pass_the_same_milestones(sides):
    plain, lightning = sides
    names = [row.milestone for row in plain]
    assert names[:5] == [*list(hooks.MILESTONES)[:5]] and names[-1] == ""
    assert [row.milestone for row in lightning] == SANITY + names
    # Every line of the loop is there, and nothing before or after the fit.
    lines = [line for row in plain for line in row.done]
    assert lines[0] == "device = choose_device(args.accelerator)"
    assert lines[-1] == "for epoch in range(args.max_epochs):"
    for line in ("model.train()", "optimizer.zero_grad()", "loss.backward()", "optimizer.step()"):
        assert lines.count(line) == 1
        count("plain lines in the map")
    called = [hook for row in lightning for hook in row.done]
    assert called[0] == "configure_callbacks" and called[-1] == "teardown" and len(called) >= 50
    own = {hook for hook in called if hook.endswith("*")}
    assert own == {"configure_optimizers*", "val_dataloader*", "train_dataloader*",
                   "training_step*", "validation_step*"}  # fmt: skip


def test_a_hook_that_the_lesson_defines_is_seen(sides, tmp_path, monkeypatch):
    more = "    def on_train_epoch_start(self):\n        pass\n\n    def validation_step("
    rows = record("lightning", tmp_path, monkeypatch, ("    def validation_step(", more))
    read = next(row for row in rows[len(SANITY) :] if row.milestone == "read a batch")
    assert read.done == ["on_train_epoch_start*"]


def test_other_milestones_are_refused(sides, tmp_path, monkeypatch):
    twice = ("        optimizer.step()\n", "        optimizer.step()\n        optimizer.step()\n")
    rows = record("plain", tmp_path, monkeypatch, twice)
    with pytest.raises(BadInput, match="the sides pass other milestones"):
        beside(rows, sides[1])
    with pytest.raises(BadInput):
        beside([Row("", [])], [Row("", [])])
