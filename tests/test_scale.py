"""What docs/scale.md says of more processes: the model of a ring, the tables, the measurement."""

from common import ROOT
from common.messages import BadInput, Stopped
from common.models import Net, Transfer

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from helpers import count

sys.path.append(str(ROOT))  # bench/ is run from the repository's root, and not installed
parallel, report, ring, workers = (
    importlib.import_module(f"bench.{name}") for name in ("parallel", "report", "ring", "workers")
)
PAGE = ROOT / "docs" / "scale.md"
LINK = ring.Link("a second, and a thousand bytes a second", 1.0, 1000.0)


@pytest.mark.parametrize(
    ("devices", "size", "seconds"),
    [(1, 10**9, 0), (2, 0, 2), (2, 1000, 3), (4, 1000, 7.5), (5, 5000, 16), (1024, 1024, 2048.046)],
)
def test_the_ring_by_hand(devices, size, seconds):
    assert ring.ring(devices, size, LINK) == pytest.approx(seconds)


def play(devices, numbers):
    """Play a ring through, message by message: what each has then, the messages and bytes it sent.

    `numbers` are what each process begins with; they are cut into as many pieces as processes.
    """
    piece = len(numbers[0]) // devices
    has = [[own[i * piece : (i + 1) * piece] for i in range(devices)] for own in numbers]
    messages, sent = [0] * devices, [0] * devices
    for turn in range(2 * (devices - 1)):
        gather = turn >= devices - 1
        # All send at once: first the pieces that they have added up so far, then the sums.
        places = [(rank - turn) % devices for rank in range(devices)]
        carried = [list(has[rank][places[rank]]) for rank in range(devices)]
        for rank, (place, piece_sent) in enumerate(zip(places, carried, strict=True)):
            messages[rank] += 1
            sent[rank] += ring.BYTES * len(piece_sent)
            own = has[(rank + 1) % devices][place]
            own[:] = piece_sent if gather else [a + b for a, b in zip(own, piece_sent, strict=True)]
    return [list(itertools.chain(*pieces)) for pieces in has], messages, sent


