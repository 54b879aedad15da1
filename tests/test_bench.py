"""What `make bench` and `make bench-speed` show follows from what they measured."""

from bench import evidence, overhead, seeds, startup
from bench.report import fill
from common import ROOT
from common.data import Data
from common.messages import BadInput
from common.run import parse

import json
import re
import subprocess
import sys
from dataclasses import fields
from statistics import mean

import numpy as np
import pytest
from helpers import SIDES, count, load_lesson, small_data

FOLDER = ROOT / "docs" / "speed"
MEASURED = json.loads((FOLDER / "overhead.json").read_text())
SEEDS = json.loads((FOLDER / "seeds.json").read_text())


@pytest.mark.parametrize("way", overhead.WAYS)
def test_each_way_makes_its_steps(way):
    data = overhead.drawn(120)
    assert overhead.measure_one(overhead.Case(way, "Net", 4), data, steps=4) > 0
    count("ways to train")


def test_a_clock_wants_all_steps():
    clock = overhead.Clock(2)
    for _ in range(overhead.WARM_UP + 1):
        clock()
    made = overhead.WARM_UP + 1
    with pytest.raises(AssertionError, match=f"{made} steps were made, and not {made + 1}"):
        _ = clock.seconds


def test_a_watch_takes_inner_times_out_of_outer_ones(monkeypatch):
    now = iter((0.0, 1.0, 3.0, 10.0))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(now))

    class Calls:
        def outer(self):
            return self.inner()

        def inner(self):
            return 7

    watch = overhead.Watch()
    undo = [watch.around(Calls, name, name) for name in ("outer", "inner")]
    assert Calls().outer() == 7
    assert watch.seconds == {"inner": 2.0, "outer": 8.0}
    for each in undo:
        each()
    assert Calls().outer() == 7 and watch.seconds["inner"] == 2.0


def test_what_takes_the_trainers_time_is_found():
    """Each function that is watched is there, and called; their times are within the step's."""
    found = overhead.profile(overhead.drawn(60), rounds=1, batch_size=4)
    parts = found["parts"]
    assert len(parts) >= 10 and all(seconds > 0 for seconds in parts.values())
    assert "the bar" in parts and "training_step, the lesson's own" in parts
    assert sum(parts.values()) < 3 * found["seconds_while_watched"]
    assert set(found["without"]) == {"without the bar", "without the logger"}


@pytest.mark.parametrize("side", SIDES)
def test_a_lesson_is_trained_for_the_comparison(side, monkeypatch):
    """On a few images, for one seed: both sides end with the same weights, and the clock ran."""
    few = Data(*small_data(lesson="speed"))

    def load(side, name, *changes, usual=load_lesson):
        module = usual(side, name, *changes)
        module.load_images = lambda *_: few
        return module

    monkeypatch.setattr(seeds, "load", load)
    found = seeds.train(side, "speed", 1, ROOT, limit_train_batches=3, batch_size=16)
    again = seeds.train(
        {"plain": "lightning", "lightning": "plain"}[side], "speed", 1, ROOT,
        limit_train_batches=3, batch_size=16,
    )  # fmt: skip
    assert found["cpu_seconds"] > 0 and found["weights"] == again["weights"]
    assert (found["val"], found["test"]) == (again["val"], again["test"])
    other = seeds.train(side, "speed", 1, ROOT, limit_train_batches=3, batch_size=16,
                        pixels="signed")  # fmt: skip
    assert other["cpu_seconds"] > 0


def test_watched_and_bare_steps_are_the_same_steps():
    ratios, bare = evidence.measure(loading=True, steps=4, rounds=2)
    assert len(ratios) == 2 and min(ratios) > 0 and bare > 0


def test_a_command_is_measured():
    spent, took = startup.run(["-c", "sum(range(100_000))"])
    assert spent > 0 and took > 0
    with pytest.raises(subprocess.CalledProcessError):
        startup.run(["-c", "raise SystemExit(3)"])


