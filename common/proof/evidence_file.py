"""Reads the file in which a run that can be resumed keeps what it did, and holds it complete.

A line stands for the steps from one checkpoint to the next. What the counters of a checkpoint imply
has to be there: as many losses as steps, the samples of these steps, the logged rows, and in the
checkpoint all parts that were in it when it was written.
"""

from common.files import read_text
from common.messages import BadInput

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

Line = dict[str, Any]
ADVICE = "keep it beside the checkpoints, or leave out --ckpt-path to begin at the start."


def form(content: Mapping[str, Any]) -> str:
    """Return a digest of which parts a checkpoint has: all but the numbers within its tensors.

    These have their own sums in the file. Two checkpoints of one step may differ in what the
    Trainer's callbacks have found so far: of them, only names and whole numbers count.
    """
    parts = {name: part for name, part in content.items() if name != "callbacks"}
    callbacks = content.get("callbacks")
    states = callbacks.items() if isinstance(callbacks, Mapping) else ()
    brief = sorted(
        (str(key), name, repr(value) if isinstance(value, int) else "")
        for key, state in states
        for name, value in (state.items() if isinstance(state, Mapping) else [(repr(state), "")])
    )
    known: dict[int, str] = {}  # a part that is there twice is described once
    return hashlib.sha256(f"{_form(parts, known)} {brief}".encode()).hexdigest()[:16]


def _form(value: Any, known: dict[int, str]) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if not isinstance(value, Mapping | list | tuple):
        return repr(value)
    if id(value) not in known:
        known[id(value)] = "itself"
        if isinstance(value, Mapping):
            inside = sorted(f"{key!r}: {_form(part, known)}" for key, part in value.items())
        else:
            inside = [type(value).__name__, *(_form(part, known) for part in value)]
        known[id(value)] = hashlib.sha256("\n".join(inside).encode()).hexdigest()
    return known[id(value)]


def of_rank(file: Path, rank: int) -> Path:
    """Return the file of another process than the first one."""
    return file.with_suffix(f".{rank}{file.suffix}")


def together(lines: list[Line]) -> Line:
    """Make one line of those that each process wrote at the same step: the means of the losses."""
    losses = [line["losses"] for line in lines]
    order = {}
    for epoch, (first, _) in lines[0]["order"].items():
        shares = [line["order"][epoch][1] for line in lines if epoch in line["order"]]
        order[epoch] = [first, [sample for each in zip(*shares, strict=False) for sample in each]]
    means = [sum(each) / len(lines) for each in zip(*losses, strict=True)]
    return lines[0] | {"losses": means, "order": order}


def _is_line(line: Any) -> bool:
    """Tell whether a line has all its parts, of the right types; a kill may have cut it short."""
    if not isinstance(line, dict):
        return False
    whole = all(type(line.get(name)) is int for name in ("from", "global_step", "world"))
    kinds = {"losses": list, "order": dict, "data": dict}
    if not whole or not all(isinstance(line.get(name), kind) for name, kind in kinds.items()):
        return False
    start, order, rows = line.get("start", []), line["order"], line.get("rows", [])
    return (
        0 <= line["from"] < line["global_step"]
        and line["world"] >= 1
        and ("start" in line or line["from"] > 0)
        and isinstance(start, list)
        and all(_is_fingerprint(each) for each in start)
        and all(type(loss) is float for loss in line["losses"])
        and all(isinstance(digest, str) for digest in line["data"].values())
        and all(_is_order(epoch, piece) for epoch, piece in order.items())
        and isinstance(rows, list)
        and all(_is_row(row) for row in rows)
    )


def _is_order(epoch: str, piece: Any) -> bool:
    """Tell whether this is where in an epoch samples begin, and their numbers."""
    if not epoch.isdecimal() or not isinstance(piece, list) or len(piece) != 2:
        return False
    first, samples = piece
    numbers = [first, *samples] if isinstance(samples, list) else [None]
    return all(type(number) is int and number >= 0 for number in numbers)


def _is_row(row: Any) -> bool:
    """Tell whether this is a row of metrics.csv: numbers, and all that a validation gives."""
    return (
        isinstance(row, dict)
        and all(type(row.get(name)) is int for name in ("epoch", "step"))
        and all(type(value) in (int, float) for value in row.values())
        and len(row) > 2
        and len({"val_loss", "val_accuracy", "val_f1"} & row.keys()) in (0, 3)
    )


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "dtype", "norm", "sha256"}
        and isinstance(value["shape"], list)
        and all(isinstance(value[name], str) for name in ("dtype", "sha256"))
        and type(value["norm"]) in (float, type(None))
    )


