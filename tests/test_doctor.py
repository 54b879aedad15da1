"""The doctor finds each single change where it is, names it, and finds nothing in equal runs."""

from common import ROOT

import ast
import re
import subprocess
import sys

import controls
import pytest
import torch
import torch.nn.functional as F
from case_table import EQUAL
from cases import CASES
from helpers import Noisy, count, some
from samebits import STAGES, BadInput, Cause, Diagnosis, Trace, assert_parity, compare
from test_trace import noisy, steps
from torch import nn

PAGE = controls.PAGE.read_text()
TABLE = PAGE.partition("<!-- made by make controls -->\n")[2].partition("<!-- end -->")[0]


def test_there_are_enough():
    assert len(controls.CONTROLS) >= 25 and len(controls.EQUAL) >= 20
    assert {control.stage for control in controls.CONTROLS.values()} == set(STAGES)
    assert {control.side for control in controls.CONTROLS.values()} == {"plain", "lightning"}
    lessons = {settings["lesson"] for settings in controls.EQUAL}
    assert lessons == set(controls.lessons()) and len(lessons) >= 7


@pytest.mark.parametrize("name", some(controls.CONTROLS, every=6))
def test_one_change_is_diagnosed(name, tmp_path):
    control = controls.CONTROLS[name]
    diagnosis = controls.diagnose(control, tmp_path)
    assert diagnosis.stage == control.stage, str(diagnosis)
    assert diagnosis.causes[0].name.startswith(control.cause), str(diagnosis)
    assert not diagnosis.rounding and len(str(diagnosis).splitlines()) <= 15
    # How many more differ depends on the images: a bias before BatchNorm has a gradient of rounding
    # alone, or of 0.
    rows = [re.sub(r" and \d+ more", "", row) for row in TABLE.splitlines()]
    assert re.sub(r" and \d+ more", "", controls.row(name, control, diagnosis)) in rows
    count("controls diagnosed")


@pytest.mark.parametrize("settings", some(controls.EQUAL, every=6), ids=str)
def test_equal_runs_give_no_alarm(settings, tmp_path):
    diagnosis = controls.equal(settings, tmp_path)
    assert diagnosis.equal and diagnosis.steps >= 4, str(diagnosis)
    count("equal runs without an alarm")


def test_the_page_counts_what_its_table_shows():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(controls.CONTROLS)
    for name, row in zip(controls.CONTROLS, rows, strict=True):
        assert row.startswith(f"| {name} ({controls.CONTROLS[name].side}) |")
    causes = sum(row.endswith(", right |") for row in rows)
    assert all("| right, " in row for row in rows)
    counted = f"{len(rows)} changes: the right stage for {len(rows)}, the right cause first for "
    counted += f"{causes}. {len(controls.EQUAL)} pairs of equal runs: 0 false alarms."
    assert causes >= 22 and counted in TABLE


def traced(path, *, net=None, every=1, **changes):
    net = net or noisy()
    torch.manual_seed(1)
    with Trace(net, path=path, every=every):
        steps(net, **changes)
    return path


def test_a_change_that_no_list_has(tmp_path):
    """Another momentum from step 100 on: the right step and stage, and not one step earlier."""
    a = traced(tmp_path / "a.trace", number=120)
    b = traced(tmp_path / "b.trace", number=120, at=100)
    diagnosis = compare(a, b)
    assert (diagnosis.step, diagnosis.stage) == (100, "update")
    assert diagnosis.causes[0].name == "Another setting of the optimizer: momentum"
    assert "momentum is 0.9 in A, 0.8 in B, in step 100." in str(diagnosis)


def test_the_same_in_a_lesson(tmp_path, monkeypatch):
    """The same on both sides of a lesson: from step 100 on, on Lightning's side."""
    line = '        self.log("train_loss", loss, prog_bar=True)\n'
    change = (
        line,
        f"{line}        if self.global_step == 99:\n"
        "            self.optimizers().param_groups[0]['momentum'] = 0.8\n",
    )
    for side, changes in (("plain", ()), ("lightning", (change,))):
        controls.trace(side, tmp_path / f"{side}.trace", monkeypatch, *changes, max_epochs=7)
    diagnosis = compare(tmp_path / "plain.trace", tmp_path / "lightning.trace")
    assert (diagnosis.step, diagnosis.stage) == (100, "update")
    assert diagnosis.causes[0].name == "Another setting of the optimizer: momentum"


