"""docs/migration.md: each step of it is gone through, and must say what the page says."""

from common import ROOT

import re
import subprocess
import sys
import types

import lightning as L
import pytest
import torch
from helpers import count
from samebits import Trace, callback, compare

FOLDER = ROOT / "docs" / "migration"
PAGE = (ROOT / "docs" / "migration.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def mended(diff):
    """The old and the new lines of a diff."""
    lines = diff.splitlines(keepends=True)
    return tuple("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")


def module(name, source):
    made = types.ModuleType(name)
    exec(source, made.__dict__)
    return made


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import loop

    yield loop
    del sys.modules["loop"]


def test_the_page_goes_from_the_first_port_to_the_last(loop, tmp_path):
    source, texts = (FOLDER / "port.py").read_text(), blocks("text")
    changes = [mended(diff) for diff in blocks("diff")]
    for old, new in reversed(changes):
        assert source.count(new) == 1, new
        source = source.replace(new, old)
    assert len(changes) == 4 and len(texts) == 5
    data, new_texts = loop.make_texts(1000, seed=0), loop.make_texts(1000, seed=1)
    accuracies = []
    for number, text in enumerate(texts):
        torch.manual_seed(0)
        net = loop.TextNet()
        with Trace(net, path=tmp_path / "loop.trace"):
            loop.train(net, *data)
        accuracies.append(loop.accuracy(net, *new_texts))
        torch.manual_seed(0)
        net = loop.TextNet()
        port = module("port", source)
        port.train(net, *data, callbacks=[callback(L.Callback, tmp_path / "port.trace")])
        accuracies.append(loop.accuracy(net, *new_texts))
        assert str(compare(tmp_path / "loop.trace", tmp_path / "port.trace")) + "\n" == text
        count("steps of the migration page")
        if number < len(changes):
            assert source.count(changes[number][0]) == 1
            source = source.replace(*changes[number])
    assert source == (FOLDER / "port.py").read_text()
    shown = re.findall(r"\| the (?:loop|port as first written) \| (.*) % \|", PAGE)
    assert [float(value) for value in shown] == pytest.approx(
        [100 * accuracy for accuracy in accuracies[:2]], abs=0.051
    )
    assert accuracies[-1] == accuracies[-2] == accuracies[0]


def test_the_page_shows_the_lines_of_the_files():
    test = (FOLDER / "test_port.py").read_text() + (FOLDER / "port.py").read_text()
    for block in blocks("python"):
        for line in block.splitlines():
            code = line.split("  #")[0].strip()
            code = code.replace('path="loop.trace"', 'path=tmp_path / "loop.trace"')
            code = code.replace('"port.trace")])', 'tmp_path / "port.trace")])')
            assert not code or code in test or "import" in code, line
            count("lines of the migration page")


@pytest.mark.slow
def test_its_own_test_passes_anywhere(tmp_path):
    """As a reader runs it: in a process of its own, from another folder."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", FOLDER / "test_port.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout
