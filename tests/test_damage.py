"""A hostile, damaged or huge trace ends in one sentence, and takes no more than is bearable."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from helpers import count
from samebits import BadInput, Trace, check, compare, files, read
from samebits.ranks import check_ranks, compare_ranks
from torch import nn


def make(path, rate=0.1):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with Trace(net, path=path):
        optimizer = torch.optim.SGD(net.parameters(), rate)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(torch.randn(6, 3)), torch.arange(6) % 2).backward()
            optimizer.step()
    return path


def outcome(*paths, what=compare):
    """What comes of a comparison, or of a check: a diagnosis, or one sentence."""
    try:
        return str(what(*paths))
    except BadInput as error:
        assert "\n" not in str(error) and str(error).endswith("."), error
        return str(error)


def altered(content, draw):
    content = bytearray(content)
    for _ in range(2):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def signed(lines):
    """Lines of a trace, with a digest that fits: only somebody hostile makes them."""
    end = json.loads(lines[-1])
    end["digest"] = files.hashlib.sha256("".join(f"{x}\n" for x in lines[:-1]).encode()).hexdigest()
    return gzip.compress(("\n".join([*lines[:-1], json.dumps(end)]) + "\n").encode(), 1)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_two_bytes_altered(number, tmp_path):
    """In the file as it lies there: its checksums find nearly all."""
    a, b = make(tmp_path / "a.trace"), make(tmp_path / "b.trace", rate=0.2)
    whole, usual, draw = b.read_bytes(), outcome(a, b), random.Random(0)
    refused = 0
    for _ in range(number):
        b.write_bytes(altered(whole, draw))
        said = outcome(a, b)
        refused += said.startswith("'")
        assert said.startswith("'") or said == usual, said
    assert refused > 0.9 * number
    count("traces with two bytes altered", number)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_two_bytes_altered_and_signed_again(number, tmp_path):
    """In its text, with checksums that fit: any diagnosis is good, any error is one sentence."""
    a, b = make(tmp_path / "a.trace"), make(tmp_path / "b.trace", rate=0.2)
    text, draw = ("\n".join(read(b)) + "\n").encode(), random.Random(1)
    for _ in range(number):
        lines = altered(text, draw).decode(errors="replace").split("\n")[:-1]
        try:
            b.write_bytes(signed(lines))
        except (ValueError, TypeError):
            b.write_bytes(gzip.compress("\n".join(lines).encode(errors="replace"), 1))
        outcome(a, b)
    count("hostile traces", number)


@pytest.mark.parametrize("number", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_values_of_another_kind(number, tmp_path):
    """Each part of a trace replaced by something else."""
    a, b = make(tmp_path / "a.trace"), make(tmp_path / "b.trace", rate=0.2)
    lines, draw, ranks = read(b), random.Random(2), tmp_path / "r.trace"
    make(tmp_path / "r.rank0.trace")
    strange = [None, [], {}, "", "\x1b[2J", -1, 1e308, 10**30, True, [[[]]], {"bits": 1}]
    for _ in range(number):
        parts = [json.loads(line) for line in lines]
        place = draw.choice(parts)
        while isinstance(place, dict | list) and place:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or draw.random() < 0.2:
                place[key] = draw.choice(strange)
                break
            place = place[key]
        b.write_bytes(signed([json.dumps(part) for part in parts]))
        said = outcome(a, b)
        assert "\x1b" not in said
        # Looked at alone, and as the second of two processes.
        (tmp_path / "r.rank1.trace").write_bytes(b.read_bytes())
        for paths, way in (([b], check), ([ranks], check_ranks), ([ranks, ranks], compare_ranks)):
            outcome(*paths, what=way)
    count("traces with other values", number)


def test_huge_and_nested_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    good, path = make(tmp_path / "a.trace"), tmp_path / "it.trace"
    huge = gzip.compress(b"0" * (1 << 24))
    deep = b"[" * 200_000
    for content, said in (
        (huge, "holds more than"), (gzip.compress(huge), "no trace"), (gzip.compress(deep), "no"),
        (gzip.compress(b'{"trace": 2}\n' + deep + b"\n{}"), "no trace"), (deep, "no trace"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(BadInput, match=said):
            compare(good, path)
        count("huge traces refused")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        ended = subprocess.run(
            [sys.executable, "-m", "samebits", str(path), str(path)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
        count("refusals of what is no file")
