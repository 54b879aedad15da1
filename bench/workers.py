"""The processes that `bench.parallel` measures: groups of them, each asked to work in its turn."""

from common import ROOT, processes, run
from common.data import Data
from common.messages import Stopped, clear_messages
from common.models import Net
from common.proof.lessons import load

import contextlib
import ctypes
import functools
import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

USUAL = DistributedDataParallel.__init__
WARM_UP = 5  # steps before the clock starts: DDP orders its buckets anew after the first one
GRADIENTS = 4 * sum(p.numel() for p in Net().parameters())
SIZES = sorted([*(1000 * 4**n for n in range(9)), GRADIENTS])  # bytes: 1 KB to 66 MB


class Job(NamedTuple):
    """What one group measures in its turn: steps of a side, or all-reduces where there is none."""

    devices: int
    steps: int
    side: str = ""
    batch_size: int = 0
    sync: bool = True  # whether gradients are sent


@functools.cache
def lesson(side: str, name: str = "parallel") -> ModuleType:
    """Import SIDE/NAME.py, once."""
    return load(side, name)


class Clock:
    """Called after each optimizer step, on either side; takes the time of those after the warm-up.

    All processes begin together. `weights` is the digest of what the last step left.
    """

    weights = ""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.began = self.ended = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.done += 1
        if self.done == WARM_UP:
            dist.barrier()
            self.began = time.perf_counter()
        elif self.done == WARM_UP + self.steps:
            self.ended = time.perf_counter()
            # Here: before it tests, the Trainer sends the first process's weights to all.
            self.weights = _digest(optimizer)

    @property
    def seconds(self) -> float:
        assert self.ended, f"{self.done} steps were made, and not {WARM_UP + self.steps}"
        return (self.ended - self.began) / self.steps


def train(job: Job, data: Data) -> dict[str, Any]:
    """Train one side as the lesson does; return the seconds of a step, and each process's weights.

    The step is the lesson's own: fetch the batch, forward, backward, all-reduce, update.
    """
    clock, module = Clock(job.steps), lesson(job.side)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        args = module.Args(
            batch_size=job.batch_size,
            max_epochs=1,
            limit_train_batches=WARM_UP + job.steps,
            limit_val_batches=1,
            limit_test_batches=1,
            log_every_n_steps=10**9,
            accelerator="cpu",
            devices=job.devices,
            threads=1,
            refresh_rate=0,
            runs_dir=Path(folder),
        )
        args = run.ready(args, ROOT / job.side / "parallel.py")
        # The processes have met, the data is here, and nobody sees a bar.
        for name, instead in (
            ("start_process", lambda *_: None),
            ("tqdm", lambda loader, *_, **__: loader),
        ):
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, instead))
        stack.enter_context(patch.object(processes, "in_turn", lambda *_: data))
        if not job.sync:
            stack.enter_context(patch.object(DistributedDataParallel, "__init__", _begin_silent))
        stack.callback(register_optimizer_step_post_hook(clock).remove)
        module.main(args)
    weights: list[Any] = [None] * job.devices
    dist.all_gather_object(weights, clock.weights)
    return {"seconds": _slowest(clock.seconds), "weights": weights}


def _begin_silent(model: Any, *args: Any, usual: Any = USUAL, **kwargs: Any) -> None:
    """Make a DistributedDataParallel that never sends gradients, as if all were in no_sync."""
    usual(model, *args, **kwargs)
    model.require_backward_grad_sync = False


def _digest(optimizer: torch.optim.Optimizer) -> str:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = torch.cat([p.detach().flatten() for p in parameters])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def _slowest(seconds: float) -> float:
    """Return the most seconds that a process took; all must call."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def all_reduces(job: Job) -> dict[str, Any]:
    """Return the seconds of an all-reduce alone, for each size."""
    found = {}
    for size in SIZES:
        tensor = torch.zeros(size // 4)
        times = max(2, min(4 * job.steps, 2**24 // size))  # a large one needs fewer
        for number in range(times + 2):
            if number == 2:  # the first two are for warming up
                dist.barrier()
                began = time.perf_counter()
            dist.all_reduce(tensor)
        found[size] = _slowest((time.perf_counter() - began) / times)
    return {"all_reduce": found}


def work(rank: int, devices: int, port: int, pipe: Connection, data: Data) -> None:
    """Be one process of a group: do what is asked through the pipe; the first one answers."""
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: not to go on where the command is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler waits for gloo, which waits
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": f"{devices}", "LOCAL_WORLD_SIZE": f"{devices}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    os.environ["TORCHELASTIC_RUN_ID"] = "bench"  # by which the Trainer takes it for torchrun's
    # As the lesson does it: without the variable, the Trainer takes as many as there are cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with clear_messages(), Path(os.devnull).open("w") as nowhere:
        sys.stdout = nowhere  # no progress bars
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=300))
            for job in iter(pipe.recv, None):
                answer = train(job, data) if job.side else all_reduces(job)
                if rank == 0:
                    pipe.send(answer)
        except RuntimeError as error:
            if not processes.is_lost(error):
                raise
            os._exit(processes.LOST)


class Group:
    """The processes of one number of devices, and the pipes to them."""

    def __init__(self, devices: int, data: Data) -> None:
        self.devices = devices
        pairs = [multiprocessing.Pipe() for _ in range(devices)]
        self.pipes = [ours for ours, _ in pairs]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # What is imported and drawn already need not be so again. Elsewhere fork is not safe.
        system: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.processes: list[Any] = []
        for rank, (_, theirs) in enumerate(pairs):
            arguments = (rank, devices, port, theirs, data)
            self.processes.append(system.Process(target=work, args=arguments, daemon=True))
            self.processes[-1].start()

    def ask(self, job: Job) -> dict[str, Any]:
        """Let the group do a job and return its answer; raise Stopped where a process ends."""
        with contextlib.suppress(OSError, EOFError):  # a pipe to nobody: `look` says who it was
            for pipe in self.pipes:
                pipe.send(job)
            while not self.pipes[0].poll(1):
                self.look()
            return self.pipes[0].recv()
        time.sleep(1)
        self.look()
        raise Stopped(f"The first of {self.devices} processes does not answer any more.", 1)

    def look(self) -> None:
        """Raise Stopped where a process has ended; one that lost another one is asked last."""
        codes = [(rank, process.exitcode) for rank, process in enumerate(self.processes)]
        ended = [(code == processes.LOST, code, rank) for rank, code in codes if code is not None]
        for _, code, rank in sorted(ended):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "ended too early"
            raise Stopped(f"Process {rank} of {self.devices} {how}.", 1)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def groups(devices: list[int], data: Data) -> Iterator[dict[int, Group]]:
    """Start a group of processes for each number of devices; leave none behind."""
    started: dict[int, Group] = {}
    try:
        for number in devices:
            started[number] = Group(number, data)
        yield started
    finally:
        for group in started.values():
            group.end()
