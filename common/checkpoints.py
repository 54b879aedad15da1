"""Checkpoints of both sides: saved whole or not at all, and read without running what is in them.

A checkpoint is what torch.save made of a dict: a bare state_dict (weights.pt), a plain
{"state_dict": ..., "epoch": ..., "hyper_parameters": ...}, or Lightning's, which has the same
names and puts "model." before every weight's.
"""

from common.files import open_regular
from common.folders import HALF
from common.messages import BadInput

import contextlib
import os
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn

# What wrappers put before the name of every weight: a LightningModule that keeps the network as
# `self.model`, DataParallel and DDP, and one in the other.
PREFIXES = ("model.module.", "module.model.", "model.", "module.")
ALTERED = "is cut short or altered"
# How a file begins that PyTorch wrote before 1.6: a pickled number, then further pickles.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What the pickle of a dict of tensors names. torch.load alone judges what may be read; this only
# finds, in a pickle that it refused, the name to tell.
USUAL = re.compile(r"collections\.OrderedDict|torch\.(_\w+\._rebuild)?\w+")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint: whole or not at all, also if the machine stops.

    `content` may hold tensors, numbers, strings, None, and lists, tuples and dicts of these;
    `read` takes nothing else. The same content gives the same bytes under every name. The folder is
    made where it is missing. Raises BadInput where the system refuses, as when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=HALF, suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        # The open file, not its name: torch.save would write that name into it.
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # or the new name might reach the disk before the content
        temporary.chmod(0o644)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save hides what the system said, such as that the disk is full, behind its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise BadInput(
            f"the checkpoint '{path}' could not be written ({cause.strerror}); those before it are "
            "whole: make room for it, or name another folder by --runs-dir."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors on the CPU; nothing in the file is run.

    Raises BadInput where the file is missing or unreadable, cut short, altered, not written by
    torch.save, holds anything but tensors and plain values, or holds no dict.
    """
    try:
        with open_regular(path) as file:
            if fault := _fault(file):
                _refuse(path, fault)
            content = _load(path, file)
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror})")
    if not isinstance(content, dict):
        _refuse(path, f"holds a {type(content).__name__}, not a dict")
    return content


def _refuse(path: Path, fault: str) -> NoReturn:
    raise BadInput(
        f"the checkpoint '{path}' {fault}; a state_dict or a checkpoint that one of these lessons "
        "wrote was expected: name another file, or run the lesson again."
    )


def _fault(file: IO[bytes]) -> str | None:
    """Say why an open file is no whole archive of torch.save's; None if it is one.

    torch.save writes a zip archive, and into it the true CRC-32 of every part, but torch.load looks
    at none of them: with one byte of a tensor altered, it returns another number and no error. So
    they are checked here. Also, torch.load reads nothing of a part that one bit in the archive
    marks as a folder, and returns what was in the memory before.
    """
    head = file.read(2**20)
    if not head:
        return "is empty"
    if head.startswith(LEGACY):
        return "has the format that PyTorch wrote before 1.6"
    begins = b"PK\x03\x04".startswith(head[:4])
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            # torch.save packs nothing: a packed part may be small in the file and huge in memory.
            packed = any(part.compress_type for part in parts)
            folders = [part.filename for part in parts if part.external_attr & 0x10]  # that bit
            broken = None if packed else archive.testzip() or next(iter(folders), None)
    except Exception:  # an altered byte can raise anything
        return ALTERED if begins else _code(head) or "is not a checkpoint at all"
    if not begins:
        return ALTERED
    if broken:
        return f"{ALTERED}, in its part {broken!r}"
    names = {part.filename.partition("/")[2] for part in parts}
    if "constants.pkl" in names:
        return "is a TorchScript archive, a program and not a dict of weights"
    if "data.pkl" not in names or packed:
        return "is a zip archive, but not one that torch.save wrote"
    return None


def _load(path: Path, file: IO[bytes]) -> Any:
    """Return what an archive without `_fault` holds; raise BadInput where torch.load refuses it."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it then refuses with an exception
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # what is written in order to harm can raise anything
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
            fault = _code(archive.read(pickles[0]))
    _refuse(
        path,
        fault
        or f"{ALTERED}, or holds something else than tensors, numbers, strings, lists and dicts",
    )


def _code(pickle: bytes) -> str | None:
    """Say which function or class a pickle would call; None if none, or if it is no pickle.

    The pickle is taken apart, never run.
    """
    steps: list[tuple[str, Any]] = []
    with contextlib.suppress(Exception):  # cut off in the middle, or no pickle
        for opcode, argument, _ in pickletools.genops(pickle):
            steps.append((opcode.name, argument))
    found: list[str] = []
    strings, memo = [""], dict[int, str]()
    for step, argument in steps:
        if step in ("GLOBAL", "INST"):
            found.append(argument.replace(" ", "."))
        elif step == "STACK_GLOBAL":  # its module and its name are the last two strings
            found.append(".".join(strings[-2:]))
        elif step == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif step in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = strings[-1]
        elif step in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(argument, ""))
        elif isinstance(argument, str):
            strings.append(argument)
    names = [name for name in found if re.fullmatch(r"[\w.]+", name) and not USUAL.fullmatch(name)]
    # A text that begins with the letter c can look like a pickle too, but not up to the end.
    if not names or not (pickle.startswith(b"\x80") or steps[-1][0] == "STOP"):
        return None
    return f"would call {names[0]}, which is code and no weights (nothing of it was run)"


