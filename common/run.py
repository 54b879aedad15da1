"""Runs a lesson: `run(main, Args)` reads the command line, trains, and shows what came of it.

A lesson names its hyperparameters in a dataclass: each field is an option, and the comment beside
it is its help. `main(args)` trains and returns the network. All else happens here, around it: the
threads, the folder, what parity compares, the pictures and the final table.
"""

from common import lesson_and_side
from common.data import TO_TRAIN_ON, VALIDATION, count_batches, limit_of, processes
from common.folders import EVIDENCE, is_writable, locked, start_folder
from common.logger import check_logger
from common.messages import BadInput, clear_messages
from common.networks import data_of

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn


@dataclass(kw_only=True)
class Options:
    """What every lesson can be asked. An option that Lightning's Trainer has means the same.

    The last fields are no options: `run` and `load_images` fill them in.
    """

    seed: int = 0  # draws validation set, initial weights and order of the batches
    limit_train_batches: int | float = 1.0  # batches of an epoch: a number (10) or a share (0.1)
    limit_val_batches: int | float = 1.0  # the same for each validation
    limit_test_batches: int | float = 1.0  # the same for the test
    log_every_n_steps: int = 50  # steps between two logged losses; less in a short run: LOGGED
    data: Literal["auto", "cifar10", "fashionmnist", "shapes"] = "auto"
    """the real images or an error; shapes: the built-in drawings; auto: the real ones if they are
    here or can be downloaded, else shapes"""
    data_dir: Path = Path(os.environ.get("DATA_DIR") or "data")  # folder with the real images
    runs_dir: Path = Path("runs")  # results go to RUNS_DIR/LESSON/SIDE/
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"  # auto: a GPU, if any
    devices: int = 1  # GPUs to use
    threads: int | None = None  # CPU threads; None: 1 below batch size 128, else up to 8
    num_workers: int = 0  # processes that load batches; 0: the training one
    refresh_rate: int = 100 if sys.stdout.isatty() else 0  # steps between two bars; 0: no bar

    lesson: str = field(default="", init=False)
    side: str = field(default="", init=False)
    begun_at: int = field(default=0, init=False)  # the step of the checkpoint it is resumed from
    rows_before: list[dict[str, Any]] = field(default_factory=list, init=False)  # until then
    used_data: str = field(default="", init=False)  # cifar10, fashionmnist or shapes
    classes: tuple[str, ...] = field(default=(), init=False)
    started: bool = field(default=False, init=False)  # this process has made its folder ready

    @property
    def place(self) -> Path:
        """Where the results lie: RUNS_DIR/LESSON/SIDE."""
        return self.runs_dir / self.lesson / self.side

    @property
    def folder(self) -> Path:
        """The folder for results; made ready where it is first asked for.

        Not before: what is refused until then leaves the run that is there as it was.
        """
        folder = self.place
        # Of several processes, the first one does it.
        if not self.started and processes()[0] == 0:
            self.started = True
            if self.begun_at:
                from common import resume  # which only some lessons need

                resume.make_ready(self, folder)
            else:
                start_folder(folder)
        return folder

    def begin(self) -> None:
        """Find the checkpoint to resume from, where a lesson has --ckpt-path and it is given."""
        if getattr(self, "ckpt_path", None):
            from common import resume  # which only some lessons need

            resume.begin(self)

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on, as plain values, for checkpoints and loggers."""
        given = {own.name: getattr(self, own.name) for own in fields(self) if own.init}
        plain = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if name not in SAME_RESULT
        }
        for stage in ("train", "val", "test"):  # as texts: one batch, 1, is not all of them, 1.0
            plain[f"limit_{stage}_batches"] = str(given[f"limit_{stage}_batches"])
        found = {"data": self.used_data or self.data, "classes": list(self.classes)}
        return plain | found | {"lesson": self.lesson}


# Two runs that differ in these alone end with the same numbers.
SAME_RESULT = (
    "data_dir", "runs_dir", "num_workers", "refresh_rate", "threads", "ckpt_path", "max_time",
    "checkpoint_every_n_steps", "rdzv_endpoint", "max_restarts", "timeout",
)  # fmt: skip

# The pieces of text in one pass of the lesson tokens (common/text.py).
PIECES = 2249
# A run that would log fewer losses with its lesson's default logs this many: a curve, not a dot.
LOGGED = 10

# What a number must be, by its option's name. All others must be at least 0.
AT_LEAST_1 = (
    "max_epochs", "batch_size", "log_every_n_steps", "accumulate_grad_batches", "patience",
    "checkpoint_every_n_steps", "check_val_every_n_epoch", "devices", "num_nodes", "timeout",
    "threads",
)  # fmt: skip
SHARES = ("label_smoothing", "ema_decay", "freeze_at")
MOST = {
    "seed": 2**32 - 1, "threads": os.cpu_count() or 1, "num_workers": 1000,
    "translate": 31,  # of images with 32 pixels, whose border is mirrored
}  # fmt: skip
# Above it, float32 has no number for what a step is multiplied by: Adam's first one is 10 * lr.
MOST_LR = {"callbacks": 1e37, "speed": 1e37}


def run(main: Callable[[Any], nn.Module], args_class: type[Options]) -> None:
    """Run a lesson's `main` with the options that were typed; the last line of each script."""
    around = getattr(args_class, "in_process", contextlib.nullcontext)  # of common.launch
    with clear_messages(), around():
        args = parse(args_class, inspect.getfile(main))
        if hasattr(args, "start_processes") and args.start_processes():
            return  # they have done it
        first = processes()[0] == 0
        with locked(args.place) if first else contextlib.nullcontext():
            args.begin()
            from common.proof import watch  # the proof's imports, and matplotlib's, only now

            watch.show(watch.watch(main, args), args)


