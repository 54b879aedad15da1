"""The command line that both sides share.

An option that Lightning's Trainer has carries the Trainer's name and means the same.
"""

from common.messages import BadInput, Parser
from common.recipes import RECIPES, ParallelRecipe, Recipe

import argparse
import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """How, how long and where to train; what is trained stands in the Recipe."""

    max_steps: int = -1
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    log_every_n_steps: int = 50
    data: str = "auto"
    data_dir: Path = Path("data")
    accelerator: str = "auto"
    devices: int = 1
    threads: int = 1
    num_workers: int = 0
    runs_dir: Path = Path("runs")

    @property
    def refresh_rate(self) -> int:
        """Steps from one drawing of the progress bar to the next; 0, none, without a terminal."""
        return 100 if sys.stdout.isatty() else 0


def parse_options(lesson: str, argv: Sequence[str] | None = None) -> tuple[Recipe, Options]:
    """Read the command line of one lesson (`argv`, else sys.argv).

    Raises SystemExit(2), after one sentence on stderr, for an unknown option or a value that
    cannot be; SystemExit(0) after `--help`; BadInput for devices that this machine does not have
    and for a folder that cannot take results.
    """
    given = vars(_parser(RECIPES[lesson]).parse_args(argv))
    of_recipe = ["max_epochs", "batch_size", "lr", "optimizer", "seed"]
    of_recipe += [own.name for own in fields(RECIPES[lesson]) if own.metadata]
    recipe = replace(RECIPES[lesson], **{name: given.pop(name) for name in of_recipe})
    devices = given["devices"]
    if given["threads"] == "auto":
        threads = default_threads(recipe.batch_size // devices)
        given["threads"] = min(threads, max(1, (os.cpu_count() or 1) // devices))
    options = Options(**given)
    if isinstance(recipe, ParallelRecipe):
        options = _check_processes(recipe, options)
    else:
        _check_devices(options.devices, options)
    if recipe.batch_size % options.devices:
        _refuse_batch(recipe, options.devices)
    _check_logger(getattr(recipe, "logger", "csv"))
    _check_precision(getattr(recipe, "precision", "32-true"), options.accelerator)
    _check_runs_dir(options.runs_dir)
    return recipe, options


def is_writable(folder: Path) -> bool:
    """Tell whether a file can be written into a folder, by doing it: its mode does not tell all."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def default_threads(batch_size: int) -> int:
    """Return how many threads pay for this batch size.

    Small batches gain nothing from a second thread, and on a busy machine the threads wait for
    each other: 2.5 ms a step became 77 ms with one other program running.
    """
    return 1 if batch_size < 128 else min(os.cpu_count() or 1, 8)


def count_batches(total: int, limit: int | float) -> int:
    """Return how many of `total` batches a limit leaves, by the Trainer's rule.

    A whole number counts batches, a fraction is a share of them, rounded down.
    """
    return min(limit, total) if isinstance(limit, int) else int(limit * total)


def _number(
    kind: type[int] | type[float], fits: Callable[[float], bool], wanted: str
) -> Callable[[str], int | float]:
    """Return a converter for argparse whose refusal says what was wanted."""

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got '{text}'")
        return value

    return convert


def _text(pattern: str, wanted: str) -> Callable[[str], str]:
    """Return a converter for argparse that refuses a text unless all of it fits the pattern."""

    def convert(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got '{text}'")
        return text

    return convert


def _limit(text: str) -> int | float:
    """Read a limit as the Trainer does: 10 is ten batches, 0.1 or 1.0 a share of them."""
    wanted = "a whole number of batches from 1 on, or a fraction in (0, 1] such as 0.1 or 1.0"
    if text.isdecimal():
        return _number(int, lambda value: value >= 1, wanted)(text)
    return _number(float, lambda value: 0 < value <= 1, wanted)(text)


def _threads(text: str) -> int | float | str:
    cores = os.cpu_count() or 1
    wanted = f"auto, or a whole number from 1 to {cores}, as many as this machine has"
    return text if text == "auto" else _number(int, lambda value: 1 <= value <= cores, wanted)(text)


def _parser(recipe: Recipe) -> Parser:
    count = _number(int, lambda value: 1 <= value <= 10**9, "a whole number from 1 on")
    parser = Parser(
        description=f"Train and test the lesson '{recipe.lesson}'; for the proof, on both sides.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--max-epochs",
        type=count,
        default=recipe.max_epochs,
        metavar="N",
        help="passes over the training set",
    )
    add(
        "--batch-size",
        type=count,
        default=recipe.batch_size,
        metavar="N",
        help="images in one batch, over all devices together",
    )
    add(
        "--lr",
        type=_number(float, lambda value: 0 < value < math.inf, "a number above 0"),
        default=recipe.lr,
        metavar="X",
        help="learning rate",
    )
    momentum = f"momentum {recipe.momentum}" if recipe.momentum else "no momentum"
    add(
        "--optimizer",
        choices=tuple(dict.fromkeys((recipe.optimizer, "sgd", "adam"))),
        default=recipe.optimizer,
        help=f"sgd has {momentum}",
    )
    add(
        "--seed",
        type=_number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32-1"),
        default=recipe.seed,
        metavar="N",
        help="draws validation set, initial weights and order of the batches",
    )
    for own in fields(recipe):
        if own.metadata:
            _add_own(add, own, getattr(recipe, own.name))
    steps = "a whole number from 1 on, or -1"
    add = parser.add_argument_group("how much of it").add_argument
    add(
        "--max-steps",
        type=_number(int, lambda value: value == -1 or 1 <= value <= 10**9, steps),
        default=Options.max_steps,
        metavar="N",
        help="stop after this many optimizer steps; -1: no limit",
    )
    for stage in ("train", "val", "test"):
        add(
            f"--limit-{stage}-batches",
            type=_limit,
            default=recipe.defaults.get(f"limit_{stage}_batches", 1.0),
            metavar="N",
            help=f"{stage} batches to use: a number (10) or a share (0.1)",
        )
    add = parser.add_argument_group("on what, where and how").add_argument
    add(
        "--data",
        choices=("auto", recipe.data, "shapes"),
        default=Options.data,
        help=f"{recipe.data}: the real images or an error; shapes: the built-in drawings; "
        f"auto: {recipe.data} if it is here or can be downloaded, else shapes",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR") or Options.data_dir),
        metavar="DIR",
        help="folder with the real images (environment: DATA_DIR)",
    )
    add(
        "--runs-dir",
        type=Path,
        default=Options.runs_dir,
        metavar="DIR",
        help=f"results go to DIR/{recipe.lesson}/SIDE/; the complete ones that are there move to "
        f"DIR/{recipe.lesson}/SIDE.previous/",
    )
    add(
        "--log-every-n-steps",
        type=count,
        default=recipe.defaults.get("log_every_n_steps", Options.log_every_n_steps),
        metavar="N",
        help="steps from one logged training loss to the next",
    )
    add(
        "--accelerator",
        choices=("auto", "cpu", "gpu", "cuda", "mps"),
        default=Options.accelerator,
        help="auto: CUDA, else MPS, else the CPU; gpu: CUDA or MPS",
    )
    devices = recipe.defaults.get("devices", Options.devices)
    several = "one process for each: GPUs, or processes on the CPU where there is none"
    add(
        "--devices",
        type=count,
        # torchrun, typed by hand, says itself how many it started.
        default=int(os.environ.get("LOCAL_WORLD_SIZE", devices)) if devices > 1 else devices,
        metavar="N",
        help=several if devices > 1 else "GPUs to use",
    )
    add(
        "--threads",
        type=_threads,
        default=recipe.defaults.get("threads", "auto"),
        metavar="N",
        help="CPU threads for one operation; auto: 1 below batch size 128, else up to 8",
    )
    add(
        "--num-workers",
        type=_number(int, lambda value: 0 <= value <= 1000, "a whole number from 0 to 1000"),
        default=Options.num_workers,
        metavar="N",
        help="processes that load batches; 0: the training one",
    )
    return parser


def _add_own(add: Callable[..., Any], own: Field, default: Any) -> None:
    """Add the option that a lesson's own recipe declares, by `common.recipes.option`."""
    name, rule = "--" + own.name.replace("_", "-"), own.metadata
    if isinstance(default, bool):
        # What is on by default can be switched off, by --no-NAME.
        action = argparse.BooleanOptionalAction if default else "store_true"
        add(name, action=action, default=default, help=rule["help"])
    elif "choices" in rule:
        add(name, choices=rule["choices"], default=default, help=rule["help"])
    elif isinstance(default, str):
        form = _text(rule.get("pattern", ".*"), rule["metavar"])
        # Named in the text, the default is not appended to it: it is nothing.
        text = rule["help"] + "%(default)s"
        add(name, type=form, default=default, metavar=rule["metavar"], help=text)
    else:
        least, most = rule["at_least"], rule.get("at_most", 10**9)
        to = f"to {most}" if "at_most" in rule else "on"
        wanted = f"a {'whole ' * isinstance(default, int)}number from {least} {to}"
        number = _number(type(default), lambda value: least <= value <= most, wanted)
        add(name, type=number, default=default, metavar="N", help=rule["help"])


def _check_processes(recipe: ParallelRecipe, options: Options) -> Options:
    """Refuse what several processes cannot do; return the options, without "auto".

    Without a CUDA GPU, the processes share the CPU: gloo, by which they talk then, knows no MPS.
    """
    cpu = options.accelerator == "cpu" or (
        options.accelerator == "auto" and not torch.cuda.is_available()
    )
    most, cores = 4 * (os.cpu_count() or 1), os.cpu_count()
    _check_devices(1 if cpu else options.devices, options)
    if cpu and options.devices > most:
        raise BadInput(
            f"--devices {options.devices} asks for as many processes, and {most} are the most for "
            f"the {cores} cores here; use --devices {most}, or GPUs."
        )
    if cpu and recipe.strategy == "dp" and options.devices > 1:
        raise BadInput(
            "--strategy dp splits batches over CUDA GPUs, and none is used here; use --strategy "
            "ddp, which runs on the CPU, too."
        )
    if recipe.strategy == "dp" and recipe.num_nodes > 1:
        raise BadInput(
            "--strategy dp is one process, and --num-nodes asks for several machines; use "
            "--strategy ddp."
        )
    if cpu and recipe.sync_batchnorm:
        raise BadInput(
            "--sync-batchnorm needs CUDA GPUs, and none is used here: PyTorch has it for GPUs "
            "alone; leave it out."
        )
    world = options.devices * recipe.num_nodes
    started = int(os.environ.get("WORLD_SIZE", world))
    if recipe.strategy != "dp" and started != world:
        raise BadInput(
            f"torchrun started {started} processes, and --devices {options.devices} with "
            f"--num-nodes {recipe.num_nodes} are {world}; leave out these options, or name the "
            "same numbers."
        )
    if recipe.batch_size % world:
        _refuse_batch(recipe, world)
    return replace(options, accelerator="cpu" if cpu else options.accelerator)


def _refuse_batch(recipe: Recipe, devices: int) -> None:
    nodes = getattr(recipe, "num_nodes", 1)
    of = f" on each of --num-nodes {nodes}" if nodes > 1 else ""
    below = recipe.batch_size // devices * devices
    sizes = f"{below} or {below + devices}" if below else f"{devices}"
    raise BadInput(
        f"--batch-size {recipe.batch_size} cannot be split evenly over --devices "
        f"{devices // nodes}{of}; choose a multiple of {devices}, such as {sizes}."
    )


def _check_devices(devices: int, options: Options) -> None:
    """Refuse accelerators and devices that this machine does not have."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = {"auto": True, "cpu": True, "cuda": cuda, "mps": mps, "gpu": cuda or mps}
    if not here[options.accelerator]:
        raise BadInput(
            f"--accelerator {options.accelerator} was asked for, but PyTorch finds no such device "
            "on this machine; leave it out, or use --accelerator cpu."
        )
    gpus = torch.cuda.device_count() if options.accelerator in ("auto", "gpu", "cuda") else 0
    if devices > max(gpus, 1):
        raise BadInput(
            f"--devices {devices} asks for as many CUDA GPUs, but with --accelerator "
            f"{options.accelerator} there are {gpus} here; use --devices {max(gpus, 1)}."
        )


def _check_logger(logger: str) -> None:
    """Refuse a logger that is not installed, and a mode that W&B does not know."""
    if logger != "csv" and importlib.util.find_spec(logger) is None:
        raise BadInput(
            f"--logger {logger} needs the package {logger}, which is not installed; install the "
            'extra `loggers`, pip install -e ".[loggers]", or use --logger csv.'
        )
    modes, mode = ("offline", "online", "disabled"), os.environ.get("WANDB_MODE", "offline")
    if logger == "wandb" and mode not in modes:
        raise BadInput(
            f"the environment's WANDB_MODE is '{mode}', but it must be one of "
            f"{', '.join(modes)}; unset it to stay offline."
        )
    # Before the training, and before the results of an earlier run are moved away.
    online = logger == "wandb" and mode == "online"
    if online and not importlib.import_module("wandb").login(prompt=False):
        raise BadInput(
            "WANDB_MODE is 'online', but there is no account to log in to; type "
            ".venv/bin/wandb login, or unset WANDB_MODE to stay offline."
        )


def _check_precision(precision: str, accelerator: str) -> None:
    """Refuse half precision where the Trainer would silently take another one."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if precision == "16-mixed" and not on_cuda:
        raise BadInput(
            "--precision 16-mixed needs a CUDA GPU, and none is used here; use --precision "
            "bf16-mixed, which needs no scaling of the loss, or 32-true."
        )


def _check_runs_dir(folder: Path) -> None:
    """Refuse a folder that cannot take the results, before the training and not after it."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not is_writable(folder):
        raise BadInput(
            f"nothing can be written into --runs-dir '{folder}'; name another folder for results."
        )
