"""The exercises: each fails as it is given, and the lesson's own lines solve it."""

from common import ROOT
from common.exercises import check
from common.exercises.catalog import KINDS, exercises, find, of_lesson
from common.exercises.page import PAGE, page
from common.proof import ledger

import itertools
import json
import re

import pytest
from graded import checked
from helpers import count, lessons, some

SCRIPTS = [e.number for e in exercises().values() if e.kind != "predict"]


# What there is.


def test_there_are_enough_of_each_kind():
    every = list(exercises().values())
    assert len(every) >= 58 and [e.number for e in every] == list(range(1, len(every) + 1))
    kinds = {kind: sum(e.kind == kind for e in every) for kind in KINDS}
    assert all(number >= few for number, few in zip(kinds.values(), (25, 15, 3, 8), strict=True))
    assert sum(kinds.values()) == len(every)
    assert {e.lesson for e in every} == set(lessons())
    assert len({e.name for e in every}) == len({e.title for e in every}) == len(every)
    behaviours = {(row["lesson"], row["behaviour"]) for row in ledger.rows()}
    for e in every:
        assert (e.lesson, e.row) in behaviours, (e.number, e.lesson, e.row)
        assert e.level in (1, 2, 3) and 1 <= e.minutes <= 60 and len(e.title) <= 52
        assert len(e.hints) >= 2 and e.explanation.strip() and e.task.strip()
        assert re.fullmatch("[a-z0-9_]+", e.name)
        count("exercises described")


@pytest.mark.parametrize("number", SCRIPTS)
def test_a_hint_is_not_the_solution(number):
    exercise = find(f"{number}")
    given, solved = (text.splitlines() for text in (exercise.given(), exercise.solution()))
    missing = {line.strip() for line in solved} - {line.strip() for line in given}
    missing = {line for line in missing if len(line) > 8}
    told = "\n".join((exercise.task, *exercise.hints))
    assert not [line for line in missing if line in told]
    assert exercise.given() != exercise.solution()
    # No teaching comment is left that could name what is missing.
    assert "#:" not in exercise.given()
    count("exercises whose hints were read")


def test_the_list_in_the_docs_is_current():
    assert page() == PAGE.read_text(), "python -m common.exercises.page"
    for lesson in lessons():
        assert of_lesson(lesson)


def test_every_number_in_the_lesson_plans_is_an_exercise():
    text = (ROOT / "docs" / "class.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ to \d+ ", line)]
    named = {int(n) for row in rows for n in re.findall(r"\b\d\d\b", row.split("|")[2])}
    assert len(named) >= 25 and named <= set(exercises())
    # Each plan goes from 0 on without a hole.
    ends = [tuple(map(int, re.findall(r"\d+", row.split("|")[1]))) for row in rows]
    for (_, end), (begin, _) in itertools.pairwise(ends):
        assert begin in (0, end)
    count("rows of lesson plans", len(rows))


# Each exercise fails as it is given, and is solved by the lesson's own lines.


@pytest.mark.parametrize("number", some(SCRIPTS, every=12))
def test_as_given_it_fails_and_the_lesson_solves_it(number, workspace):
    exercise = find(f"{number}")
    assert workspace.begin(exercise)
    outcome = check.check(exercise, workspace)
    assert not outcome.solved and outcome.stage == exercise.stage, outcome
    solved = checked(workspace, number)
    assert solved.solved and len(solved.compared) >= 7, solved
    count("exercises failed and solved")


@pytest.mark.parametrize("number", [n for n in SCRIPTS if find(f"{n}").stage == "run"])
def test_what_is_to_be_written_is_named(number, workspace):
    """The file as it is given is not run; changed elsewhere, it is, and says the same."""
    exercise = find(f"{number}")
    workspace.begin(exercise)
    said = check.check(exercise, workspace).said
    assert said.startswith("It is as it was given. Yet to be written: ") and said.endswith(".")
    count("parts yet to be written")


def test_a_part_yet_to_be_written_is_named_where_the_file_has_changed(workspace):
    outcome = checked(workspace, 6, find("6").given() + "\n# I have been here\n")
    assert outcome.stage == "run"
    assert "is yet to be written: the four lines that train." in outcome.said


