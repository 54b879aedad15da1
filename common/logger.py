"""A logger for loops by hand: metrics.csv, in the form in which Lightning's CSVLogger writes it."""

from common.messages import BadInput

import csv
import importlib.util
import os
from pathlib import Path


class CSVLogger:
    """Adds row after row to folder/metrics.csv, each at once: a run that is stopped keeps them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        self.columns: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add a row. `step` counts from 0; a name that is new makes a new column."""
        self.rows.append({**metrics, "step": step})
        if self.rows[-1].keys() <= set(self.columns):
            self._write("a", self.rows[-1:])
            return
        self.columns = sorted({"epoch", "step"}.union(*self.rows))
        self._write("w", self.rows)

    def _write(self, mode: str, rows: list[dict[str, float]]) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def check_logger(kind: str) -> None:
    """Raise BadInput for a logger that is not installed, and for a mode that W&B does not know.

    `kind` is csv, tensorboard or wandb. Before the training, and before an earlier run is moved.
    """
    if kind != "csv" and importlib.util.find_spec(kind) is None:
        raise BadInput(
            f"--logger {kind} needs the package {kind}, which is not installed; install the extra "
            '`loggers`, pip install -e ".[loggers]", or use --logger csv.'
        )
    modes, mode = ("offline", "online", "disabled"), os.environ.get("WANDB_MODE", "offline")
    if kind == "wandb" and mode not in modes:
        raise BadInput(
            f"the environment's WANDB_MODE is '{mode}', but it must be one of {', '.join(modes)}; "
            "unset it to stay offline."
        )
    if kind == "wandb":
        os.environ["WANDB_MODE"] = mode  # else it asks for an account
        try:
            importlib.import_module("wandb").Settings().update_from_env_vars(os.environ)
        except Exception as error:  # of pydantic's, or its own
            names = [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_MODE"]
            raise BadInput(
                f"Weights & Biases does not understand one of the environment's {', '.join(names)} "
                f"({str(error).splitlines()[-1 if len(str(error).splitlines()) < 2 else 1]}); "
                "unset what is wrong."
            ) from None
    online = kind == "wandb" and mode == "online"
    if online and not importlib.import_module("wandb").login(prompt=False):
        raise BadInput(
            "WANDB_MODE is 'online', but there is no account to log in to; type .venv/bin/wandb "
            "login, or unset WANDB_MODE to stay offline."
        )
