"""Starts one process for each device, by PyTorch's torchrun, and says in one sentence how they end.

What torchrun itself says of a failure are forty lines. Its engine is used as it is; this only
writes its command line, and reads its errors.
"""

from common.messages import BadInput, Stopped
from common.processes import BEGUN, LOST, RESUME, STARTED_BY, begin, in_process
from common.run import Options, refuse_batch

import contextlib
import logging
import os
import re
import shlex
import signal
import socket
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

if sys.platform == "linux":
    import fcntl


def _started_here() -> int:
    """Return how many processes torchrun, typed by hand, started on this machine; 2 without it."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdecimal() and int(told) else 2


@dataclass(kw_only=True)
class Processes(Options):
    """What a lesson with several processes can also be asked."""

    devices: int = field(default_factory=_started_here)
    """one process for each: GPUs, or processes on the CPU where there is none"""
    num_nodes: int = 1  # machines; type the same command on each
    rdzv_endpoint: str = ""  # HOST:PORT, where they meet: the first one's name, and a free port
    timeout: int = 300  # seconds for which processes wait for each other

    after_failure: ClassVar[str] = "start it again with the same options"

    @classmethod
    def in_process(cls) -> contextlib.AbstractContextManager[None]:
        """Return what each process runs the lesson in."""
        return in_process(cls.after_failure)

    def check_devices(self) -> None:
        """Refuse what several processes cannot do; "auto" becomes the CPU where there is no GPU."""
        _check_devices(self)

    def start_processes(self) -> bool:
        """Start torchrun, and return True when it has done it all; False in its processes.

        Raises Stopped where a process, or the meeting of several machines, failed.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return False
        _start(self)
        return True

    def begin(self) -> None:
        """Let all processes agree, and find the checkpoint to resume from."""
        begin(self)


@dataclass(kw_only=True)
class ProcessOptions(Processes):
    """The same for a lesson that can be resumed."""

    max_restarts: int = 0  # how often all are started again, from the last checkpoint, if one ends
    ckpt_path: str | None = None
    """the checkpoint to resume from: last, or a file of the same side, also if other devices wrote
    it"""

    after_failure: ClassVar[str] = RESUME


def _check_devices(args: Any) -> None:
    """Refuse what several processes cannot do.

    Without a CUDA GPU, the processes share the CPU: gloo, by which they talk then, knows no MPS.
    """
    cores, strategy = os.cpu_count() or 1, getattr(args, "strategy", "ddp")
    if args.accelerator == "cpu" or (args.accelerator == "auto" and not torch.cuda.is_available()):
        args.accelerator = "cpu"
        if args.devices > 4 * cores:
            raise BadInput(
                f"--devices {args.devices} asks for as many processes, and {4 * cores} are the "
                f"most for the {cores} cores here; use --devices {4 * cores}, or GPUs."
            )
        if strategy == "dp" and args.devices > 1:
            raise BadInput(
                "--strategy dp splits batches over CUDA GPUs, and none is used here; use "
                "--strategy ddp, which runs on the CPU, too."
            )
        if getattr(args, "sync_batchnorm", False):
            raise BadInput(
                "--sync-batchnorm needs CUDA GPUs, and none is used here: PyTorch has it for GPUs "
                "alone; leave it out."
            )
    if strategy == "dp" and args.num_nodes > 1:
        raise BadInput(
            "--strategy dp is one process, and --num-nodes asks for several machines; use "
            "--strategy ddp."
        )
    if args.side == "lightning":
        _refuse_what_the_trainer_lacks(strategy, getattr(args, "precision", ""))
    host, _, port = args.rdzv_endpoint.rpartition(":")
    # A name on the internet: parts of at most 63 letters, digits and hyphens (RFC 1123).
    part = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
    known = len(host) < 254 and re.fullmatch(rf"{part}(\.{part})*\.?", host)
    fits = known and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536
    if args.rdzv_endpoint and not fits:
        raise BadInput(
            f"--rdzv-endpoint '{args.rdzv_endpoint}': expected HOST:PORT, a machine's name or IPv4 "
            "address and a port from 1 to 65535, such as 10.0.0.1:29400."
        )
    world = args.devices * args.num_nodes
    told = os.environ.get("WORLD_SIZE", "")
    started = int(told) if told.isdecimal() else world  # what is left over was removed
    if strategy != "dp" and started != world:
        raise BadInput(
            f"torchrun started {started} processes, and --devices {args.devices} with "
            f"--num-nodes {args.num_nodes} are {world}; leave out these options, or name the same "
            "numbers."
        )
    if args.batch_size % world:
        refuse_batch(args.batch_size, world, args.num_nodes)


def _refuse_what_the_trainer_lacks(strategy: str, precision: str) -> None:
    if strategy == "dp":
        raise BadInput(
            "--strategy dp is DataParallel, which the Trainer dropped in 2.0; use --strategy ddp, "
            "or the plain side."
        )
    if strategy == "fsdp" and precision == "64-true":
        raise BadInput(
            "the Trainer's ModelParallelStrategy does not support --precision 64-true; use "
            "--strategy ddp, or the plain side."
        )


