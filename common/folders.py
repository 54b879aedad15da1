"""The folder of a run: made ready without losing the run before, and read and written whole."""

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a run leaves behind; evidence.jsonl only one that can be resumed.
FILES = (
    "result.json",
    "weights.pt",
    "metrics.csv",
    "samples.png",
    "curves.png",
    "confusion.png",
    "predictions.png",
)
EVIDENCE = "evidence.jsonl"
# What some lessons write beside these; hparams.yaml is the Trainer's.
OTHERS = ("optimizer.png", "hparams.yaml", EVIDENCE)
FOLDERS = ("checkpoints", "pictures", "tensorboard", "wandb")


def start_folder(folder: Path, resumed: bool = False) -> Path:
    """Return a run's folder, without an earlier run's files.

    Otherwise a run that is stopped would leave its metrics beside another run's result. A complete
    run is not lost, nor one that can be resumed: its folder becomes SIDE.previous, in place of the
    one before it. `resumed` keeps its checkpoints and its evidence, but not its results.
    """
    unfinished = any((folder / "checkpoints").glob("step_*.ckpt"))
    if not resumed and (unfinished or (folder / "result.json").exists()):
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    folder.mkdir(parents=True, exist_ok=True)
    for name in {*FILES, *OTHERS} - ({EVIDENCE} if resumed else set()):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("evidence.*.jsonl") if not resumed else ():  # of other ranks
        path.unlink()
    for name in FOLDERS:
        if not resumed:
            shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def is_writable(folder: Path) -> bool:
    """Tell whether a file can be written into a folder, by doing it: its mode does not tell all."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
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


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv, each without the columns that it leaves empty."""
    path = Path(folder, "metrics.csv")
    if not path.exists():  # nothing was logged yet
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row | {"epoch": int(row["epoch"]), "step": int(row["step"])} for row in rows]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a whole metrics.csv, or none of it."""

    def write(to: Path) -> None:
        with to.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({"epoch", "step"}.union(*rows)))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def read_metrics(folder: str | Path, stage: str) -> list[dict[str, float]]:
    """Return the rows of metrics.csv that belong to a stage: its loss, accuracy and f1."""
    names = ("loss", "accuracy", "f1")
    return [
        {name: row[f"{stage}_{name}"] for name in names}
        for row in read_rows(folder)
        if f"{stage}_loss" in row
    ]