def test_a_thinned_trace_finds_it_within_its_distance(tmp_path):
    a = traced(tmp_path / "a.trace", number=40, every=10)
    b = traced(tmp_path / "b.trace", number=40, every=10, at=15)
    diagnosis = compare(a, b)
    assert diagnosis.step == 21


def test_rounding_is_called_rounding(tmp_path):
    """The images of a batch the other way about: the sums are the same, their order is not."""
    wide = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 300), nn.ReLU(), nn.Linear(300, 10))  # noqa: E731

    class Turned(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.flip(0)).flip(0).log_softmax(1)

    class Straight(Turned):
        def forward(self, x):
            return self.net(x).log_softmax(1)

    paths = []
    for kind in (Straight, Turned):
        torch.manual_seed(0)
        paths.append(traced(tmp_path / f"{kind.__name__}.trace", net=kind(wide())))
    diagnosis = compare(*paths)
    assert not diagnosis.equal and diagnosis.rounding and diagnosis.size < 1e-5, str(diagnosis)
    assert "docs/sameness.md" in str(diagnosis)


def test_another_formula_of_the_same_loss_is_rounding(tmp_path):
    """The gradients at the output differ, and those of the weights do not."""
    paths = []
    for loss in (F.nll_loss, F.cross_entropy):  # log_softmax of log_softmax is the same
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), nn.LogSoftmax(1))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        paths.append(tmp_path / f"{loss.__name__}.trace")
        with Trace(net, path=paths[-1]):
            for _ in range(3):
                optimizer.zero_grad()
                loss(net(torch.randn(12, 8)), torch.arange(12) % 3).backward()
                optimizer.step()
    diagnosis = compare(*paths)
    assert diagnosis.stage == "loss" and diagnosis.rounding, str(diagnosis)
    assert diagnosis.causes[0].name.startswith("Another formula of the same loss")