def _start(args: Any) -> None:
    """Start torchrun and wait for it; raise Stopped with the sentence of what went wrong."""
    command = ["--nnodes", f"{args.num_nodes}", "--nproc-per-node"]
    # DataParallel is one process, with a thread for each GPU.
    command += [f"{1 if getattr(args, 'strategy', '') == 'dp' else args.devices}"]
    command += ["--max-restarts", f"{getattr(args, 'max_restarts', 0)}"]
    if args.num_nodes == 1:
        address = "127.0.0.1"
        command += ["--standalone", "--local-addr", address]
    else:
        address, rendezvous = _rendezvous(args)
        command += rendezvous
    # gloo would listen where the machine's name leads, which on Debian and Ubuntu is the machine
    # itself: no other one would reach it.
    if interface := _interface(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    command += sys.argv
    for name, value in (("--devices", args.devices), ("--num-nodes", args.num_nodes)):
        if not any(word.partition("=")[0] == name for word in sys.argv):
            command += [name, f"{value}"]
    print("Starting: torchrun", shlex.join(command), flush=True)
    logging.disable()  # what torchrun has to say is said below
    os.environ |= {"OMP_NUM_THREADS": f"{args.threads}", STARTED_BY: f"{os.getpid()}"}
    # Each start gets a new store: torchrun's own would keep the addresses of processes that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[BEGUN] = f"{folder}/begun"
            torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        world = args.devices * args.num_nodes
        raise _ended(error.failures, world, args.after_failure) from None
    except SignalException as error:
        name = "Ctrl-C" if error.sigval == signal.SIGINT else error.sigval.name
        said = f"Stopped by {name}; {args.after_failure}."
        raise Stopped(said, 128 + error.sigval) from None
    except RendezvousTimeoutError:
        raise Stopped(
            f"In {args.timeout} seconds not all of the {args.num_nodes} machines came to "
            f"{args.rdzv_endpoint}: type the same command on each of them, with the same "
            "--num-nodes and --rdzv-endpoint, or give them more time with --timeout.",
            2,
        ) from None
    except RendezvousError as error:
        raise Stopped(
            f"The meeting point {args.rdzv_endpoint} cannot be reached, or the machine that "
            f"kept it is gone ({error.__cause__ or error}): start again on all; "
            f"{args.after_failure}.",
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


def _rendezvous(args: Any) -> tuple[str, list[str]]:
    """Return this machine's address, and the options with which the machines find each other.

    Raises BadInput where the address is no machine's, or another program has its port here.
    """
    if not args.rdzv_endpoint:
        raise BadInput(
            f"--num-nodes {args.num_nodes} needs the place where the machines meet; give each of "
            "them the same --rdzv-endpoint, the name or address of the first one and a free port, "
            "such as 10.0.0.1:29400."
        )
    host, _, port = args.rdzv_endpoint.rpartition(":")
    wait = f"join_timeout={args.timeout},read_timeout={args.timeout}"
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            address = socket.gethostbyname(host)
            probe.connect((address, int(port)))  # sends nothing, but tells by which way it would
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "there is no such name"
            raise BadInput(
                f"--rdzv-endpoint {args.rdzv_endpoint} is no machine that can be reached from "
                f"here ({why}); name the first of the machines."
            ) from None
        ours = probe.getsockname()[0]  # by which the other machines reach this one
    if ours != address:
        if not _answers(address, int(port), args.timeout):
            raise BadInput(
                f"in {args.timeout} seconds no torchrun answered at --rdzv-endpoint "
                f"{args.rdzv_endpoint}; start the training on that machine too, or name another "
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
    options += ["--rdzv-id", args.lesson, "--rdzv-conf", wait, "--local-addr", ours]
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


def _ended(failures: dict[int, ProcessFailure], world: int, advice: str) -> Stopped:
    """Return the sentence about the processes of this machine that failed, by rank."""
    began = min(failure.timestamp for failure in failures.values())

    def late(failure: ProcessFailure) -> int:
        """Rank who lost another process, and last those whom torchrun itself then ended."""
        # It sends SIGTERM, and SIGKILL after 30 seconds to those that do not listen.
        unheard = failure.exitcode == -signal.SIGKILL and failure.timestamp > began + 20
        ended = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        return 2 if unheard or ended else failure.exitcode == LOST

    rank, failure = min(failures.items(), key=lambda item: late(item[1]))
    if failure.exitcode < 0:
        return Stopped(
            f"Process {rank} of {world} was ended by {failure.signal_name()}, and the others "
            f"with it; what was saved until then is kept: {advice}.",
            1,
        )
    if isinstance(failure.message, dict):
        status = 1 if failure.exitcode == LOST else failure.exitcode
        return Stopped(failure.message["message"].strip(), status)
    return Stopped(f"Process {rank} of {world} failed, with the error above; {advice}.", 1)