# Answers that are wrong, and plausible: (exercise, stage, change to the solution ...).
WRONG = {
    "cleared once an epoch": (1, "steps", ("        optimizer.zero_grad()\n", ""), (
        "    model.train()\n", "    model.train()\n    optimizer.zero_grad()\n")),
    "train() after the first batch": (2, "steps", ("    model.train()\n", ""), (
        "        optimizer.step()\n", "        optimizer.step()\n        model.train()\n")),
    "eval() after the loop": (3, "steps", ("    model.eval()\n", ""), (
        "    return total_loss, conf", "    model.eval()\n    return total_loss, conf")),
    "the epoch counted from 1": (4, "data", ("set_epoch(epoch)", "set_epoch(epoch + 1)")),
    "the sum of the losses": (6, "steps", ("model(images), labels)",
                                           "model(images), labels, reduction='sum')")),
    "divided by a full batch": (7, "metrics", (".item() * len(labels)", ".item() * 50")),
    "the summary after the network": (8, "steps", (
        '    summary(Net(), (3, 32, 32), device="cpu")\n', ""), (
        "    trainer = L.Trainer(",
        '    summary(model.model, (3, 32, 32), device="cpu")\n    trainer = L.Trainer(')),
    "weighted": (9, "metrics", ('average="micro"', 'average="weighted"'), (
        'average="macro"', 'average="weighted"')),
    "nothing returned": (10, "run", ('        self.log("train_loss", loss, prog_bar=True)\n'
                                     "        return loss\n",
                                     '        self.log("train_loss", loss, prog_bar=True)\n')),
    "backward in training_step": (10, "steps", (
        '        self.log("train_loss", loss, prog_bar=True)\n',
        '        self.log("train_loss", loss, prog_bar=True)\n'
        "        loss.backward(retain_graph=True)\n")),
    "absent classes count as 0": (11, "metrics", (
        "f1 = (2 * right / (true + predicted))[true + predicted > 0].mean()",
        "f1 = (2 * right / (true + predicted).clamp(min=1)).sum() / 11")),
    "the last batch thrown away": (39, "steps", (
        "            if (batch + 1) % group and batch + 1 < len(train_loader):\n",
        "            if (batch + 1) % group:\n")),
    "an average with lerp": (40, "weights", (
        "mean.copy_(now[name] if first else decay * mean + (1 - decay) * now[name])",
        "mean.copy_(now[name] if first else mean + (1 - decay) * (now[name] - mean))")),
    "a small gain is an improvement": (20, "steps", (
        "better = val_loss + self.min_delta < self.best", "better = val_loss < self.best")),
    "the schedule by default": (42, "steps", (
        '{"scheduler": schedule, "interval": interval, "monitor": "val_loss"}',
        '{"scheduler": schedule, "monitor": "val_loss"}')),
    "one file behind the other": (55, "checkpoints", (
        "whole[rank::world] = np.fromfile(path, np.float32).reshape(-1, 10)",
        "whole[rank * 70:][:70] = np.fromfile(path, np.float32).reshape(-1, 10)")),
    "one process's mean": (53, "metrics", (
        "*[processes.add_up(each, device) for each in sums]", "*sums")),
    "a new optimizer": (58, "steps", (
        'optimizer.add_param_group({"params": list(backbone.parameters()), "lr": lr})',
        'optimizer.state.clear()\n'
        '    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": lr})')),
}  # fmt: skip


@pytest.mark.parametrize("name", some(WRONG, every=6))
def test_a_wrong_answer_is_refused(name, workspace):
    number, stage, *changes = WRONG[name]
    outcome = checked(workspace, number, None, *changes)
    assert not outcome.solved and outcome.stage == stage, outcome
    count("wrong answers refused")


def test_there_are_enough_wrong_answers():
    assert len(WRONG) >= 15 and len({number for number, *_ in WRONG.values()}) >= 12


def test_another_way_is_right_too(workspace):
    """What counts is what a file does."""
    assert checked(workspace, 1, None, ("        optimizer.zero_grad()\n", ""), (
        "        optimizer.step()\n", "        optimizer.step()\n        model.zero_grad()\n",
    )).solved  # fmt: skip


def test_a_lesson_page_and_its_notebook_end_with_its_exercises():
    for lesson in lessons():
        labels = [e.label for e in of_lesson(lesson)]
        ending = (ROOT / "docs" / f"{lesson}.md").read_text().rpartition("\n## ")[2]
        assert ending.startswith("Exercises\n") and f"(exercises.md#{lesson})" in ending
        assert re.findall(r"\b\d\d\b", ending)[:-1] == [labels[0], labels[-1]][: len(labels)]
        notebook = json.loads((ROOT / "docs" / "notebooks" / f"{lesson}.ipynb").read_text())
        cells = ["".join(cell["source"]) for cell in notebook["cells"]]
        for command in ("start", "check"):
            asked = [f"!{{sys.executable}} -m common.exercises {command} {n}" for n in labels]
            assert [cell for cell in cells if cell in asked] == asked
        assert cells[-1] == asked[-1]
        count("lessons that end with exercises")
