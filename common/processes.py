"""What the processes of one training use: they agree, resume together, and tell each other values.

Before they begin to train, they meet at the store by which PyTorch's processes find each other. In
the training, they talk through the process group that the lesson opens.
"""

from common import resume
from common.data import Data
from common.messages import BadInput, Stopped
from common.signals import end_with_parent

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

RESUME = "resume with the same options and --ckpt-path last"
# Settings that may change when a run is resumed, if not its bits.
FREE = ("devices", "num_nodes", "strategy")
# What a checkpoint of such a lesson holds.
PARTS = {"epoch": int, "global_step": int, "optimizer_states": list, "random": list}
# Where the processes find what the one that started them has to tell: its number, and the name of a
# file that is there as soon as any of this machine's processes have begun to train.
STARTED_BY, BEGUN = "PARALLEL_STARTED_BY", "PARALLEL_BEGUN"
GONE = "a process ended"  # what it leaves at the store
LOST = 3  # how a process ends that lost another one: it is not the one to ask what happened


# From here on: how a process begins, and how it ends.


@contextlib.contextmanager
def in_process(after_failure: str) -> Iterator[None]:
    """Be one of torchrun's processes while the block runs; alone, nothing is done.

    Where another process is lost, `after_failure` says what to do.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    _end_with(os.environ.get(STARTED_BY))
    if os.environ["RANK"] != "0":  # what all would print, the first one prints
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    refused = Path(os.environ[BEGUN]).with_name("refused") if BEGUN in os.environ else None
    if refused and refused.exists():  # torchrun tries again what the user must mend first
        raise BadInput(refused.read_text())
    try:
        yield
    except BadInput as error:
        if refused:  # to be renamed in one go: all may refuse at the same moment
            part = refused.with_suffix(f".{os.getpid()}")
            part.write_text(f"{error}")
            part.replace(refused)
        _say_gone()
        raise
    except RuntimeError as error:
        _say_gone()
        if not is_lost(error):
            raise
        said = str(error).splitlines()[0]
        raise Stopped(
            f"Another process ended, or was not heard of for --timeout ({said}): the training "
            f"ends here; {after_failure}.",
            LOST,
        ) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _say_gone() -> None:
    """Tell the processes of other machines, which may wait at the store, that this one ends."""
    for store in _stores.values():
        with contextlib.suppress(RuntimeError):  # nobody is there any more
            store.set(GONE, "")


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error means that another process ended, or was not heard of."""
    # torch.distributed's own errors, and those of gloo, which have no class of their own.
    words = ("gloo", "pair closure", "closed by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _end_with(parent: str | None) -> None:
    """Let this process be killed when torchrun, which started it, is."""
    end_with_parent(signal.SIGKILL)
    if parent and os.getppid() != int(parent):  # it was killed before
        sys.exit(1)


# From here on: before they train.


_stores: dict[tuple[str, str], Any] = {}  # kept: rank 0 holds them open


def _store(timeout: int) -> Any:
    """Return the store at which the process group will meet."""
    place = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if place not in _stores:
        found = dist.rendezvous("env://", timeout=timedelta(seconds=timeout))
        _stores[place] = next(found)[0]
    return _stores[place]


def leave(what: str, mine: Any, timeout: int) -> list[Any]:
    """Leave word for the other processes, and return what each of them left, by rank.

    All must call. It needs no process group, which the lesson opens later.
    """
    store = _store(timeout)
    rank, everyone = int(os.environ["RANK"]), range(int(os.environ["WORLD_SIZE"]))
    store.set(f"{what} {rank}", json.dumps(mine))
    _wait(store, [f"{what} {each}" for each in everyone], timeout)
    found = [json.loads(store.get(f"{what} {each}")) for each in everyone]
    store.set(f"{what}, read by {rank}", "")
    if rank == 0:  # with it the store ends: not before all have read
        _wait(store, [f"{what}, read by {each}" for each in everyone], timeout)
    return found


def _wait(store: Any, keys: list[str], timeout: int) -> None:
    """Wait until all keys are there; raise DistError where a process ended or time is over."""
    until = time.monotonic() + timeout
    while not store.check(keys):
        if store.check([GONE]) or time.monotonic() > until:
            raise dist.DistError(f"waited for {', '.join(keys)}")
        time.sleep(0.02)


def begin(args: Any) -> None:
    """Let all processes agree on the settings, and on the checkpoint to resume from, if any.

    The first process finds the checkpoint, the others hear of it; all must call. Sets
    args.ckpt_path, a Path or None, and args.begun_at, the checkpoint's step. Where torchrun started
    any of them again, all resume from the last checkpoint. (It counts a restart after a failure,
    but none because a machine came back; nor does it know whether the one before had begun.)

    Raises BadInput, in all of them, with the first setting that is not the same everywhere, and
    where the training cannot be resumed from the checkpoint.
    """
    from common.proof.fingerprints import code_sha256, sha256, versions

    code = sha256(repr(code_sha256(args.side)).encode())
    mine = args.settings() | versions() | {"side": args.side, "code": code}
    del mine["data"]  # what "auto" finds, `in_turn` compares
    restarts, begun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get(BEGUN)
    again = Path(begun).exists() if begun else restarts != "0"
    agree(mine, args.timeout)
    restarted = any(leave("started again", again, args.timeout))
    if not hasattr(args, "ckpt_path"):  # it cannot be resumed
        return
    if restarted:
        args.ckpt_path = "last"
    rank = int(os.environ["RANK"])
    if rank == 0 and args.ckpt_path:
        resume.begin(args, FREE, best_too=False, parts=PARTS)
    found = [str(args.ckpt_path or ""), args.begun_at, args.data]
    path, args.begun_at, data = leave("resumes", found, args.timeout)[0]
    args.ckpt_path = Path(path) if path else None
    args.data = data if path else args.data
    if begun:
        Path(begun).touch()
    if path and not Path(path).is_file():
        raise BadInput(
            f"process {rank} on {socket.gethostname()} does not see the checkpoint '{path}'; name "
            "a --runs-dir that all machines share."
        )


def agree(mine: dict[str, Any], timeout: int) -> None:
    """Raise BadInput, in all processes, unless all of them have the same settings."""
    everyone = leave(f"has {', '.join(mine)}", [socket.gethostname(), mine], timeout)
    first, ours = everyone[0]
    for rank, (machine, theirs) in enumerate(everyone):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise BadInput(
                    f"the processes do not do the same: {name} is {ours.get(name)!r} in process 0 "
                    f"on {first}, and {theirs.get(name)!r} in process {rank} on {machine}; type "
                    "the same command on each machine."
                )


def in_turn(load: Callable[..., Data], name: str, args: Any, *arguments: Any) -> Data:
    """Load the data in one process of each machine first, then in the others: it may download.

    All wait for all. Where one of them cannot load, or loads other images, none begins to train.
    """
    first = os.environ["LOCAL_RANK"] == "0"
    if not first:
        leave("first ones loaded", True, args.timeout)
    data = load(name, args, *arguments)
    if first:
        leave("first ones loaded", True, args.timeout)
    agree({"data": data.name}, args.timeout)
    return data


# From here on: while they train. They have opened a process group.


def add_up(mine: Any, device: torch.device) -> Any:
    """Return the sum over all processes of a number or a tensor; all must call."""
    kind = mine.dtype if isinstance(mine, Tensor) else torch.float64
    total = torch.as_tensor(mine, dtype=kind, device=device).clone()
    dist.all_reduce(total)
    return total.cpu() if isinstance(mine, Tensor) else total.item()


def gather(mine: Any) -> list[Any]:
    """Return the values of all processes, by rank; all must call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def whole(state: Any) -> Any:
    """Return a state_dict with the tensors that FSDP split put together; all processes must call.

    Without FSDP nothing is split, and nothing changes.
    """

    def join(part: Any) -> Any:
        if not isinstance(part, DTensor):
            return part
        # Where the Trainer has ended, they are on the CPU, and GPUs send from their memory alone.
        here: Any = part.to(part.device_mesh.device_type)
        return here.full_tensor()

    return tree_map(join, state)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's whole state_dict, split as FSDP split the optimizer's parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {}
    for index, values in state["state"].items():
        p = parameters[index]
        parts[index] = {
            name: distribute_tensor(value, p.device_mesh, p.placements)
            if isinstance(p, DTensor) and value.shape == p.shape
            else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(state | {"state": parts})


def take_random_states(everyone: list[dict[str, Any]]) -> None:
    """Put this process's generators back into the state that it had: those of all were gathered.

    Where others wrote it, more or fewer, they stay as they are: the bits are no longer those of a
    run that was never stopped.
    """
    if len(everyone) == dist.get_world_size():
        resume.set_random_states(everyone[dist.get_rank()])
