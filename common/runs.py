"""What a run leaves behind: result.json, weights.pt, metrics.csv and pictures, and one table."""

from common import ROOT, figures
from common.data import Data, Images, processes
from common.messages import clear_messages
from common.options import Options, count_batches, parse_options
from common.recipes import Recipe

import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

FILES = (
    "result.json",
    "weights.pt",
    "metrics.csv",
    "samples.png",
    "curves.png",
    "confusion.png",
    "predictions.png",
)
# What some lessons write beside these; hparams.yaml is the Trainer's.
FOLDERS = ("checkpoints", "pictures", "tensorboard", "wandb")
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")


@dataclass
class Run:
    """One training of one side, with all that parity compares.

    `start` holds the fingerprints of the initial weights, `order` the samples that the training
    loader handed out in each epoch, `train_loss` one number per batch, which is one per optimizer
    step unless gradients are accumulated. `val` has one dict
    per validated epoch with loss, accuracy and f1; `test` has these and accuracy_per_class [10]
    and confusion [10, 10], whose rows are the true classes. `seconds` are those of training and of
    testing. `decisions` says what stopped the run and which weights were tested, where a lesson
    decides that (see `report`), or what else parity shall compare. `random` is the state of the
    random generators when the run ended.
    """

    side: str
    recipe: Recipe
    options: Options
    data: Data
    start: dict[str, dict]
    order: dict[int, list[int]]
    train_loss: list[float]
    val: list[dict[str, Any]]
    test: dict[str, Any]
    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    seconds: tuple[float, float]
    decisions: dict[str, Any] = field(default_factory=dict)
    random: dict[str, str] = field(default_factory=lambda: random_state())

    def weights(self) -> bytes:
        """Return the content of weights.pt: the state_dict, on the CPU."""
        file = io.BytesIO()  # into a file by name, torch.save would write that name too
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        torch.save(state, file)
        return file.getvalue()

    def result(self) -> dict[str, Any]:
        """Return what result.json holds, and all that `common.parity` compares.

        A number that is not finite, as after too large a learning rate, becomes None: JSON has
        no other word for it.
        """
        return _finite(self._result())

    def _result(self) -> dict[str, Any]:
        return {
            "lesson": self.recipe.lesson,
            "side": self.side,
            "data": self.data.name,
            "seed": self.recipe.seed,
            "hyperparameters": hyperparameters(self.recipe, self.options),
            "versions": versions(),
            "device": self.device.type,  # without the number that one side gives: cuda, cuda:0
            "threads": self.options.threads,
            "train_loss": self.train_loss,
            "val_loss": [epoch["loss"] for epoch in self.val],
            "val_accuracy": [epoch["accuracy"] for epoch in self.val],
            "val_f1": [epoch["f1"] for epoch in self.val],
            "test_loss": self.test["loss"],
            "test_accuracy": self.test["accuracy"],
            "test_f1": self.test["f1"],
            "test_accuracy_per_class": dict(
                zip(self.data.classes, self.test["accuracy_per_class"], strict=True)
            ),
            "confusion_matrix": self.test["confusion"],
            "decisions": self.decisions,
            "train_seconds": self.seconds[0],
            "test_seconds": self.seconds[1],
            "weights_sha256": _sha256(self.weights()),
            "code_sha256": code_sha256(self.side),
            "fingerprints": {
                "data": self._data_fingerprints(),
                "start": self.start,
                "weights": fingerprints(self.model.state_dict()),
                "optimizer": _optimizer_fingerprints(self.optimizer.state_dict()),
                "random": self.random,
            },
        }

    def _data_fingerprints(self) -> dict[str, str]:
        """Fingerprint the images of each split, and the order in which they were trained on."""
        parts = {}
        for name in ("train", "val", "test"):
            images: Images = getattr(self.data, name)
            parts[f"{name} images"] = fingerprint(images.images)["sha256"]
            parts[f"{name} labels"] = fingerprint(images.labels)["sha256"]
        batch_size = self.recipe.batch_size
        batches = math.ceil(len(self.data.train) / batch_size)
        batches = count_batches(batches, self.options.limit_train_batches)
        for epoch, order in self.order.items():
            # Loading processes fetch ahead of the training: count only what was trained on.
            trained_on = min(batches, len(self.train_loss) - epoch * batches) * batch_size
            parts[f"order of epoch {epoch}"] = _sha256(json.dumps(order[:trained_on]).encode())
        return parts

    def save(self, result: dict[str, Any]) -> Path:
        """Write everything into runs/LESSON/SIDE/ and return that folder.

        Each file appears whole or not at all, result.json last: where it is, the rest is too.
        """
        folder = run_folder(self.options, self.recipe.lesson, self.side)
        self.model.cpu().eval()
        _write(folder / "weights.pt", lambda path: path.write_bytes(self.weights()))
        rows = read_rows(folder)
        for name, figure in figures.draw(self.model, self.data, result, rows).items():
            _write(folder / name, figure.savefig)
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"  # a line for each name
        _write(folder / "result.json", lambda path: path.write_text(text))
        return folder


