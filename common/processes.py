"""Starts one process for each device, by PyTorch's torchrun, and says in one sentence how they end.

What torchrun itself says of a failure are forty lines. Its engine is used as it is; this only
writes its command line, and reads its errors.
"""

from common import checkpoints, resume
from common.data import Data
from common.messages import BadInput, Stopped, clear_messages
from common.options import Options, parse_options
from common.recipes import Recipe
from common.runs import MetricsFile, Run, code_sha256, config_of, finish, versions

import contextlib
import ctypes
import logging
import os
import shlex
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

if sys.platform == "linux":
    import fcntl

CARRY_ON = "carry on with the same options and --ckpt-path last"
# Settings that may change when a run is carried on, if not its bits.
FREE = ("devices", "num_nodes", "strategy", "threads")
# Where the processes find what the one that started them has to tell: its number, and the name of a
# file that is there as soon as any of this machine's processes have begun to train.
STARTED_BY, BEGUN = "PARALLEL_STARTED_BY", "PARALLEL_BEGUN"
LOST = 3  # how a process ends that lost another one: it is not the one to ask what happened


def command_line(lesson: str, run: Callable[[Any, Options], Run]) -> None:
    """Run a lesson as one of torchrun's processes, or start torchrun on its script."""
    with clear_messages():
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            _start(*parse_options(lesson))
            return
        _end_with(os.environ.get(STARTED_BY))
        if os.environ["RANK"] != "0":  # what all would print, the first one prints
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        refused = Path(os.environ[BEGUN]).with_name("refused") if BEGUN in os.environ else None
        if refused and refused.exists():  # torchrun tries again what the user must mend first
            raise BadInput(refused.read_text())
        try:
            finish(run(*parse_options(lesson)))
        except BadInput as error:
            if refused:  # to be renamed in one go: all may refuse at the same moment
                part = refused.with_suffix(f".{os.getpid()}")
                part.write_text(f"{error}")
                part.replace(refused)
            raise
        except RuntimeError as error:
            if not is_lost(error):
                raise
            said = str(error).splitlines()[0]
            raise Stopped(
                f"Another process ended, or was not heard of for --timeout ({said}): the training "
                f"ends here; {CARRY_ON}.",
                LOST,
            ) from None
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error means that another process ended, or was not heard of."""
    # torch.distributed's own errors, and those of gloo, which have no class of their own.
    words = ("gloo", "pair closure", "closed by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _end_with(parent: str | None) -> None:
    """Let the system end this process when torchrun, which started it, is killed; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent and os.getppid() != int(parent):  # it was killed before
            sys.exit(1)


