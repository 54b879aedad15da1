"""Checkpoints: written whole, read without running them, refused in one sentence."""

from common import checkpoints
from common.messages import BadInput
from common.models import DeepNet, Net, SmallNet, Transfer
from common.networks import NETWORKS, identify

import collections
import functools
import hashlib
import os
import pickle
import resource
import stat
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import count, lessons
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

SETTINGS = {"lesson": "cifar", "data": "shapes", "classes": list("abcdefghij"), "lr": 0.1}


class Lit(L.LightningModule):
    def __init__(self, model, settings):
        super().__init__()
        self.model = model
        self.save_hyperparameters(settings)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def training_step(self, batch, batch_idx):
        return self.model(batch).pow(2).mean()


@functools.cache
def trained():
    """The bytes of a checkpoint that a Trainer wrote after two steps, and the network."""
    torch.manual_seed(0)
    net = Net()
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # few workers load the data
        trainer.fit(Lit(net, SETTINGS), DataLoader(torch.randn(8, 3, 32, 32), batch_size=4))
        path = Path(folder, "lightning.ckpt")
        trainer.save_checkpoint(path)
        return path.read_bytes(), net.eval()


def write_all(folder):
    """Write the same weights in all the forms there are: {name of the form: path}."""
    content, net = trained()
    paths = {name: folder / f"{name}.ckpt" for name in ("bare", "plain", "lightning", "parallel")}
    state = net.state_dict()
    torch.save(state, paths["bare"])
    checkpoints.save(
        paths["plain"], {"state_dict": state, "epoch": 1, "hyper_parameters": SETTINGS}
    )
    paths["lightning"].write_bytes(content)
    torch.save(nn.DataParallel(net).state_dict(), paths["parallel"])
    return paths