@pytest.mark.parametrize("devices", [*range(1, 9), 16, 64])
def test_the_ring_played_through_adds_up_and_sends_what_the_formula_says(devices):
    numbers = [[rank * 1000 + i for i in range(3 * devices)] for rank in range(devices)]
    ends, messages, sent = play(devices, numbers)
    assert ends == [[sum(column) for column in zip(*numbers, strict=True)]] * devices
    assert messages == [2 * (devices - 1)] * devices
    size = ring.BYTES * 3 * devices
    assert sent == [2 * (devices - 1) * size // devices] * devices
    # One after the other, each takes the latency and its bytes' time.
    assert messages[0] * LINK.alpha + sent[0] / LINK.beta == ring.ring(devices, size, LINK)
    count("messages of a ring that was played through", sum(messages))


def test_bandwidth_and_latency_of_large_rings():
    free = ring.Link("no latency", 0.0, 1000.0)
    times = [ring.ring(p, 1000, free) for p in (2, 8, 64, 10**6)]
    assert times == sorted(times) and times[0] == 1 and times[-1] == pytest.approx(2, abs=1e-5)
    for link in (LINK, ring.SLOW, ring.NVLINK):
        for p in ring.DEVICES:
            size = ring.latency_below(p, link)
            both = ring.ring(p, 0, link), ring.ring(p, size, link)
            assert both[1] == pytest.approx(2 * both[0])  # half of it is latency


def test_trees_and_two_levels():
    assert [ring.tree(p, 0, LINK) for p in (1, 2, 3, 8, 1024)] == [0, 2, 4, 6, 20]
    assert ring.tree(8, 1000, LINK) == 6 + 2
    # Few bytes, many devices: trees. Many bytes, few devices: a ring.
    assert ring.tree(1024, 1000, LINK) < ring.ring(1024, 1000, LINK)
    assert ring.tree(8, 10**9, LINK) > ring.ring(8, 10**9, LINK)
    inner = ring.Link("inside", 0.5, 8000.0)
    assert ring.two_levels(8, 8000, inner, LINK) == ring.ring(8, 8000, inner)
    # Inside 14 messages of an eighth, between eight servers 14 of an eighth of an eighth.
    assert ring.two_levels(64, 8000, inner, LINK) == pytest.approx(7 + 1.75 + 14 + 1.75)


@pytest.mark.parametrize("buckets", [1, 2, 7, 160])
@pytest.mark.parametrize("backward", [0.0, 3.0, 40.0, 500.0])
def test_what_is_waited_for_is_that_of_buckets_sent_one_after_the_other(buckets, backward):
    each, end = 1.5, 0.0
    for number in range(1, buckets + 1):
        full = backward * number / buckets
        end = max(end, full) + each
    found = ring.waiting(1.5 * backward, buckets * ring.BUCKET, lambda size: each, overlap=True)
    assert found == pytest.approx(end - backward)
    at_once = ring.waiting(1.5 * backward, buckets * ring.BUCKET, lambda size: size, overlap=False)
    assert at_once == buckets * ring.BUCKET


def test_share():
    assert ring.share(3.0, 1.0) == 0.25 and ring.share(3.0, 0.0) == 0


def test_the_works_are_the_lessons_networks():
    parts = {"links": {}, "cores": 2, "seconds_per_image": 0.5}
    sizes = [work.parameters for work in ring.works(parts)]
    assert sizes == [62_006, 134_301_514, 10**9] and workers.GRADIENTS == 4 * 62_006
    # By hand, for an image: twice the multiplications, and backward twice as many, but for the
    # first layer, which needs no gradient of the image.
    first, second, linear = 28**2 * 6 * 75, 10**2 * 16 * 150, 400 * 120 + 120 * 84 + 84 * 10
    assert ring.flops(Net)[1] == 2 * (2 * first + 3 * second + 3 * linear)
    assert ring.flops(Transfer)[0] == sizes[1]


def test_memory_and_traffic():
    ddp, alone = ring.memory(1000, 2, 1)
    assert (ddp, alone) == (20_000, 16_000)
    assert ring.memory(1000, 1, 8) == (16_000, 1_500)
    for p in ring.DEVICES:
        ddp, fsdp = ring.traffic(1000, p)
        assert fsdp == pytest.approx(1.5 * ddp)
        assert ddp == pytest.approx(ring.ring(p, 4000, ring.Link("", 0.0, 1.0)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (ring.time_text(8.25e-3), "8.25 ms"),
        (ring.time_text(0.99951), "1.00 s"),
        (ring.time_text(99.96e-6), "100 µs"),
        (ring.time_text(4e-9), "0.00 µs"),
        (ring.size_text(248_024), "248 KB"),
        (ring.size_text(727), "727 bytes"),
        (ring.size_text(12.5e9), "12.5 GB"),
        (ring.markdown(["a", "b"], ["1", "2"]), "| a | b |\n| --- | --- |\n| 1 | 2 |"),
    ],
)
def test_texts(text, wanted):
    assert text == wanted


@pytest.mark.parametrize("devices", [2, 4, 16])
def test_the_fit_finds_latency_and_bandwidth(devices):
    way = ring.Link("", 3e-5, 2e9)
    seconds = [ring.ring(devices, size, way) for size in workers.SIZES]
    found = report.fit(workers.SIZES, seconds, devices)
    assert found["alpha"] == pytest.approx(3e-5) and found["beta"] == pytest.approx(2e9)
    assert found["off"] < 1e-9
    seconds[0] *= 2
    assert report.fit(workers.SIZES, seconds, devices)["off"] > 0.2


def test_ideals():
    assert report.ideals(12.0, 4, 2) == (3, 6) and report.ideals(12.0, 4, 8) == (3, 3)


def made_up():
    """Three rounds of one and of four processes, on two cores."""
    times = {
        (1, "plain", True): [8, 10, 12],
        (1, "plain", False): [8, 10, 12],
        (1, "lightning", True): [16, 16, 16],
        (1, "lightning", False): [16, 16, 16],
        (4, "plain", True): [10, 5, 4],
        (4, "plain", False): [5, 4, 4],
        (4, "lightning", True): [18, 20, 40],
        (4, "lightning", False): [10, 10, 10],
    }
    way = ring.Link("", 0.01, 1e6)
    return {
        "setting": {"rounds": 3, "steps": 5, "threads": 1, "gradient_bytes": 1000},
        "machine": {"cpu": "abacus", "cores": 2, "load_average_at_start": 0.0},
        "versions": {"python": "3", "torch": "2", "lightning": "2"},
        "steps": [
            {"side": side, "batch_size": 32, "devices": n, "sync": sync, "seconds": seconds}
            for (n, side, sync), seconds in times.items()
        ],
        "all_reduce": [
            {"devices": 4, "bytes": size, "seconds": [9, ring.ring(4, size, way), 0]}
            for size in (1000, 100_000)
        ],
    }


def test_the_summary_of_a_made_up_measurement():
    rows = report.summary(made_up())
    assert [(row["devices"], row["side"]) for row in rows] == [
        (1, "plain"),
        (1, "lightning"),
        (4, "plain"),
        (4, "lightning"),
    ]
    alone, _, plain, lightning = rows
    assert alone["step"] == 10 and alone["times"] == 1 and alone["alone"] is None
    assert plain["step"] == 5 and plain["spread"] == (4, 10) and plain["times"] == 2
    assert (plain["ideal"], plain["ideal_of_cores"]) == (2.5, 5)
    # Of each round: half, a fifth, nothing.
    assert plain["silent"] == 4 and plain["waiting"] == pytest.approx((0.2, 0, 0.5))
    assert plain["alone"] == pytest.approx(0.0615)
    # Each side is measured by its own single process.
    assert lightning["times"] == 0.8 and lightning["ideal"] == 4
    assert lightning["waiting"] == pytest.approx((0.5, 4 / 9, 0.75))


def test_the_tables_of_a_made_up_measurement():
    parts = report.blocks(made_up())
    row = "| 32 | 4 | plain | 5.00 s | 4e+03 to 1e+04 | 2.50 s | 5.00 s | 2.00 | 4.00 s |"
    assert f"{row} 20% (0 to 50) | 61.5 ms, 1% |" in parts["steps"].splitlines()
    assert "| 4 | 10.0 ms | 1.00 MB/s | 0% |" in parts["fit"].splitlines()
    assert "on abacus, 2 cores, with a load average of 0.0" in parts["what was measured"]
    # The link on paper is that of processes with a core each, if there are any.
    fits = {n: {"alpha": float(n), "beta": 1.0} for n in ("2", "4", "16")}
    for cores, chosen in ((1, 2), (2, 2), (4, 4), (15, 4), (64, 16)):
        assert ring.measured_link({"links": fits, "cores": cores}).alpha == chosen


def test_the_picture_shows_what_was_measured():
    found = made_up()
    steps, sizes = report.draw(found).axes
    lines = [list(line.get_ydata()) for line in steps.get_lines()]
    # Steps of both sides, steps without sending, what would be ideal.
    for row in (10, 5), (16, 20), (10, 4), (16, 10), (10, 2.5):
        assert [1000 * value for value in row] in lines
    (dots,) = (line.get_ydata() for line in sizes.get_lines() if line.get_marker() == "o")
    assert list(dots) == [1000 * median(row["seconds"]) for row in found["all_reduce"]]


def test_a_page_is_filled_between_its_comments_alone():
    page = "a\n<!-- {}: written by bench.parallel -->\n{}<!-- end -->\nb\n"
    page += page.replace("a", "c", 1)
    old, new = page.format("1", "old\n", "2", ""), page.format("1", "x\ny\n", "2", "z\n")
    filled = report.fill(old, {"1": "x\ny", "2": "z"})
    assert filled == new
    assert report.fill(new, {"1": "x\ny", "2": "z"}) == new
    with pytest.raises(AssertionError, match="lacks a place for '3'"):
        report.fill(old, {"3": ""})


def test_the_pages_tables_are_what_the_measurement_says():
    found = json.loads((ROOT / "docs" / "scale" / "parallel.json").read_text())
    page = PAGE.read_text(encoding="utf-8")
    parts = report.blocks(found)
    assert report.fill(page, parts) == page
    assert re.findall("<!-- (.*): written by bench.parallel -->", page) == list(parts)
    for text in parts.values():
        count("lines of tables in docs/scale.md", len(text.splitlines()))
    assert len(page.splitlines()) <= 150
    assert (ROOT / "docs" / "scale" / "parallel.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_gives_the_constants_that_are_calculated_with():
    page = PAGE.read_text(encoding="utf-8")
    for text in (
        f"{1e6 * ring.NVLINK.alpha:g} µs over NVLink, {1e6 * ring.FAST.alpha:g} µs over a network",
        f"β = {ring.NVLINK.beta / 1e9:g} GB/s",
        f"β = {ring.FAST.beta / 1e9:g} GB/s",
        f"{ring.SLOW.beta / 1e9:g} GB/s",
        f"{100 * ring.GPU_FLOPS / 989.5e12:.0f} % of the 989 · 10¹² operations",
        f"{workers.GRADIENTS / 1e3:.0f} KB",
        f"buckets of {ring.BUCKET / 2**20:g} MiB",
    ):
        assert text in page, text
    assert ring.FAST.alpha == ring.SLOW.alpha


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--devices=0", "expected numbers from 1 on such as '1 2', got '0'"),
        ("--devices=two", "got 'two'"),
        ("--batch-sizes=-32", "got '-32'"),
        ("--rounds=0", "argument --rounds"),
        ("--steps=1,2", "expected one number from 1 on, got '1,2'"),
        ("--steps=2.5", "got '2.5'"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_options_that_cannot_be(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        parallel.main([options])
    message = capsys.readouterr().err
    assert end.value.code == 2 and said in message
    assert message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--devices=2 4", "--devices must be 1 and larger numbers up to"),
        ("--devices=1", "--devices must be 1 and larger numbers up to"),
        (f"--devices=1 {4 * os.cpu_count() + 1}", "--devices must be 1 and larger numbers up to"),
        ("--batch-sizes=32 33", "--batch-sizes 33 cannot be split evenly over 2 processes"),
        ("--steps=386", "takes 200,192 images, and 200,000 are the most"),
        ("--tables", "parallel.json' yet; measure first, without --tables"),
    ],
)
def test_what_cannot_be_measured(options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "measure", None)
    with pytest.raises(BadInput, match=re.escape(said)):
        parallel.main([options, "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_sides_that_did_not_do_the_same_are_not_compared():
    jobs = {side: workers.Job(2, 5, side, 32, True) for side in ("plain", "lightning")}
    parallel.check({jobs["plain"]: ["a", "a"], jobs["lightning"]: ["a", "a"]})
    with pytest.raises(Stopped, match=r"end with other weights.*side='lightning'"):
        parallel.check({jobs["plain"]: ["a", "a"], jobs["lightning"]: ["b", "b"]})
    with pytest.raises(Stopped, match="not as `sync` says"):  # gradients were to be sent
        parallel.check({jobs["plain"]: ["a", "b"]})
    with pytest.raises(Stopped, match="not as `sync` says"):  # and were not to be
        parallel.check({jobs["plain"]._replace(sync=False): ["a", "a"]})


TINY = [sys.executable, "-m", "bench.parallel", "--rounds", "2", "--steps", "5"]
TINY += ["--devices", "1 2", "--batch-sizes", "32"]


def running(name):
    """The processes whose command line has this text: their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_the_measurement(tmp_path):
    shutil.copy(PAGE, tmp_path / "scale.md")
    command = [*TINY, "--output", str(tmp_path / "scale")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "scale" / "parallel.json").read_text())
    assert set(found) == {"setting", "machine", "versions", "steps", "all_reduce"}
    assert found["setting"] == {"rounds": 2, "steps": 5, "threads": 1, "gradient_bytes": 248_024}
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    measured = {(r["side"], r["batch_size"], r["devices"], r["sync"]) for r in found["steps"]}
    sides = ("plain", "lightning")
    assert measured == {(s, 32, n, sync) for s in sides for n in (1, 2) for sync in (True, False)}
    assert [(r["devices"], r["bytes"]) for r in found["all_reduce"]] == [
        (2, size) for size in workers.SIZES
    ]
    for row in found["steps"] + found["all_reduce"]:
        assert len(row["seconds"]) == 2 and all(0 < x < 60 for x in row["seconds"]), row
    page = (tmp_path / "scale.md").read_text(encoding="utf-8")
    assert page == report.fill(PAGE.read_text(encoding="utf-8"), report.blocks(found))
    assert page != PAGE.read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "scale").iterdir()} == {
        "parallel.json",
        "parallel.png",
    }
    assert not running(str(tmp_path))
    count("measurements of both sides, with equal weights", len(found["steps"]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(stop, tmp_path):
    command = [*TINY, "--rounds", "100000", "--output", str(tmp_path / "scale")]
    started = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(running(str(tmp_path))) < 4:  # the command, and one and two processes
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.1)
    time.sleep(5)
    if stop == signal.SIGINT:
        os.killpg(started.pid, stop)  # as the terminal does
    else:
        started.send_signal(stop)
    _, said = started.communicate(timeout=60)
    assert started.returncode == (130 if stop == signal.SIGINT else -stop)
    if stop == signal.SIGINT:
        assert said.splitlines()[-1] == "Stopped by Ctrl-C; what was written until now is kept."
        assert "Traceback" not in said, said
    until = time.monotonic() + 30
    while (left := running(str(tmp_path))) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    assert not list((tmp_path / "scale").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_ends_is_said_in_one_sentence(tmp_path):
    command = [*TINY, "--rounds", "100000", "--output", str(tmp_path / "scale")]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(found := running(str(tmp_path))) < 4:
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.1)
    time.sleep(5)
    os.kill(max(found), signal.SIGKILL)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 1 and not running(str(tmp_path))
    assert said.splitlines()[-1] == "Process 1 of 2 was ended by SIGKILL."
    assert "Traceback" not in said, said
