"""Files that are damaged, edited or no files at all: one sentence, and never "they differ"."""

from common import checkpoints, predict
from common.messages import BadInput, clear_messages
from common.networks import NETWORKS
from common.proof import parity
from common.proof.compare import compare_results
from common.run import ready

import contextlib
import copy
import json
import os
import resource
import shutil
import socket
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT, SIDES, count, load_lesson, some, train
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_parts import CHANGES, changed, places


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for side in SIDES:
            train(side, folder, monkeypatch)
    return folder


def args_of(folder):
    args = load_lesson("plain", "cifar").Args(runs_dir=folder, accelerator="cpu", data="shapes")
    return ready(args, ROOT / "plain" / "cifar.py")


def compared(folder):
    """What `parity` does with two results: None where they are refused, else whether they agree."""
    try:
        a, b = (parity.read_result(side, args_of(folder)) for side in SIDES)
        return compare_results(a, b).agree if a and b else None
    except BadInput as refused:
        assert "\n" not in str(refused) and str(refused).endswith("."), refused
        return None


# result.json.


WHOLE = ["", "[]", "null", "3", "true", '"text"', "{}", "{", "[" * 100_000, "NaN", "1e999", "\0",
         '{"lesson": "cifar"}', '{"lesson": null}', "\xff", '{"train_loss": []}', "{]"]  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
def test_what_is_no_result_is_refused(side, both, tmp_path):
    folder = shutil.copytree(both, tmp_path / "runs")
    assert compared(folder) is True
    path = folder / "cifar" / side / "result.json"
    for text in WHOLE:
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(BadInput, match="remove it, and let that side run again"):
            parity.read_result(side, args_of(folder))
        count("broken results refused")
    path.unlink()
    assert parity.read_result(side, args_of(folder)) == {}


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "a tensor"])
def test_a_result_that_was_edited_is_refused_or_read_without_a_traceback(change, both, tmp_path):
    """Each part in turn; a number in the place of a number may differ, and nothing else may."""
    folder = shutil.copytree(both, tmp_path / "runs")
    path = folder / "cifar" / "lightning" / "result.json"
    whole = json.loads(path.read_text())
    refused = tried = 0
    for place in places(whole):
        if place[0] in ("train_loss", "confusion_matrix", "code_sha256") and str(place[-1]) > "1":
            continue
        other = changed(copy.deepcopy(whole), place, CHANGES[change])
        path.write_text(json.dumps(other))
        verdict = compared(folder)
        assert verdict in (None, True, False)
        if change in ("None", "in a list") and place[0] not in ("hyperparameters", "fingerprints"):
            assert verdict is None or "loss" in place[0] or "f1" in place[0], place
        refused, tried = refused + (verdict is None), tried + 1
    assert tried >= 100 and refused >= 20
    count("results with an altered part, refused or compared", tried)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_bytes_of_a_result(both_module, data):
    folder, whole = both_module
    path = folder / "cifar" / "plain" / "result.json"
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    assert compared(folder) in (None, True, False)
    count("results with altered bytes, refused or compared")


@pytest.fixture(scope="module")
def both_module(both, tmp_path_factory):
    folder = shutil.copytree(both, tmp_path_factory.mktemp("bytes") / "runs")
    return folder, (folder / "cifar" / "plain" / "result.json").read_bytes()


def test_a_broken_result_never_says_that_they_differ(both, tmp_path, monkeypatch, capsys):
    """The whole command, with its exit status."""
    folder = shutil.copytree(both, tmp_path / "runs")
    monkeypatch.setattr(parity, "why_run", lambda *_: "")
    argv = ["cifar", "--runs-dir", str(folder), "--data", "shapes"]
    path = folder / "cifar" / "plain" / "result.json"
    whole = json.loads(path.read_text())
    for broken in (["a list"], None, {k: v for k, v in whole.items() if k != "fingerprints"},
                   whole | {"test_accuracy": "high"}, whole | {"side": "lightning"}):  # fmt: skip
        path.write_text(json.dumps(broken))
        with pytest.raises(SystemExit) as end, clear_messages(failed=2):
            sys.exit(parity.main(argv))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        count("broken results refused")