def _lines(file: Path) -> dict[int, Line]:
    """Return the whole lines of a file by the step that they reach, each with all its `forms`."""
    found: dict[int, Line] = {}
    forms: dict[Any, list[Any]] = {}
    whole = ""
    with contextlib.suppress(OSError):  # none is there, or it is no file of ours
        whole = read_text(file)
    for text in whole.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("global_step"), int):
                forms.setdefault(line["global_step"], []).append(line.get("form"))
            if _is_line(line):
                found[line["global_step"]] = line
    return {step: {"rows": [], **line, "forms": forms[step]} for step, line in found.items()}


def read(file: Path, step: int) -> list[Line]:
    """Return the lines that lead from the start to a checkpoint's step, of all ranks together.

    Raises BadInput where they do not reach it: nothing could be proved of that run.
    """
    lines, found, place = [], _lines(file), step
    while place > 0 and place in found:
        lines.append(found[place])
        place = found[place]["from"]
    if place != 0 or not lines:
        raise BadInput(
            f"'{file}', in which a run keeps what it did before each checkpoint, does not reach "
            f"step {step}; {ADVICE}"
        )
    return [together(_ranks(line, file)) for line in lines[::-1]]


def _ranks(line: Line, file: Path) -> list[Line]:
    """Return a line of the first process, and what the others did in the same steps."""
    found = [line]
    for rank in range(1, line["world"]):
        other = _lines(of_rank(file, rank)).get(line["global_step"], {})
        same = all(other.get(name) == line[name] for name in ("from", "world"))
        if not same or len(other["losses"]) != len(line["losses"]):
            raise BadInput(
                f"'{of_rank(file, rank)}' lacks what that process did up to step "
                f"{line['global_step']}; {ADVICE}"
            )
        found.append(other)
    return found


def check(lines: list[Line], file: Path, args: Any, parameters: int) -> None:
    """Raise BadInput unless the lines have what their steps imply, with a run's settings.

    `parameters` is how many the optimizers of the checkpoint have.
    """
    if len(lines[0].get("start", [])) != parameters:
        _lacks(file, "start", lines[0])
    batches = getattr(args, "accumulate_grad_batches", 1)
    reached: dict[str, int] = {}  # by epoch: how many samples are known, from its start on
    batches_until_now = 0
    for line in lines:
        steps, losses, order = line["global_step"] - line["from"], line["losses"], line["order"]
        if not steps <= len(losses) <= steps * batches:
            _lacks(file, "losses", line)
        if not {"train images", "train labels"} <= line["data"].keys():
            _lacks(file, "data", line)
        for epoch, (first, samples) in order.items():
            if first > reached.get(epoch, 0):
                _lacks(file, "order", line)
            reached[epoch] = max(reached.get(epoch, 0), first + len(samples))
        # All until now, since processes that load ahead take samples before the steps they are for.
        # The last batch of an epoch may be short.
        batches_until_now += len(losses)
        if sum(reached.values()) <= (batches_until_now - max(1, len(reached))) * args.batch_size:
            _lacks(file, "order", line)


def check_rows(rows: list[dict[str, Any]], file: Path, epoch: int, args: Any) -> None:
    """Raise BadInput unless the rows have each training loss that was due, and the validations.

    `epoch` is the checkpoint's: those before it were validated.
    """
    every, there = args.log_every_n_steps, {row["step"] for row in rows if "train_loss" in row}
    due = range(every - 1, args.begun_at, every)
    if getattr(args, "precision", "") == "16-mixed":
        due = due[:-1]  # the last one may stay out: its loss was seen scaled up
    if not there.issuperset(due) or sum("val_loss" in row for row in rows) < epoch:
        _lacks(file, "rows", {"global_step": args.begun_at})


def _lacks(file: Path, part: str, line: Line) -> NoReturn:
    raise BadInput(
        f"'{file}', in which a run keeps what it did before each checkpoint, lacks {part!r} of "
        f"steps up to {line['global_step']}; {ADVICE}"
    )
