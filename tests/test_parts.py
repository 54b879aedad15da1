"""What a run is resumed from has all its parts: each one that is missing or altered is refused."""

from common import checkpoints, resume
from common.folders import EVIDENCE
from common.messages import BadInput

import copy
import json
import os
import shutil

import pytest
import torch
from helpers import SIDES, be_alone, count, load_lesson, some, train
from test_resume import Half

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("dataloader is not resumable", "logs directory", "Checkpoint directory")
]
# Validated once, and in the midst of the second epoch.
SETTINGS = dict(lesson="resume", lr=0.05, batch_size=16, max_epochs=3, patience=9,
                checkpoint_every_n_steps=5)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for side in SIDES:
            train(side, folder, monkeypatch, **SETTINGS)
    return folder


@pytest.fixture(params=SIDES)
def half(request, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return Half(request.param, tmp_path / "runs")


def places(content, above=()):
    """Where a checkpoint has parts: the names and numbers that lead to each."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for name, part in pairs:
        yield (*above, name)
        if isinstance(part, dict | list | tuple) and len(part) < 100:
            yield from places(part, (*above, name))


def changed(content, place, change):
    """A copy in which one part is another; `change` gets it, and None takes it away."""
    if not place:
        return change(content)
    name, *rest = place
    if isinstance(content, dict):
        other = type(content)(content)
        part = changed(content[name], rest, change)
        other[name] = part
        if part is MISSING:
            del other[name]
        return other
    other = list(content)
    part = changed(content[name], rest, change)
    other[name : name + 1] = [] if part is MISSING else [part]
    return type(content)(other)


MISSING = object()
CHANGES = {
    "missing": lambda part: MISSING,
    "None": lambda part: MISSING if part is None else None,
    "a text": lambda part: "text" if part != "text" else "other",
    "empty": lambda part: type(part)() if isinstance(part, dict | list | tuple) and part else [[]],
    "in a list": lambda part: [part],
    "of another number": lambda part: part + 1 if type(part) in (int, float) else {"a": part},
    "a tensor": lambda part: torch.zeros(2, 3, 5),
}
# What may change when a run is resumed is not compared; nor are scores that the Trainer notes.
NO_PART = ("hparams_name", "pytorch-lightning_version")


@pytest.mark.parametrize("change", some(CHANGES, every=3))
def test_each_part_of_a_checkpoint_is_needed(change, half, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk would take most of the time
    path, before = half.last, half.snapshot()
    whole = checkpoints.read(path)
    half.begin(path)  # as it is, it is good
    tried = 0
    for place in places(whole):
        if "callbacks" in place and len(place) > 2:
            continue
        checkpoints.save(path, changed(copy.copy(whole), place, CHANGES[change]))
        with pytest.raises(BadInput) as refused:
            half.begin(path)
            pytest.fail(f"{place}: {change}")
        sentence = str(refused.value)
        assert "\n" not in sentence and sentence.endswith("."), sentence
        tried += 1
    path.write_bytes(before[path])
    assert half.snapshot() == before and tried >= (40 if half.side == "plain" else 80)
    count("checkpoints with an altered part refused", tried)


def test_what_the_trainers_callbacks_noted_is_there(half):
    """A callback that has forgotten what it counted would stop later, or keep another best one."""
    path, whole = half.last, checkpoints.read(half.last)
    if half.side == "plain":
        assert "callbacks" not in whole
        return
    assert len(whole["callbacks"]) == 4
    tried = 0
    for key, state in whole["callbacks"].items():
        for name, value in state.items():
            changes = [MISSING, value + 1] if type(value) is int else [MISSING]
            for other in changes:
                checkpoints.save(path, changed(whole, ("callbacks", key, name), lambda _: other))  # noqa: B023
                half_refuses(half, path)
                tried += 1
    assert tried >= 33
    count("checkpoints with an altered part refused", tried)


def half_refuses(half, path):
    with pytest.raises(BadInput):
        half.begin(path)


@pytest.mark.parametrize("change", some(["missing", "None", "a text", "empty", "in a list"]))
def test_each_part_of_the_evidence_is_needed(change, half):
    """Of a line that leads to the checkpoint; of one that does not, nothing is needed."""
    path = half.last.parent.parent / EVIDENCE
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    rows, tried = rows_of(half), 0
    assert len(rows) > 4
    for number, line in enumerate(lines[:3]):
        for place in places(line):
            # An epoch's samples, one by one, are numbers like any other.
            if place[0] in ("losses", "order") and len(place) > 2 and len(str(place[-1])) > 1:
                continue
            other = changed(line, place, CHANGES[change])
            if json.dumps(other) == json.dumps(line) or harmless(place, change):
                continue
            texts = [json.dumps(other if n == number else each) for n, each in enumerate(lines)]
            path.write_text("\n".join(texts))
            try:
                # Also where it is not refused: the next line has the row, too.
                assert rows_of(half) == rows, f"{place}: {change}"
            except BadInput as refused:
                assert str(path) in str(refused) or "checkpoint" in str(refused)
                tried += 1
    assert tried >= 90
    count("evidence with an altered part refused", tried)


def rows_of(half):
    """What metrics.csv would begin with, where the run was resumed."""
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        usual = resume.rows_before
        note = lambda *args: found.append(usual(*args)) or found[0]  # noqa: E731
        monkeypatch.setattr(resume, "rows_before", note)
        half.begin("last")
    return found[0]


def harmless(place, change):
    """What no training depends on; the comparison of two runs finds it."""
    if place[0] == "data" and len(place) == 2:
        return place[1].startswith("val") or change == "a text"
    if place[0] == "start" and len(place) >= 3:
        return change in ("a text", "None") or place[2] == "shape" or change == "empty"
    return place == ("form",)  # of a checkpoint before this one


@pytest.mark.parametrize("side", SIDES)
def test_the_lesson_parallel_needs_them_too(side, tmp_path, monkeypatch):
    """Its checkpoint has no schedule, and the generators of each process."""
    from common import processes

    be_alone(monkeypatch)
    settings = dict(lesson="parallel", max_epochs=2, devices=1)
    train(side, tmp_path, monkeypatch, **settings)
    folder = tmp_path / "parallel" / side
    path = sorted(folder.glob("checkpoints/*.ckpt"))[-1]
    whole = checkpoints.read(path)
    module = load_lesson(side, "parallel")

    def begin():
        from helpers import arguments

        be_alone(monkeypatch)
        processes._stores.clear()
        args = arguments(module, side, "parallel", tmp_path, devices=1, ckpt_path=str(path))
        processes.begin(args)

    begin()
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    tried = 0
    for name in whole:
        for change in ("missing", "None", "a text", "empty"):
            if name in NO_PART and change != "missing":
                continue
            checkpoints.save(path, changed(whole, (name,), CHANGES[change]))
            with pytest.raises(BadInput):
                begin()
                pytest.fail(f"{name}: {change}")
            tried += 1
    path.write_bytes(before[path])
    assert {e: e.read_bytes() for e in folder.rglob("*") if e.is_file()} == before
    assert tried >= 20
    count("checkpoints with an altered part refused", tried)