def equal(a, b):
    """Tell whether two contents are the same to the bit, types and order included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused(path, *expected):
    """Read a file that must be refused in one sentence with all of `expected` in it."""
    return said(lambda: checkpoints.read(path), path, *expected)


def said(call, *expected):
    with pytest.raises(BadInput) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    for text in expected:
        assert str(text) in sentence, sentence
    count("checkpoints refused")
    return sentence


SMALL = {
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3), "seen": torch.tensor(7)},
    "epoch": 3,
    "hyper_parameters": {"classes": ["cat", "dog"], "lr": 0.1, "pair": (1, None, True)},
}


# Writing.


def test_what_was_saved_is_read(tmp_path):
    path = tmp_path / "not" / "yet" / "there.ckpt"
    checkpoints.save(path, SMALL)
    assert equal(checkpoints.read(path), SMALL)
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    checkpoints.save(path, {**SMALL, "epoch": 4})  # over the one that is there
    assert checkpoints.read(path)["epoch"] == 4
    assert not equal(checkpoints.read(path), SMALL)


def test_what_a_gpu_saved_is_read_without_it(tmp_path):
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            # The device stands once, at the first tensor.
            archive.writestr(name, part.replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:9"))
    assert b"cuda:9" in path.read_bytes()
    assert equal(checkpoints.read(path), SMALL)
    assert checkpoints.read(path)["state_dict"]["weight"].device.type == "cpu"


def test_the_name_of_a_file_does_not_change_its_bytes(tmp_path):
    sums = set()
    for name in ("best.ckpt", "last.ckpt"):
        checkpoints.save(tmp_path / name, SMALL)
        sums.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(sums) == 1


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "best.ckpt", []

    def fsync(handle):
        assert os.fstat(handle).st_size > 1000  # nothing is left in a buffer of Python's
        done.append("fsync")

    replace = Path.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda *both: done.append("rename") or replace(*both))
    checkpoints.save(path, SMALL)
    assert done == ["fsync", "rename"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_breaks_off_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    before = path.read_bytes()

    def break_off(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(BadInput if error is OSError else error):
        checkpoints.save(path, {"epoch": 4})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_what_the_system_says_it_is(tmp_path):
    """torch.save hides the system's error behind one of its own, which would be a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BadInput, match=r"could not be written \(File too large\)"):
            checkpoints.save(tmp_path / "best.ckpt", {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# Damaged files.


def test_torch_writes_true_sums_and_does_not_look_at_them(tmp_path):
    """Why `read` looks itself: where this fails, PyTorch has begun to."""
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            assert zlib.crc32(archive.read(member)) == member.CRC
    content = bytearray(path.read_bytes())
    place = content.find(SMALL["state_dict"]["weight"].numpy().tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    wrong = torch.load(path, weights_only=True)
    assert not equal(wrong, SMALL) and wrong["state_dict"]["weight"].shape == (2, 3)
    refused(path, "is cut short or altered, in its part '", "/data/0'")


def test_a_part_marked_as_a_folder_is_refused(tmp_path):
    """torch.load would return whatever was in the memory before, and no error."""
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(b"/data/0"))
    content[entry + 38] |= 0x10  # where the zip format has the attributes that MS-DOS gives a file
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].shape == (2, 3)
    refused(path, "is cut short or altered, in its part '", "/data/0'")


@pytest.mark.parametrize("flip", [0xFF, 0x01])
def test_one_altered_byte_is_refused_or_without_effect(flip, tmp_path):
    """Each byte of a file in turn. Those without effect are padding, dates and the like."""
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    content = path.read_bytes()
    harmless = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        try:
            assert equal(checkpoints.read(path), SMALL), place
            harmless += 1
        except BadInput as error:
            assert "altered" in str(error), (place, error)
    count("altered bytes refused", len(content) - harmless)
    count("altered bytes without effect", harmless)
    assert 0 < harmless < 0.8 * len(content)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    content = path.read_bytes()
    path.write_bytes(b"")
    refused(path, "is empty")
    for length in [*range(4, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path, "is cut short or altered")


def test_an_altered_byte_of_a_real_network(tmp_path):
    for path in write_all(tmp_path).values():
        content = bytearray(path.read_bytes())
        before = checkpoints.read(path)
        # In the tensors, which are nearly all of the file, each must be noticed.
        for place in range(10_000, 240_000, 23_003):
            content[place] ^= 0x10
            path.write_bytes(content)
            try:
                assert equal(checkpoints.read(path), before)
            except BadInput as error:
                assert "cut short or altered" in str(error)
                count("altered bytes refused")
            else:
                pytest.fail(f"{path.name}, byte {place}: not noticed")
            content[place] ^= 0x10


# What is no checkpoint.


def test_files_that_are_not_there_or_cannot_be_read(tmp_path):
    refused(tmp_path / "nope.ckpt", "nope.ckpt' cannot be read (No such file or directory)")
    refused(tmp_path, "cannot be read (Is a directory)")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    refused(tmp_path / "loop.ckpt", "cannot be read (")
    if os.geteuid():  # the superuser may read everything
        locked = tmp_path / "locked.ckpt"
        checkpoints.save(locked, SMALL)
        locked.chmod(0)
        refused(locked, "cannot be read (Permission denied)")


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "best.ckpt"
    for text in (
        "epoch,loss\n1,2.3\n",
        "cat\ndog\nbird\n",
        "conv\n",
        "PK\n",
        "x" * 5000,
        ".",
        "N.",
    ):
        path.write_text(text)
        assert "run)" not in refused(path)
    Image.new("RGB", (32, 32)).save(path, "PNG")
    refused(path, "is not a checkpoint at all")
    torch.save(Net().state_dict(), path, _use_new_zipfile_serialization=False)
    refused(path, "the format that PyTorch wrote before 1.6")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, but the files are there
        torch.jit.save(torch.jit.script(Net()), path)
    refused(path, "is a TorchScript archive")
    for names in ({}, {"readme": "text"}, {"archive/data/0": "x"}):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "text")
            for name, text in names.items():
                archive.writestr(name, text)
        refused(path, "is a zip archive, but not one that torch.save wrote")


def test_a_small_file_cannot_become_huge_in_memory(tmp_path):
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, SMALL)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", packed) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        if packed == zipfile.ZIP_STORED:
            assert equal(checkpoints.read(path), SMALL)  # otherwise it is a good one
    refused(path, "not one that torch.save wrote")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], 3, None, "text"])
def test_content_that_is_no_dict(content, tmp_path):
    torch.save(content, tmp_path / "best.ckpt")
    refused(tmp_path / "best.ckpt", f"holds a {type(content).__name__}, not a dict")


# Files that would run code.