def parse(args_class: type[Options], script: str | Path, argv: Sequence[str] | None = None) -> Any:
    """Return a lesson's Args as `argv`, else the command line, says.

    Raises SystemExit(2), after one sentence on stderr, for an unknown option or a value of another
    kind; BadInput for a value that is out of range or that this machine cannot do, and for a folder
    that cannot take results.
    """
    import tyro  # and rich: half a second that importing a lesson does not need

    about = inspect.getdoc(sys.modules[args_class.__module__]) or ""
    prog = "python " + "/".join(Path(script).resolve().parts[-2:])
    try:
        args = tyro.cli(args_class, args=argv, description=about, prog=prog)
    except SystemExit as refused:
        if refused.code and "MAKELEVEL" in os.environ:  # typed behind make
            print('make takes options like this: ARGS="--max-epochs 5 --lr 0.01"', file=sys.stderr)
        raise
    return ready(args, script)


def ready(args: Any, script: str | Path) -> Any:
    """Check a lesson's Args, and add what follows from them; raise BadInput as `parse` does."""
    args.lesson, args.side = lesson_and_side(Path(script).resolve())
    for own in fields(args):
        if isinstance(path_ := getattr(args, own.name), Path):
            setattr(args, own.name, _at_home(own.name, path_))
        if own.init:
            _check_number(own.name, getattr(args, own.name), args.lesson)
    if not re.fullmatch(r"(\d\d:\d\d:\d\d:\d\d)?", getattr(args, "max_time", "")):
        raise BadInput(
            f"--max-time {args.max_time}: expected DD:HH:MM:SS, such as 00:01:30:00 for an hour "
            "and a half."
        )
    _check_devices(args)
    if args.batch_size % args.devices:
        refuse_batch(args.batch_size, args.devices)
    if args.threads is None:
        threads = default_threads(args.batch_size // args.devices)
        args.threads = min(threads, max(1, (os.cpu_count() or 1) // args.devices))
    _check_precision(getattr(args, "precision", "32-true"), args.accelerator)
    default = type(args).log_every_n_steps
    if args.log_every_n_steps == default:
        args.log_every_n_steps = min(default, max(1, planned_steps(args) // LOGGED))
    if hasattr(args, "logger"):
        check_logger(args.logger)
    if getattr(args, "onnx", False):
        check_onnx("--onnx")
    # Lightning's logger takes both for addresses, and would write elsewhere, or fail at its end.
    if fault := next((each for each in ("::", "://") if each in str(args.runs_dir.absolute())), ""):
        raise BadInput(
            f"--runs-dir '{args.runs_dir}' has '{fault}' in it, by which Lightning means other "
            "than a folder; name another folder for results."
        )
    with contextlib.suppress(OSError, ValueError):
        args.runs_dir.mkdir(parents=True, exist_ok=True)
    if not is_writable(args.runs_dir):
        raise BadInput(
            f"nothing can be written into --runs-dir '{args.runs_dir}'; name another folder for "
            "results."
        )
    return args


def check_onnx(what: str) -> None:
    """Raise BadInput where a package of the extra onnx is missing; `what` needs it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"{what} needs the package {package}, which is not installed; install the extra "
                'onnx: pip install -e ".[onnx]".'
            )


def _at_home(name: str, path: Path) -> Path:
    """Return a path with its ~ replaced, as a shell does it, but not behind `--runs-dir=`."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise BadInput(
            f"--{name.replace('_', '-')} '{path}': there is nobody of that name here; write the "
            "whole path."
        ) from None


def evidence_file(args: Any) -> Path | None:
    """Return where a run that can be resumed keeps what it did; None for all others."""
    return args.place / EVIDENCE if hasattr(args, "ckpt_path") else None


def planned_steps(args: Any) -> int:
    """Return after how many optimizer steps a run can end: where its patience is over, at most."""
    images = TO_TRAIN_ON.get(data_of(args.lesson), PIECES + VALIDATION) - VALIDATION
    batches = count_batches(-(-images // args.batch_size), limit_of(args, "train")[1])
    steps = -(-batches // getattr(args, "accumulate_grad_batches", 1))
    epochs = args.max_epochs
    if hasattr(args, "patience") and not hasattr(args, "val_check_interval"):
        epochs = min(epochs, args.patience + 1)  # there is one validation in each
    most = getattr(args, "max_steps", -1)
    return min(steps * epochs, most) if most > 0 else steps * epochs


def default_threads(batch_size: int) -> int:
    """Return how many threads pay for this batch size.

    Small batches gain nothing from a second thread, and on a busy machine the threads wait for
    each other: 2.5 ms a step became 77 ms with one other program running.
    """
    return 1 if batch_size < 128 else min(os.cpu_count() or 1, 8)


def _check_number(name: str, value: Any, lesson: str) -> None:
    """Refuse a number that is out of its option's range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    least, most = int(name in AT_LEAST_1), 1 if name in SHARES else MOST.get(name, 10**9)
    if name.startswith("limit_") or name in ("val_check_interval", "overfit_batches"):
        wanted = "a whole number of batches from 1 on, or a share in (0, 1] such as 0.1 or 1.0"
        fits = value >= 1 if isinstance(value, int) else 0 < value <= 1
        if name == "overfit_batches":
            wanted, fits = f"{wanted}; 0 leaves it out", fits or value == 0
    elif name == "max_steps":
        wanted, fits = "a whole number from 1 on, or -1 for no limit", value == -1 or value >= 1
    elif name in ("lr", "generator_lr", "discriminator_lr"):
        most_lr = MOST_LR.get(lesson, 1e38)
        wanted, fits = f"a number above 0, at most {most_lr:g}", 0 < value <= most_lr
    else:
        whole = "whole " * isinstance(value, int)
        wanted = f"a {whole}number from {least} " + ("on" if most == 10**9 else f"to {most}")
        fits = least <= value <= most
    if not fits:
        raise BadInput(f"--{name.replace('_', '-')} {value}: expected {wanted}.")


def refuse_batch(batch_size: int, devices: int, nodes: int = 1) -> None:
    """Raise BadInput: a batch cannot be split evenly over so many devices, of all nodes."""
    of = f" on each of --num-nodes {nodes}" if nodes > 1 else ""
    below = batch_size // devices * devices
    sizes = f"{below} or {below + devices}" if below else f"{devices}"
    raise BadInput(
        f"--batch-size {batch_size} cannot be split evenly over --devices {devices // nodes}{of}; "
        f"choose a multiple of {devices}, such as {sizes}."
    )


def _check_devices(args: Any) -> None:
    """Refuse accelerators and devices that this machine does not have."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = {"auto": True, "cpu": True, "cuda": cuda, "mps": mps, "gpu": cuda or mps}
    if not here[args.accelerator]:
        raise BadInput(
            f"--accelerator {args.accelerator} was asked for, but PyTorch finds no such device on "
            "this machine; leave it out, or use --accelerator cpu."
        )
    if hasattr(args, "check_devices"):  # which asks for processes: they can share the CPU
        args.check_devices()
        if args.accelerator == "cpu":
            return
    gpus = torch.cuda.device_count() if args.accelerator in ("auto", "gpu", "cuda") else 0
    if args.devices > max(gpus, 1):
        raise BadInput(
            f"--devices {args.devices} asks for as many CUDA GPUs, but with --accelerator "
            f"{args.accelerator} there are {gpus} here; use --devices {max(gpus, 1)}."
        )


def _check_precision(precision: str, accelerator: str) -> None:
    """Refuse half precision where the Trainer would take another one, with a warning alone."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    on_mps = accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available()
    if precision == "16-mixed" and not on_cuda and not on_mps:
        raise BadInput(
            "--precision 16-mixed needs a GPU, and none is used here; use --precision bf16-mixed, "
            "which needs no scaling of the loss, or 32-true."
        )