class MetricsFile:
    """metrics.csv, row by row, in the form in which Lightning's CSVLogger writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "metrics.csv"
        self.columns = ["epoch", "step"]
        self.rows: list[dict[str, Any]] = []

    def write(
        self, epoch: int, step: int, stage: str, values: Mapping[str, Any]
    ) -> dict[str, float]:
        """Add one row at once, so that a run that is stopped keeps it.

        `stage` is train, val or test; those of `values` are written that are numbers. Returns
        them and the epoch, under the names that the Trainer gives them: train_loss, val_loss...
        """
        numbers = {f"{stage}_{k}": v for k, v in values.items() if isinstance(v, float)}
        self.rows.append({"epoch": epoch, "step": step, **numbers})
        if numbers.keys() <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(self.rows[-1])
        else:  # a new column changes the head
            self.write_again(self.rows)
        return {"epoch": epoch, **numbers}

    def write_again(self, rows: list[dict[str, Any]]) -> None:
        """Write the whole file anew, with these rows and no others."""
        self.rows, self.columns = rows, sorted({"epoch", "step"}.union(*rows))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def run_folder(options: Options, lesson: str, side: str) -> Path:
    """Return the folder of one side's results."""
    return options.runs_dir / lesson / side


def start_folder(options: Options, lesson: str, side: str, carry_on: bool = False) -> Path:
    """Return the folder of one side's results, without an earlier run's files.

    Otherwise a run that is stopped would leave its metrics beside another run's result. A complete
    run is not lost, nor one that can be carried on: its folder becomes SIDE.previous, in place of
    the one before it. With `carry_on`, its checkpoints stay, but not its results.
    """
    folder = run_folder(options, lesson, side)
    unfinished = any((folder / "checkpoints").glob("step_*.ckpt"))
    if not carry_on and (unfinished or (folder / "result.json").exists()):
        previous = folder.with_name(f"{side}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "optimizer.png", "hparams.yaml"):  # the latter two some runs have
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if not carry_on:
            shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def hyperparameters(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Return all settings but the folders, and those that have a place of their own."""
    settings = {**asdict(recipe), **asdict(options), "model": recipe.model.__name__}
    same_result = [own.name for own in fields(recipe) if own.metadata.get("same_result")]
    for name in ("lesson", "data_dir", "runs_dir", "threads", "seed", "defaults", *same_result):
        del settings[name]
    for stage in ("train", "val", "test"):  # as texts: one batch, 1, is not all of them, 1.0
        settings[f"limit_{stage}_batches"] = str(settings[f"limit_{stage}_batches"])
    start = Path(settings.get("start_from") or "none")
    if start.is_file():  # another content under the same name makes another run
        with start.open("rb") as file:  # in pieces: VGG16's checkpoint has a gigabyte
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settings["start_from"] = f"{start}, sha256 {digest}"
    return settings


def config_of(recipe: Recipe, options: Options, data: Data) -> dict[str, Any]:
    """Return what a checkpoint needs beside its weights: all settings, and the classes' names."""
    settings = {
        **hyperparameters(recipe, options),
        "lesson": recipe.lesson,
        "data": data.name,
        "classes": list(data.classes),
        "seed": recipe.seed,
        "threads": options.threads,
    }
    del settings["model"]  # a LightningModule has an argument of that name: the network itself
    return settings


def report(
    reason: str, val: list[dict[str, Any]], best: int | None, recipe: Any, options: Options
) -> dict[str, Any]:
    """Say in words, the same on both sides, what stopped a run and which weights were tested.

    `reason` is "not stopped", "patience exhausted" or "non finite metric"; `best` is the epoch of
    the best checkpoint, None where no epoch was validated.
    """
    why = {
        "non finite metric": "early stopping: the validation loss is not a number",
        "patience exhausted": "early stopping: no validation loss lower by more than "
        f"{recipe.min_delta} for {recipe.patience} epochs",
        "not stopped": f"--max-epochs {recipe.max_epochs}"
        if options.max_steps == -1 or len(val) == recipe.max_epochs
        else f"--max-steps {options.max_steps}",
    }[reason]
    if best is None:
        return {"stopped by": why, "tested": "the last weights, since no epoch was validated"}
    return {
        "stopped by": why,
        "epochs": len(val),
        "best epoch": best,
        "best validation loss": val[best]["loss"],
        "tested": f"the weights of epoch {best}, checkpoints/best.ckpt",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, the packages and the system that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "system": platform.platform()}


def code_sha256(side: str) -> str:
    """Return one digest over all the code that a run of this side executes."""
    files = sorted([*(ROOT / side).glob("*.py"), *(ROOT / "common").glob("*.py")])
    return _sha256(b"".join(path.read_bytes() for path in files))


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Return what identifies a tensor to the bit, and its norm, so that a difference has a size."""
    tensor = tensor.detach().cpu().contiguous()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "norm": tensor.double().norm().item() if tensor.is_floating_point() else None,
        "sha256": _sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()),
    }


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Fingerprint each tensor of a state_dict."""
    return {name: fingerprint(tensor) for name, tensor in tensors.items()}


def _optimizer_fingerprints(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Flatten an optimizer's state_dict: fingerprints for tensors, the values of all else."""
    flat: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for name, value in state.items():
            is_tensor = isinstance(value, Tensor)
            flat[f"parameter {index}: {name}"] = fingerprint(value) if is_tensor else value
    for index, group in enumerate(state_dict["param_groups"]):
        for name, value in group.items():
            flat[f"group {index}: {name}"] = value
    return flat


def random_state() -> dict[str, str]:
    """Fingerprint the state of the random generators: Python's, numpy's and PyTorch's."""
    of_numpy: Any = np.random.get_state()
    states = {
        "python": repr(random.getstate()).encode(),
        "numpy": repr((of_numpy[0], of_numpy[1].tolist(), *of_numpy[2:])).encode(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda {device}"] = state.numpy().tobytes()
    return {name: _sha256(state) for name, state in states.items()}


def read_metrics(folder: str | Path, stage: str) -> list[dict[str, float]]:
    """Return the rows of metrics.csv that belong to a stage: its loss, accuracy and f1."""
    names = ("loss", "accuracy", "f1")
    return [
        {name: row[f"{stage}_{name}"] for name in names}
        for row in read_rows(folder)
        if f"{stage}_loss" in row
    ]


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv, each without the columns that it leaves empty."""
    path = Path(folder, "metrics.csv")
    if not path.exists():  # nothing was logged yet
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row | {"epoch": int(row["epoch"]), "step": int(row["step"])} for row in rows]


def print_epoch(epoch: int, val: Mapping[str, Any], prefix: str = "") -> None:
    """Print one line after an epoch's validation, above the progress bar if there is one."""
    scores = ", ".join(f"{name} {val[prefix + name]:.4f}" for name in ("loss", "accuracy", "f1"))
    tqdm.write(f"Epoch {epoch}, validation: {scores}")


def command_line(lesson: str, run: Callable[[Recipe, Options], Run]) -> None:
    """Run a lesson with the options that the user typed, and show what came of it."""
    with clear_messages():
        finish(run(*parse_options(lesson)))


def finish(run: Run) -> None:
    """Save a run and print its final table, the same on both sides."""
    if processes()[0] > 0:
        return  # with several processes, the first one writes
    result = run.result()
    folder = run.save(result)
    table = Table(title=f"{result['lesson']}: test on {result['data']}", title_justify="left")
    table.add_column("")
    table.add_column(result["side"], justify="right")
    loss = result["test_loss"]
    table.add_row("loss", "not a number" if loss is None else f"{loss:.4f}")
    table.add_row("accuracy", f"{result['test_accuracy']:.2%}")
    table.add_row("macro F1", f"{result['test_f1']:.4f}", end_section=True)
    for name, accuracy in result["test_accuracy_per_class"].items():
        table.add_row(f"accuracy, {name}", f"{accuracy:.2%}")
    table.add_section()
    for name, value in result["decisions"].items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else f"{value}")
    if result["decisions"]:
        table.add_section()
    table.add_row("training batches", f"{len(result['train_loss']):,}")
    table.add_row("seconds of training", f"{result['train_seconds']:.1f}")
    table.add_row("seconds of testing", f"{result['test_seconds']:.1f}")
    table.add_row("device, threads", f"{result['device']}, {result['threads']}")
    table.add_row("sha256 of the weights", result["weights_sha256"][:16])
    Console().print(table)
    if None in result["train_loss"]:
        step = result["train_loss"].index(None) + 1
        print(f"The loss of step {step} is not a number: nothing was learned; try a smaller --lr.")
    elif loss is None:
        print("The test loss is not a number: the last steps spoiled it; try a smaller --lr.")
    print(f"Written to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _finite(value: Any) -> Any:
    """Replace each number that is not finite by None, also within lists and dicts."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
