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

# And of a network that names classes; of another one, "scores".
OF_CLASSIFIER: dict[Any, Any] = {
    "val_loss": [SCORE],
    "val_accuracy": [NUMBER],
    "val_f1": [SCORE],
    "test_loss": SCORE,
    "test_accuracy": NUMBER,
    "test_f1": SCORE,
    "test_accuracy_per_class": {NAMED: NUMBER},
    "confusion_matrix": [[WHOLE]],
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
    scores = result.get("scores")
    own = OF_CLASSIFIER if scores is None else {}
    for name, form in (FORM | own).items():
        if name not in result or not _fits(result[name], form):
            _refuse(path, f"lacks {name!r}, or has it in another form")
    if scores is not None:
        _check_scores(scores, path)
        return result
    accuracy, counts = result["test_accuracy_per_class"], result["confusion_matrix"]
    if not 0 <= result["test_accuracy"] <= 1 or not accuracy:
        _refuse(path, "has an accuracy that is none")
    if {len(row) for row in [counts, *counts]} != {10} or sum(map(sum, counts)) < 1:
        _refuse(path, "has a 'confusion_matrix' of other than ten classes")
    return result


def _check_scores(scores: Any, path: Path) -> None:
    """Refuse scores that are not of each validation a list, of the test a number."""
    forms = {"val_": [SCORE], "test_": SCORE}
    for name, value in scores.items() if isinstance(scores, dict) else [("", None)]:
        form = next((form for start, form in forms.items() if name.startswith(start)), None)
        if form is None or not _fits(value, form):
            _refuse(path, "has 'scores' in another form")
    if not any(name.startswith("test_") for name in scores):
        _refuse(path, "has no test among its 'scores'")


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
