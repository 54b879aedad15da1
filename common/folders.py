"""The folder of a run: made ready without losing the run before, and read and written whole."""

from common.messages import BadInput, notice, printable

import contextlib
import csv
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

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
OTHERS = ("optimizer.png", "hparams.yaml", "answers.npy", "model.onnx", "sample.txt", EVIDENCE)
FOLDERS = ("checkpoints", "pictures", "tensorboard", "wandb")
HALF = ".half-"  # how the name of a file begins that is being written
ASIDE = ".before"  # where a run's results lie until the one that is resumed has made a step


def start_folder(folder: Path, resumed: bool = False) -> Path:
    """Return a run's folder, without an earlier run's files.

    Otherwise a run that is stopped would leave its metrics beside another run's result. What was
    there is set aside until the new run has made a step: then `settle` decides what becomes of it.
    A run that fails before leaves all as it was, by `put_back`. `resumed` keeps the folder, with
    its checkpoints and its evidence; the results alone are set aside.
    """
    if resumed:
        _put_back_results(folder)
        _remove_halves(folder)
        aside = folder / ASIDE
        aside.mkdir()
        # result.json first: with it the results are whole, wherever they are.
        found = [path for path in folder.iterdir() if path.name in {*FILES, *OTHERS} - {EVIDENCE}]
        for path in sorted(found, key=lambda path: path.name != "result.json"):
            path.rename(aside / path.name)
        return folder
    put_back(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(_aside(folder))
    folder.mkdir()
    return folder


def _aside(folder: Path) -> Path:
    """Return where the folder of the run before lies until the new one has made a step."""
    return folder.with_name(f".{folder.name}{ASIDE}")


def _remove_halves(folder: Path) -> None:
    """Remove what a kill left of files that were being written."""
    for half in folder.rglob(f"{HALF}*"):
        half.unlink()


def settle(folder: Path) -> None:
    """Let the run in a folder take the place of what `start_folder` set aside.

    A complete run is not lost, nor one that can be resumed: its folder becomes SIDE.previous, in
    place of the one before it. Of any other, files that no run wrote stay in the folder.
    """
    aside, previous = _aside(folder), folder.with_name(f"{folder.name}.previous")
    if (folder / ASIDE).exists():
        (folder / ASIDE / "result.json").unlink(missing_ok=True)
        shutil.rmtree(folder / ASIDE)
    if not aside.exists():
        return
    _remove_halves(aside)
    if (aside / "result.json").exists() or any(aside.glob("checkpoints/step_*.ckpt")):
        gone = folder.with_name(f".{folder.name}.gone")
        if previous.exists():
            previous.rename(gone)
        aside.rename(previous)
        shutil.rmtree(gone, ignore_errors=True)
        print(printable(f"The run that was in {folder} is kept in {previous}."))
        return
    for path in aside.iterdir():
        if path.name not in {*FILES, *OTHERS, *FOLDERS} and not path.match("evidence.*.jsonl"):
            path.rename(folder / path.name)
    shutil.rmtree(aside)


def put_back(folder: Path) -> None:
    """Undo what `start_folder` did for a run that made no step; a kill may have been its end."""
    aside, previous = _aside(folder), folder.with_name(f"{folder.name}.previous")
    gone = folder.with_name(f".{folder.name}.gone")
    if aside.exists():
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        with contextlib.suppress(OSError):  # it is empty where there was none
            folder.rmdir()
    _put_back_results(folder)
    if gone.exists() and not previous.exists():
        gone.rename(previous)
    shutil.rmtree(gone, ignore_errors=True)


def _put_back_results(folder: Path) -> None:
    inside = folder / ASIDE
    if not inside.exists():
        return
    # result.json went first, and comes back last: without it, the run has made a step.
    if (inside / "result.json").exists() or not any(inside.iterdir()):
        for path in sorted(inside.iterdir(), key=lambda path: path.name == "result.json"):
            path.replace(folder / path.name)
    shutil.rmtree(inside)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of a run's folder while the block runs.

    The lock is the system's: it ends with the process, however that ends, and a process that is
    forked has no part in it. What a killed run had set aside is put back. Where the system has no
    such locks (Windows, some network drives), nothing keeps a second run out.

    Raises BadInput where another run holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        while fcntl:
            file = stack.enter_context(path.open("a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise BadInput(
                    f"another run is in '{folder}' (process {file.read().strip()}); wait until it "
                    "has ended, or name another folder by --runs-dir."
                ) from None
            except OSError as error:
                notice(
                    f"The folder '{folder}' cannot be locked ({error.strerror}): mind that no",
                    "other run begins in it.",
                )
                break
            # The one that held it may have removed the file meanwhile: then it is no lock.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                stack.callback(path.unlink, missing_ok=True)
                break
        put_back(folder)
        yield


def is_writable(folder: Path) -> bool:
    """Tell whether a file can be written into a folder, by doing it: its mode does not tell all."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError):  # also of a name that no file can have
        return False
    return True


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=HALF, suffix=path.suffix, dir=path.parent)
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
    """Return the rows of metrics.csv that belong to a stage: its loss, accuracy and what it has."""
    found = []
    for row in read_rows(folder):
        own = {k.removeprefix(f"{stage}_"): v for k, v in row.items() if k.startswith(f"{stage}_")}
        found += [own] if own else []
    return found