class Calls:
    """What unpickles into a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def zipped(pickled, path):
    with zipfile.ZipFile(path, "w") as archive:
        parts = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", ["system", "eval"])
@pytest.mark.parametrize("place", ["alone", "beside weights"])
def test_code_is_named_and_not_run(place, call, protocol, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "best.ckpt"
    hostile = {
        "system": Calls(os.system, (f"touch '{trace}'",)),
        "eval": Calls(eval, (f"open({str(trace)!r}, 'w').close()",)),
    }[call]
    name = {"system": f"{os.system.__module__}.system", "eval": "builtins.eval"}[call]
    if call == "eval" and protocol < 3:
        name = "__builtin__.eval"  # as Python 2 called it
    content = hostile
    if place == "beside weights":
        content = {"state_dict": collections.OrderedDict(a=collections.OrderedDict()), "x": hostile}
    pickled = pickle.dumps(content, protocol)
    path.write_bytes(pickled)
    refused(path, f"would call {name}, which is code", "nothing of it was run", "expected")
    zipped(pickled, path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        refused(path, f"would call {name}, which is code", "nothing of it was run", "expected")
    assert not warned  # nothing is printed but the sentence
    if place == "beside weights":
        content["state_dict"] = Net().state_dict()
        torch.save(content, path, pickle_protocol=protocol) if protocol >= 2 else None
        refused(path, f"would call {name}, which is code", "nothing of it was run", "expected")
    assert not trace.exists()
    pickle.loads(pickled)  # the file is a real one: this runs it
    assert trace.exists()
    count("files with code refused")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_whole_network_is_code_too(protocol, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(Net(), path, pickle_protocol=protocol)
    refused(path, "would call common.models.Net,")
    torch.save(nn.Linear(2, 3), path, pickle_protocol=protocol)
    refused(path, "would call torch.nn.modules.linear.Linear,")
    # The second of two names out of one module, whose name is written once.
    both = [collections.OrderedDict(), collections.deque()]
    torch.save(both, path, pickle_protocol=protocol)
    refused(path, "would call collections.deque,")
    with path.open("wb") as file:
        pickle.dump(Net(), file, protocol)
    refused(path, "would call common.models.Net,")


def test_what_is_not_to_be_read_for_another_reason(tmp_path):
    path = tmp_path / "best.ckpt"
    for pickled in (b"", b"\x80\x02.", b"\x80\x02}", b"\x80\x02(u.", b"\x80\x02Q."):
        zipped(pickled, path)
        refused(path, "or holds something else than tensors")
    with zipfile.ZipFile(path, "w") as archive:  # torch.load takes the first folder for its own
        archive.writestr("other/version", b"3\n")
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    refused(path, "or holds something else than tensors")


# Weights of both sides.


def test_weights_of_both_sides_are_the_same(tmp_path):
    _, net = trained()
    wanted = dict(net.state_dict())
    for form, path in write_all(tmp_path).items():
        content = checkpoints.read(path)
        assert equal(checkpoints.weights(content, path), wanted), form
        other = Net()
        assert not equal(dict(other.state_dict()), wanted)
        assert equal(checkpoints.load(other, path), content)
        assert equal(dict(other.state_dict()), wanted), form
        count("forms of checkpoints loaded")
    lightning = checkpoints.read(tmp_path / "lightning.ckpt")
    assert list(lightning["state_dict"]) == [f"model.{name}" for name in wanted]
    assert lightning["hyper_parameters"] == SETTINGS and lightning["global_step"] == 2
    assert "pytorch-lightning_version" in lightning


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module.", "module.model."])
def test_prefixes_are_taken_off_all_names(prefix, tmp_path):
    path = tmp_path / "best.ckpt"
    bare = {"a.weight": torch.ones(2), "model.b": torch.zeros(1), "module.c": torch.zeros(1)}
    state = {prefix + name: tensor for name, tensor in bare.items()}
    if prefix:
        assert equal(checkpoints.weights({"state_dict": state}, path), bare)
        assert equal(checkpoints.weights(state, path), bare)
        state["criterion.weight"] = torch.ones(1)
        call = lambda: checkpoints.weights(state, path)  # noqa: E731
        said(call, path, "'criterion.weight'", f"begin with '{prefix.split('.')[0]}.'")
    else:
        said(lambda: checkpoints.weights(state, path), "'a.weight'", "begin with 'model.'")


@pytest.mark.parametrize("own", ["model", "module"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_network_with_a_part_called_model(own, parts, tmp_path):
    """The names of the network to fill decide what belongs to a wrapper."""
    path = tmp_path / "best.ckpt"
    names = [own, "head"][:parts]
    net, other = (nn.ModuleDict({name: nn.Linear(2, 3) for name in names}) for _ in range(2))
    for prefix in ("", "model.", "module.", "model.module.", "module.model."):
        state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
        checkpoints.save(path, {"state_dict": state})
        for tensor in other.state_dict().values():
            tensor.zero_()
        checkpoints.load(other, path)
        assert equal(dict(other.state_dict()), dict(net.state_dict())), prefix


NOT_WEIGHTS = {
    "nothing": ({}, "holds no weights"),
    "an empty state_dict": ({"state_dict": {}}, "holds no weights"),
    "a list": ({"state_dict": [torch.zeros(1)]}, "holds no weights"),
    "settings alone": ({"epoch": 3}, "has 'epoch'"),
    "a number": ({"state_dict": {"a": torch.zeros(1), "b": 0.5}}, "has 'b'"),
    "a name that is none": ({"state_dict": {1: torch.zeros(1)}}, "has 1 where"),
    "a sparse tensor": ({"a": torch.eye(3).to_sparse()}, "has 'a'"),
    "a tensor without numbers": ({"a": torch.zeros(3, device="meta")}, "has 'a'"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_are_no_weights(name, tmp_path):
    content, expected = NOT_WEIGHTS[name]
    path = tmp_path / "best.ckpt"
    checkpoints.save(path, content)
    read = checkpoints.read(path)
    said(lambda: checkpoints.weights(read, path), path, expected)
    said(lambda: checkpoints.load(Net(), path), path, expected)


def changed(**changes):
    state = Net().state_dict()
    for name, tensor in changes.items():
        name = name.replace("_", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


MISFITS = {
    "missing": (changed(fc3_bias=None, fc3_weight=None), ["2 missing (the first: 'fc3.weight')"]),
    "unexpected": (changed(fc4_bias=torch.zeros(1)), ["1 unexpected (the first: 'fc4.bias')"]),
    "another shape": (
        changed(fc3_bias=torch.zeros(9), fc3_weight=torch.zeros(9, 84)),
        ["2 of another", "'fc3.weight', float32 [9, 84] instead of float32 [10, 84])"],
    ),
    "another type": (
        changed(fc3_bias=torch.zeros(10).half()),
        ["'fc3.bias', float16 [10] instead of float32 [10]"],
    ),
    "one number for ten": (changed(fc3_bias=torch.zeros(1)), ["float32 [1] instead of"]),
    "two faults": (
        changed(conv1_bias=None, conv3_bias=torch.zeros(6)),
        ["1 missing (the first: 'conv1.bias') and 1 unexpected (the first: 'conv3.bias')"],
    ),
}


@pytest.mark.parametrize("side", ["plain", "lightning"])
@pytest.mark.parametrize("name", MISFITS)
def test_nothing_is_loaded_of_what_does_not_fit(name, side, tmp_path):
    state, expected = MISFITS[name]
    path = tmp_path / "best.ckpt"
    prefix = "model." if side == "lightning" else ""
    checkpoints.save(path, {"state_dict": {prefix + key: state[key] for key in state}})
    net = Net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    said(lambda: checkpoints.load(net, path), path, "does not fit Net: ", *expected)
    assert equal(dict(net.state_dict()), before)


# Which network it is.


def test_every_network_of_the_lessons_is_known():
    titles = []
    for network in NETWORKS:
        with torch.device("meta"):
            state = network.make().state_dict()
        # As many numbers as the real one, but of one stored: VGG16 has 134 million.
        state = {
            name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            for name, tensor in state.items()
        }
        content = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
        for saved in (state, content):
            found = checkpoints.weights(saved, Path("x"))
            assert list(found) == list(state)  # no network's own names look like a wrapper's
            # Where two lessons have the same network, the lesson's name decides.
            assert identify(found, network.lesson) is network
        titles.append(network.title)
        count("networks identified")
    assert {title.split()[0] for title in titles} == set(lessons())
    assert len(titles) == len(set(titles)) == len(lessons()) + 5
    assert "finetune resnet18" in titles


def test_identifying_changes_no_random_number():
    """A lesson that asks which network it has must go on as one that does not."""
    weights = DeepNet().state_dict()
    before = torch.get_rng_state()
    assert identify(weights).lesson == "callbacks"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_lesson_decides_between_equal_networks():
    weights = Net().state_dict()
    assert identify(weights).lesson == "cifar"
    assert identify(weights, "parallel").lesson == "parallel"
    assert identify(weights, "cifar").lesson == "cifar"
    assert identify(weights, "callbacks").lesson == "cifar"  # that one does not fit


def test_an_unknown_network():
    weights = Net().state_dict()
    weights["fc3.weight"] = torch.zeros(100, 84)
    sentence = said(lambda: identify(weights), "the nearest is cifar, with 1 of")
    known = "(cifar, fashion, callbacks, when, resume, optimize, gan, tokens, parallel, parallel "
    assert f"{known}batch norm, fabric, predict, speed, speed small, " in sentence
    assert identify(SmallNet().state_dict()).choice == "small"
    assert "'fc3.weight', float32 [100, 84] instead of float32 [10, 84]" in sentence
    other = Transfer("resnet18").state_dict()
    del other["head.bias"]
    said(
        lambda: identify(other),
        "the nearest is finetune resnet18, with 1 missing",
        "'head.bias'",
    )