def _start(recipe: Any, options: Options) -> None:
    """Start torchrun and wait for it; raise Stopped with the sentence of what went wrong."""
    command = ["--nnodes", f"{recipe.num_nodes}", "--nproc-per-node"]
    # DataParallel is one process, with a thread for each GPU.
    command += [f"{1 if recipe.strategy == 'dp' else options.devices}"]
    command += ["--max-restarts", f"{recipe.max_restarts}"]
    if recipe.num_nodes == 1:
        address = "127.0.0.1"
        command += ["--standalone", "--local-addr", address]
    else:
        address, rendezvous = _rendezvous(recipe)
        command += rendezvous
    # gloo would listen where the machine's name leads, which on Debian and Ubuntu is the machine
    # itself: no other one would reach it.
    if interface := _interface(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    command += sys.argv
    for name, value in (("--devices", options.devices), ("--num-nodes", recipe.num_nodes)):
        if not any(word.partition("=")[0] == name for word in sys.argv):
            command += [name, f"{value}"]
    print("Starting: torchrun", shlex.join(command), flush=True)
    logging.disable()  # what torchrun has to say is said below
    os.environ |= {"OMP_NUM_THREADS": f"{options.threads}", STARTED_BY: f"{os.getpid()}"}
    # Each start gets a new store: torchrun's own would keep the addresses of processes that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[BEGUN] = f"{folder}/begun"
            torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        raise _ended(error.failures, options.devices * recipe.num_nodes) from None
    except SignalException as error:
        name = "Ctrl-C" if error.sigval == signal.SIGINT else error.sigval.name
        raise Stopped(f"Stopped by {name}; {CARRY_ON}.", 128 + error.sigval) from None
    except RendezvousTimeoutError:
        raise Stopped(
            f"In {recipe.timeout} seconds not all of the {recipe.num_nodes} machines came to "
            f"{recipe.rdzv_endpoint}: type the same command on each of them, with the same "
            "--num-nodes and --rdzv-endpoint, or give them more time with --timeout.",
            2,
        ) from None
    except RendezvousError as error:
        raise Stopped(
            f"The meeting point {recipe.rdzv_endpoint} cannot be reached, or the machine that "
            f"kept it is gone ({error.__cause__ or error}): start again on all; {CARRY_ON}.",
            2,
        ) from None


def _interface(address: str) -> str | None:
    """Return the name of the network interface with this address; None if it is not found."""
    if sys.platform != "linux":
        return None
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # this one has no address
                found = fcntl.ioctl(
                    probe, 0x8915, struct.pack("256s", name.encode())
                )  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _rendezvous(recipe: Any) -> tuple[str, list[str]]:
    """Return this machine's address, and the options with which the machines find each other.

    Raises BadInput where the address is no machine's, or another program has its port here.
    """
    if not recipe.rdzv_endpoint:
        raise BadInput(
            f"--num-nodes {recipe.num_nodes} needs the place where the machines meet; give each of "
            "them the same --rdzv-endpoint, the name or address of the first one and a free port, "
            "such as 10.0.0.1:29400."
        )
    host, _, port = recipe.rdzv_endpoint.rpartition(":")
    wait = f"join_timeout={recipe.timeout},read_timeout={recipe.timeout}"
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            address = socket.gethostbyname(host)
            probe.connect((address, int(port)))  # sends nothing, but tells by which way it would
        except OSError as error:
            raise BadInput(
                f"--rdzv-endpoint {recipe.rdzv_endpoint} is no machine that can be reached from "
                f"here ({error.strerror}); name the first of the machines."
            ) from None
        ours = probe.getsockname()[0]  # by which the other machines reach this one
    if ours != address:
        if not _answers(address, int(port), recipe.timeout):
            raise BadInput(
                f"in {recipe.timeout} seconds no torchrun answered at --rdzv-endpoint "
                f"{recipe.rdzv_endpoint}; start the training on that machine too, or name another "
                "port, or more seconds by --timeout."
            )
    elif _is_free(address, int(port)):
        if not address.startswith("127."):  # torchrun knows that address as this machine's
            wait += ",is_host=1"
    elif not _answers(address, int(port), 5):  # no torchrun of the same training
        raise BadInput(
            f"the port {port} of --rdzv-endpoint is used by another program on this machine; name "
            "another one."
        )
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"]
    options += ["--rdzv-id", recipe.lesson, "--rdzv-conf", wait, "--local-addr", ours]
    return ours, options


def _answers(address: str, port: int, seconds: int) -> bool:
    """Tell whether a torchrun answers there within these seconds.

    In a thread of its own: TCPStore would wait for ever for a program that says nothing.
    """
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(dist.TCPStore(address, port, timeout=timedelta(seconds=seconds)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _is_free(address: str, port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _ended(failures: dict[int, ProcessFailure], world: int) -> Stopped:
    """Return the sentence about the processes of this machine that failed, by rank."""
    began = min(failure.timestamp for failure in failures.values())

    def late(failure: ProcessFailure) -> int:
        """Rank who lost another process, and last those whom torchrun itself then ended."""
        # It sends SIGTERM, and SIGKILL after 30 seconds to those that do not listen.
        unheard = failure.exitcode == -signal.SIGKILL and failure.timestamp > began + 20
        return 2 if unheard or failure.exitcode == -signal.SIGTERM else failure.exitcode == LOST

    rank, failure = min(failures.items(), key=lambda item: late(item[1]))
    if failure.exitcode < 0:
        return Stopped(
            f"Process {rank} of {world} was ended by {failure.signal_name()}, and the others "
            f"with it; what was saved until then is kept: {CARRY_ON}.",
            1,
        )
    if isinstance(failure.message, dict):
        status = 1 if failure.exitcode == LOST else failure.exitcode
        return Stopped(failure.message["message"].strip(), status)
    return Stopped(f"Process {rank} of {world} failed, with the error above; {CARRY_ON}.", 1)


def refuse_what_the_trainer_lacks(recipe: Any) -> None:
    """Raise BadInput for what only the plain side can do."""
    if recipe.strategy == "dp":
        raise BadInput(
            "--strategy dp is DataParallel, which the Trainer dropped in 2.0; use --strategy ddp, "
            "or the plain side."
        )
    if recipe.strategy == "fsdp" and recipe.precision == "64-true":
        raise BadInput(
            "the Trainer's ModelParallelStrategy does not support --precision 64-true; use "
            "--strategy ddp, or the plain side."
        )


def in_turn(load: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in one process of each machine first, then in the others: it may download."""
    first = os.environ["LOCAL_RANK"] == "0"
    if not first:
        dist.barrier()
    result = load(*arguments)
    if first:
        dist.barrier()
    return result


def begin(
    recipe: Any, options: Options, data: Data, side: str
) -> tuple[dict[str, Any], Path, Path | None]:
    """Return the settings of the run, its folder, and the checkpoint to carry on from, if any.

    The first process decides and makes the folder, the others hear of it; all must call. Where
    torchrun started any of them again, all carry on from the last checkpoint. (It counts a restart
    after a failure, but none because a machine came back; nor does it know whether the one before
    had begun.)

    Raises BadInput, in all of them, with the first setting that is not the same everywhere, and
    where the checkpoint cannot be carried on from.
    """
    settings = config_of(recipe, options, data) | {"side": side}
    mine = settings | versions() | {"code": code_sha256(side)}
    restarts, begun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get(BEGUN)
    again = Path(begun).exists() if begun else restarts != "0"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), again, mine))
    first, _, ours = everyone[0]
    for rank, (machine, _, theirs) in enumerate(everyone):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise BadInput(
                    f"the processes do not do the same: {name} is {ours.get(name)!r} in process 0 "
                    f"on {first}, and {theirs.get(name)!r} in process {rank} on {machine}; type "
                    "the same command on each machine."
                )
    if any(again for _, again, _ in everyone):
        recipe = replace(recipe, ckpt_path="last")
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [resume.begin(recipe, options, side, settings, FREE, best_too=False)]
    dist.broadcast_object_list(found)
    folder, path = found[0]
    if begun:
        Path(begun).touch()
    if path and not path.is_file():
        raise BadInput(
            f"process {dist.get_rank()} on {socket.gethostname()} does not see the checkpoint "
            f"'{path}'; name a --runs-dir that all machines share."
        )
    return settings, folder, path


def average(values: Tensor) -> Tensor:
    """Return the mean over all processes, each of which must call this with its own values."""
    dist.all_reduce(values)
    return values / dist.get_world_size()


def gather(
    losses: list[Tensor], order: dict[int, list[int]], batches: int, batch_size: int
) -> dict[str, Any]:
    """Return what a checkpoint keeps of all processes, beside weights and optimizer; all must call.

    `losses` are those of each batch on this process, `order` the samples that were handed out in
    each epoch to all, `batches` the number of an epoch.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (torch.stack(losses).cpu(), resume.random_states()))
    return resume.made_with() | {
        "reason": "not stopped",
        "batches": len(losses),
        "losses": torch.stack([losses for losses, _ in everyone], dim=1),  # [batches, processes]
        "random": {rank: states for rank, (_, states) in enumerate(everyone)},
        "order": resume.trained_on(order, len(losses), batches, batch_size),
    }


def take_up(run: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Return this process's losses of what `gather` kept, and set its random generators.

    Where other processes wrote it, more or fewer, each takes the mean loss of all, and the
    generators stay as they are: the bits are no longer those of a run that was never stopped.
    """
    rank, losses = dist.get_rank(), run["losses"]
    if losses.shape[1] != dist.get_world_size():
        return list(losses.mean(dim=1).to(device))
    resume.set_random_states(run["random"][rank])
    return list(losses[:, rank].to(device))


class Training:
    """What the plain side's processes train and keep."""

    model: nn.Module
    optimizer: Optimizer
    loader: DataLoader
    batches: int  # of one epoch

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        settings: dict[str, Any],
        folder: Path,
        path: Path | None,
    ) -> None:
        """Load the weights of the checkpoint at `path` into the network, before FSDP splits it."""
        self.net, self.device, self.settings, self.folder = net, device, settings, folder
        self.checkpoint = checkpoints.load(net, path) if path else None
        self.log = MetricsFile(folder)
        self.steps = 0
        self.losses: list[Tensor] = []

    def write(self, epoch: int, stage: str, values: dict[str, Any]) -> None:
        """Add a row to metrics.csv, in the first process alone: two would mix their rows."""
        if dist.get_rank() == 0:
            step = self.steps if stage == "test" else self.steps - 1
            self.log.write(epoch, step, stage, values)

    def save(self, epoch: int) -> None:
        """Write a checkpoint: all processes must call, the first one writes."""
        sampler: Any = self.loader.sampler
        size = self.settings["batch_size"]
        run = gather(self.losses, sampler.handed_out, self.batches, size)
        weights, optimizer = whole((self.net.state_dict(), self.optimizer.state_dict()))
        if dist.get_rank() > 0:
            return
        content = {
            "epoch": epoch,
            "global_step": self.steps,
            "state_dict": weights,
            "optimizer_states": [optimizer],
            "lr_schedulers": [],
            "run": run | {"rows": self.log.rows},
            "hyper_parameters": self.settings,
        }
        resume.save(self.folder / "checkpoints" / f"step_{self.steps:08d}.ckpt", content)

    def load(self) -> None:
        """Take all from the checkpoint but the weights, if there is one to carry on from."""
        if not self.checkpoint:
            return
        run, sampler = self.checkpoint["run"], cast(Any, self.loader.sampler)
        self.optimizer.load_state_dict(
            split(self.checkpoint["optimizer_states"][0], self.optimizer)
        )
        self.steps = self.checkpoint["global_step"]
        sampler.carry_on({epoch: order.tolist() for epoch, order in run["order"].items()})
        if dist.get_rank() == 0:
            self.log.write_again(run["rows"])
        self.losses = take_up(run, self.device)


def whole(state: Any) -> Any:
    """Return a state_dict with the tensors that FSDP split put together; all processes must call.

    Without FSDP nothing is split, and nothing changes.
    """
    return tree_map(lambda part: part.full_tensor() if isinstance(part, DTensor) else part, state)


def split(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state_dict, whole, split as FSDP split the optimizer's parameters."""
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
    return state | {"state": parts}


def whole_model(
    net: nn.Module, optimizer: Optimizer, recipe: Recipe
) -> tuple[nn.Module, Optimizer]:
    """Return network and optimizer as one process alone would have them; all must call."""
    weights, state = whole(net.state_dict()), whole(optimizer.state_dict())
    if not any(isinstance(p, DTensor) for p in net.parameters()):
        return net, optimizer
    alone = recipe.model().to(next(iter(weights.values())))
    alone.load_state_dict(weights)
    again = type(optimizer)(alone.parameters(), **optimizer.defaults)
    again.load_state_dict(state)
    return alone, again