def weights(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the network's own state_dict, whichever side wrote the checkpoint.

    What a wrapper put before the names (PREFIXES) is taken off where all of them have it. `path`
    is for the sentence. Raises BadInput where there are no weights, where one is no tensor of
    numbers, and where some names have a wrapper's prefix and others do not.
    """
    state = _state(content, path)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for prefix in ("model.", "module."):
        without = [name for name in state if not name.startswith(prefix)]
        if len(without) < len(state):
            _refuse(path, f"has {without[0]!r} beside weights whose names begin with '{prefix}'")
    return state


def _state(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state_dict as it was saved; raise BadInput unless all of it are named tensors."""
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        _refuse(path, "holds no weights")
    for name, tensor in state.items():
        # Sparse and meta tensors have no number for every place.
        if not isinstance(name, str) or not (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
        ):
            _refuse(path, f"has {name!r} where a named tensor of weights should be")
    return dict(state)


def load(model: nn.Module, path: Path) -> dict[str, Any]:
    """Read a checkpoint and put its weights into a model; return all that the checkpoint holds.

    Raises BadInput as `read` and `fill` do; the model is then unchanged.
    """
    content = read(path)
    fill(model, content, path)
    return content


def fill(model: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a checkpoint that was read from `path` into a model: all or none.

    Raises BadInput, and leaves the model as it was, where a weight is missing or unexpected, or
    has another shape or type.
    """
    wanted, state = model.state_dict(), _state(content, path)
    # The model's own names decide first: its only part may itself be called `model`.
    for prefix in ("", *PREFIXES):
        if state.keys() == {prefix + name for name in wanted}:
            found = {name: state[prefix + name] for name in wanted}
            break
    else:
        found = weights(content, path)
    if faults := differences(wanted, found):
        fault = f"does not fit {type(model).__name__}: {say(faults)}"
        from common.networks import identify  # which imports this module

        with contextlib.suppress(BadInput):
            fault += f", since it is of {identify(found).title}"
        _refuse(path, fault)
    model.load_state_dict(found)


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names that are missing, unexpected or of another form, for each kind if any."""
    kinds = {
        "missing": [repr(name) for name in wanted if name not in found],
        "unexpected": [repr(name) for name in found if name not in wanted],
        "of another shape or type": [
            f"{name!r}, {_form(found[name])} instead of {_form(tensor)}"
            for name, tensor in wanted.items()
            if name in found and _form(found[name]) != _form(tensor)
        ],
    }
    return {kind: names for kind, names in kinds.items() if names}


def say(faults: dict[str, list[str]]) -> str:
    """Say how many weights differ in which way, and the first of each."""
    return " and ".join(
        f"{len(names)} {kind} (the first: {names[0]})" for kind, names in faults.items()
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