def test_names_may_differ(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = noisy()

        def forward(self, x):
            return self.inner(x)

    a, b = traced(tmp_path / "a.trace"), traced(tmp_path / "b.trace", net=Wrapped())
    diagnosis = compare(a, b)
    assert diagnosis.equal and "B's names begin with 'inner.'." in str(diagnosis)
    b = traced(tmp_path / "b.trace", net=Wrapped(), at=2)
    assert (compare(a, b).step, compare(a, b).stage) == (2, "update")

    class Renamed(Noisy):
        def __init__(self):
            super().__init__()
            self.body, self.last = self.backbone, self.head
            del self.backbone, self.head

        def forward(self, x):
            return self.last(self.body(x)).log_softmax(1)

    torch.manual_seed(0)
    b = traced(tmp_path / "b.trace", net=Renamed())
    assert compare(a, b).equal and "paired in their order" in str(compare(a, b))
    torch.manual_seed(0)
    b = traced(tmp_path / "b.trace", net=Renamed(), at=2)
    assert (compare(a, b).step, compare(a, b).stage) == (2, "update")


def written(net, path, train):
    torch.manual_seed(1)
    with Trace(net, path=path):
        train(net, torch.optim.SGD(net.parameters(), 0.1))
    return path


def test_a_batch_without_a_loss_is_no_step(tmp_path):
    """The Trainer steps without gradients where training_step returns None; a loop continues."""

    def train(steps_anyway):
        def run(net, optimizer):
            for i in range(4):
                optimizer.zero_grad()
                loss = net(torch.randn(3, 4)).square().mean()
                if i == 1:
                    if steps_anyway:
                        optimizer.step()
                    continue
                loss.backward()
                optimizer.step()

        return run

    paths = []
    for steps_anyway in (False, True):
        torch.manual_seed(0)
        paths.append(written(nn.Linear(4, 2), tmp_path / f"{steps_anyway}.trace",
                             train(steps_anyway)))  # fmt: skip
    assert compare(*paths).equal and compare(*paths[::-1]).equal, str(compare(*paths))


def test_the_order_of_definition_is_free(tmp_path):
    """Of tied weights, and of layers with other names: their initial values tell which is which."""

    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            parts = {"in": nn.Linear(4, 4), "out": nn.Linear(4, 4)}
            parts["out"].weight = parts["in"].weight
            parts["more"] = nn.Linear(4, 4)
            for own, part in names.items():
                setattr(self, own, parts[part])
            self.order = [next(own for own in names if names[own] == part) for part in parts]

        def forward(self, x):
            for name in self.order:
                x = getattr(self, name)(x)
            return x

    def train(net, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()

    ways = (
        {"in_": "in", "out": "out", "more": "more"},
        {"out": "out", "in_": "in", "more": "more"},
        {"last": "more", "first": "in", "second": "out"},
    )
    paths = []
    for number, names in enumerate(ways):
        torch.manual_seed(0)
        paths.append(written(Net(names), tmp_path / f"{number}.trace", train))
    for path in paths[1:]:
        diagnosis = compare(paths[0], path)
        assert diagnosis.equal, str(diagnosis)
    assert "paired by their initial values" in str(diagnosis)


def test_a_start_that_is_a_later_step(tmp_path):
    """One run goes on from where the other is after its second step: no other seed."""
    net = noisy()
    a = traced(tmp_path / "a.trace", number=4)
    torch.manual_seed(1)
    steps(net, 2)
    b = traced(tmp_path / "b.trace", net=net)
    diagnosis = compare(a, b)
    assert diagnosis.stage == "start"
    assert diagnosis.causes[0].name.startswith("B goes on from a training")
    assert "after step 2" in diagnosis.causes[0].evidence


def test_assert_parity_says_it_in_fifteen_lines(tmp_path):
    a, b = traced(tmp_path / "a.trace"), traced(tmp_path / "b.trace", at=2)
    assert_parity(a, a)
    with pytest.raises(AssertionError) as failure:
        assert_parity(a, b)
    said = str(failure.value).splitlines()
    assert len(said) <= 15
    assert said[0] == (
        "The runs differ from step 2 on, first in the step of the optimizer: "
        "momentum of backbone.0.weight."
    )


def test_no_diagnosis_is_longer_than_fifteen_lines():
    cause = Cause("name", "evidence", "page")
    long = Diagnosis(9, "batch", 3, "what", 4, 0.1, False, (cause,) * 20, ("remark",) * 20)
    assert len(str(long).splitlines()) == 15


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = traced(tmp_path / "a.trace")
    with pytest.raises(BadInput, match="trace both with the same"):
        compare(a, traced(tmp_path / "b.trace", every=2))
    with pytest.raises(BadInput, match="holds no step"):
        compare(a, traced(tmp_path / "c.trace", number=0))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "samebits", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command(tmp_path):
    a, b = traced(tmp_path / "a.trace"), traced(tmp_path / "b.trace", at=2)
    for paths, status, said in (
        ((a, a), 0, "The runs are equal, bit for bit: 3 steps."),
        ((a, b), 1, "The runs differ from step 2 on"),
        ((a, tmp_path / "none"), 2, "there is no trace"),
    ):
        ended = command(*map(str, paths))
        assert ended.returncode == status and said in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        count("statuses of the doctor")


def test_every_page_that_a_cause_names_exists():
    anchors = set(re.findall(r'<a id="([^"]+)">', (ROOT / "docs" / "pitfalls.md").read_text()))
    calls = [
        node
        for path in (ROOT / "common" / "doctor").glob("causes_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Cause"
    ]
    pages = [call.args[2].value for call in calls if len(call.args) == 3]
    assert len(pages) >= 30 and set(pages) <= anchors
    count("causes whose page exists", len(pages))


def test_the_readme_says_what_the_pages_show():
    readme = (ROOT / "README.md").read_text()
    changes, mistakes = len(controls.CONTROLS), sum(c.cause is not None for c in CASES.values())
    assert f"Of {changes} single changes" in readme and f"; {EQUAL} pairs of equal runs" in readme
    assert f"of {mistakes} mistakes rebuilt" in readme
    pitfalls = (ROOT / "docs" / "pitfalls.md").read_text()
    assert f"{len(re.findall('<a id=', pitfalls))} runnable sections" in readme
    shown = re.search(r"```\n(The runs differ .*?)```", readme, re.DOTALL)[1]
    assert f"```text\n{shown}```" in (ROOT / "docs" / "migration.md").read_text()
