"""Reads result.json, and refuses in one sentence one that no run wrote as it is."""

from common.files import read_bytes
from common.messages import BadInput

import json
from pathlib import Path
from typing import Any

TEXT, WHOLE, NUMBER = (str,), (int,), (int, float)
SCORE = (int, float, type(None))  # None stands for a number that is not finite
NAMED = ...  # a dict with any names
PRINT = {"shape": [WHOLE], "dtype": TEXT, "norm": SCORE, "sha256": TEXT}
# What is in a result: of which types, or [of each part] or {name: of that part}.
FORM: dict[Any, Any] = {
    "lesson": TEXT,
    "side": TEXT,
    "data": TEXT,
    "seed": WHOLE,
    "hyperparameters": {},
    "versions": {NAMED: TEXT},
    "device": TEXT,
    "threads": WHOLE,
    "train_loss": [SCORE],
    "val_loss": [SCORE],
    "val_accuracy": [NUMBER],
    "val_f1": [SCORE],
    "test_loss": SCORE,
    "test_accuracy": NUMBER,
    "test_f1": SCORE,
    "test_accuracy_per_class": {NAMED: NUMBER},
    "confusion_matrix": [[WHOLE]],
    "checkpoints": {NAMED: TEXT},
    "train_seconds": NUMBER,
    "weights_sha256": TEXT,
    "code_sha256": {NAMED: TEXT},
    "fingerprints": {
        "data": {NAMED: TEXT},
        "start": {NAMED: PRINT},
        "weights": {NAMED: PRINT},
        "optimizer": {},
        "random": {NAMED: TEXT},
    },
}


def read(path: Path) -> dict[str, Any]:
    """Return what a result.json holds; {} where there is none.

    Raises BadInput where it cannot be read, is cut short, or lacks a part, or one is of another
    type: a file that is broken must never be taken for a result that differs.
    """
    try:
        result = json.loads(read_bytes(path).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError):
        _refuse(path, "is cut short or altered")
    if not isinstance(result, dict):
        _refuse(path, f"holds a {type(result).__name__}, and no result")
    for name, form in FORM.items():
        if name not in result or not _fits(result[name], form):
            _refuse(path, f"lacks {name!r}, or has it in another form")
    accuracy, counts = result["test_accuracy_per_class"], result["confusion_matrix"]
    if not 0 <= result["test_accuracy"] <= 1 or not accuracy:
        _refuse(path, "has an accuracy that is none")
    if {len(row) for row in [counts, *counts]} != {10} or sum(map(sum, counts)) < 1:
        _refuse(path, "has a 'confusion_matrix' of other than ten classes")
    return result


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, tuple):
        return type(value) in form
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(part, form[0]) for part in value)
    if not isinstance(value, dict):
        return False
    if NAMED in form:
        return all(_fits(part, form[NAMED]) for part in value.values())
    return all(name in value and _fits(value[name], part) for name, part in form.items())


def _refuse(path: Path, fault: str) -> Any:
    raise BadInput(f"the result '{path}' {fault}; remove it, and let that side run again.")