# Checkpoints that are read for their weights.


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return NETWORKS[0].make()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_checkpoint_whose_parts_are_of_another_kind(every, network, picture, tmp_path, capsys):
    known = {"lesson": "cifar", "data": "shapes", "classes": list("abcdefghij"), "lr": 0.1}
    whole = {"state_dict": dict(network.state_dict()), "epoch": 1, "global_step": 3,
             "hyper_parameters": known, "optimizer_states": [], "random": {}}  # fmt: skip
    path, tried = tmp_path / "x.ckpt", 0
    kinds = [None, 3, 2.5, True, "text", "\x1b[31m", [], {}, [[]], {"a": {}}, (1,), torch.zeros(3),
             torch.zeros(2, 3), torch.zeros(0), 10**30, float("nan"), {1: 2}, b"bytes",
             torch.zeros(3, dtype=torch.complex64), torch.zeros(1).expand(10**12)]  # fmt: skip
    for place in list(places(whole))[::every]:
        for kind in kinds:
            torch.save(changed(whole, place, lambda _: kind), path)  # noqa: B023
            with contextlib.suppress(BadInput):
                predict.main([str(path), str(picture)])
            tried += 1
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said and tried >= 600 // every - 20
    count("checkpoints with an altered part, refused or answered", tried)


def test_a_part_that_is_there_many_times_is_looked_at_once(tmp_path):
    """A list of two lists that are one, fifty deep: 2^50 parts, and 50 lists."""
    from common.proof.evidence_file import form

    deep = []
    for _ in range(50):
        deep = [deep, deep]
    assert len(form({"a": deep})) == 16
    deep.append(deep)
    assert len(form({"a": deep})) == 16


# What is no regular file.


@pytest.fixture(params=["a FIFO", "/dev/zero", "/dev/stdin", "a socket", "a folder", "a loop",
                        "/dev/full", "/proc/self/mem"])  # fmt: skip
def strange(request, tmp_path):
    name = request.param
    if name.startswith("/"):
        if not os.path.exists(name):
            pytest.skip(f"there is no {name}")
        return name
    path = tmp_path / "strange"
    if name == "a FIFO":
        os.mkfifo(path)
    elif name == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif name == "a folder":
        path.mkdir()
    else:
        path.symlink_to("strange")
    return str(path)


def in_time(do, seconds=20):
    """Call it in a thread: what hangs shall not hang the tests."""
    found = []
    thread = threading.Thread(target=lambda: found.append(do()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


def refused(call):
    def do():
        try:
            call()
        except BadInput as error:
            return str(error)
        return "not refused"

    return in_time(do)


def test_only_regular_files_are_read(strange, network, picture, both, tmp_path):
    path = tmp_path / "x.ckpt"
    checkpoints.save(path, {"state_dict": network.state_dict()})
    for call in (
        lambda: checkpoints.read(type(path)(strange)),
        lambda: predict.main([strange, str(picture)]),
        lambda: predict.main([str(path), strange]),
    ):
        said = refused(call)
        assert "cannot be read" in said or "is cut short" in said or "empty" in said, said
        count("files that are none, refused")
    folder = shutil.copytree(both, tmp_path / "runs")
    result = folder / "cifar" / "plain" / "result.json"
    result.unlink()
    result.symlink_to(strange)
    said = refused(lambda: parity.read_result("plain", args_of(folder)))
    assert "cannot be read" in said or "is cut short" in said, said
    in_time(lambda: predict.about({}, result.with_name("weights.pt")))
    count("files that are none, refused", 2)


def test_data_files_that_are_no_files(tmp_path):
    from common import download

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    os.mkfifo(folder / "data_batch_1")
    said = refused(lambda: download.read_real("cifar10", tmp_path))
    assert "is missing, cut short or altered" in said
    count("files that are none, refused")


# Pictures that are small in the file, and huge in memory.


SIZES = [(30_000_000, 1), (1, 88_000_000), (88_000_000, 1), (2, 40_000_000), (30_000, 2_000),
         (2_000, 30_000), (1, 1), (1, 1000)]  # fmt: skip


@pytest.mark.parametrize("size", some(SIZES, every=3), ids=str)
def test_a_picture_takes_no_more_memory_than_its_middle(size, tmp_path):
    path = tmp_path / "long.png"
    Image.new("1", size).save(path)
    network = NETWORKS[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(BadInput):
        assert predict.picture(path, network).shape == (1, 3, 32, 32)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 700_000, f"{more / 1e6:.1f} GB"  # kilobytes
    count("pictures")


def test_the_middle_of_a_long_picture_is_the_same(tmp_path):
    """What is cut off first changes no bit of what is left."""
    from PIL import ImageOps

    draw = np.random.RandomState(0)
    for size in ((500, 60), (60, 500), (401, 64), (64, 401), (203, 100), (100, 205), (90, 90)):
        image = Image.fromarray(draw.randint(0, 256, (size[1], size[0], 3), np.uint8))
        expected = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(predict._square(image, "RGB", 32)), np.asarray(expected))
        count("pictures")