def test_the_memory_measured_is_the_childs_own():
    """Not that of the process that starts it, with which every child begins on Linux."""
    ours = np.ones(50_000_000)  # 400 MB
    command = [sys.executable, "-c", overhead.SMALL_PARENT, sys.executable, "-c", "pass"]
    peak = int(subprocess.check_output(command)) * (1 if sys.platform == "darwin" else 1024)
    assert 1e6 < peak < ours.nbytes / 4


def test_what_was_measured_is_whole():
    assert {row["way"] for row in MEASURED["steps"]} == set(overhead.WAYS)
    assert {row["model"] for row in MEASURED["steps"]} == {"Net", "DeepNet"}
    assert {row["batch_size"] for row in MEASURED["steps"]} == {4, 32, 128, 512}
    assert len(MEASURED["steps"]) == 48
    assert all(len(row["seconds"]) >= 5 for row in MEASURED["steps"])
    assert all(row["count"] >= 2 for row in MEASURED["steps"])
    assert [p["case"]["batch_size"] for p in MEASURED["profile"]] == [4, 128]
    assert [row["side"] for row in MEASURED["start"]] == [*SIDES] * 5


def test_the_pages_show_what_was_measured():
    for path, text in overhead.texts(MEASURED).items():
        page = path.read_text()
        assert fill(page, {"overhead": text}, "bench.overhead") == page, path
        count("pages of the benches")
    page = (ROOT / "docs" / "speed.md").read_text()
    assert fill(page, {"seeds": seeds.text_of(SEEDS)}, "bench.seeds") == page


def test_a_goal_is_reached_or_not():
    steps = [
        {"way": way, "model": "Net", "batch_size": size, "seconds": [seconds] * 5}
        for way, seconds in zip(overhead.WAYS, (1.0, 1.1, 2.0, 1.2, 1.3, 2.5), strict=True)
        for size in (4, 128)
    ]
    rows = overhead.goal_rows({"steps": steps})
    verdicts = {(row[0], row[1]): row[4] for row in rows[1:]}
    assert verdicts["plain / floor", "128"] == "not reached"
    assert verdicts["plain / floor", "4"] == "reached"
    assert verdicts["lesson / plain", "4"] == "reached"
    assert verdicts["tutorial / plain", "128"] == "not reached"
    assert verdicts["bare / plain", "4"] == ""


def test_speed_is_as_good_as_the_tutorial_in_a_tenth_of_the_time():
    """As it was measured; no test measures a time."""
    for side in SIDES:
        fast, slow = (
            [r for r in SEEDS["seeds"] if (r["what"], r["side"]) == (what, side)]
            for what in ("speed", "cifar")
        )
        assert [r["seed"] for r in fast] == [r["seed"] for r in slow] == [0, 1, 2, 3, 4]
        assert mean(r["test"] for r in fast) >= 0.542
        spent = (mean(r["cpu_seconds"] for r in runs) for runs in (fast, slow))
        assert next(spent) <= 0.1 * next(spent)
    assert {r["means"] for r in SEEDS["means"]} == set(seeds.MEANS)


def test_the_small_network_is_measured_with_the_pages_command(tmp_path):
    page = (ROOT / "docs" / "speed.md").read_text()
    words = re.search(r'make plain-speed ARGS="(--network small[^"]*)"', page)[1].split()
    name, settings = seeds.COMPARED["speed, small network"]
    args = load_lesson("plain", name).Args
    given = parse(args, ROOT / "plain" / f"{name}.py", [*words, "--runs-dir", str(tmp_path)])
    wanted = args(**settings, runs_dir=tmp_path)
    compared = [own.name for own in fields(args) if own.init]
    assert len(compared) >= 25
    for option in compared:
        assert getattr(given, option) == getattr(wanted, option), option


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="measure first"):
        overhead.main(["--tables", "--output", str(tmp_path)])
    with pytest.raises(BadInput, match="measure first"):
        seeds.main(["--tables", "--output", str(tmp_path)])
    with pytest.raises(BadInput, match="two seeds or more and the real CIFAR-10"):
        seeds.main(["--data-dir", str(tmp_path)])
