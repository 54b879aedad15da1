"""One trace as it is compared: its steps, and its names brought to those of the other one."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .evidence import bits, unknown
from .files import Line, read
from .messages import BadInput


@contextlib.contextmanager
def sane(*paths: Path | str) -> Iterator[None]:
    """Turn an error into BadInput: what is whole and yet holds nonsense was made by no trace."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        names = " or ".join(f"'{path}'" for path in paths)
        raise BadInput(
            f"{names} holds what no trace holds ({type(error).__name__}: {error}); make it again."
        ) from error


class Run:
    """One trace: its first and last line, and the steps, which are read when they are asked for."""

    def __init__(self, path: Path | str, name: str) -> None:
        lines = read(path)
        self.name, self.path = name, path
        self.head: Line = json.loads(lines[0])
        self.end: Line = json.loads(lines[-1])
        self.steps = [line for line in lines[1:-1] if not line.startswith('{"again"')]
        self.again = [json.loads(line)["again"] for line in lines[1:-1]
                      if line.startswith('{"again"')]  # fmt: skip
        self.table: dict[str, str] | None = None  # the names of this trace: those of the other
        self.prefix = ""
        self.is_joined = False
        self.step = functools.lru_cache(8)(self._step)
        if self.steps:
            self._add_what_came_later()

    def _add_what_came_later(self) -> None:
        """Add parameters that were made within the first step, as those of lazy modules."""
        step, start = json.loads(self.steps[0]), self.head["start"]
        for name, tensor in step["weights"]["full"].items():
            if name not in start:
                found = [p["changed"][name] for p in step["passes"] if name in p["changed"]]
                later = {"bits": "?it came later", "shape": tensor["shape"]}
                start[name] = found[0] if found and step["step"] == 1 else later

    def _step(self, index: int) -> Line:
        """Return the recorded step with that index, from 0."""
        step = json.loads(self.steps[index])
        for record in step["passes"]:
            record["modes"] = dict(zip(self.modules, record["mode"], strict=False))
        return step if self.table is None else self._renamed(step)

    def every_step(self) -> Iterator[Line]:
        return (self.step(index) for index in range(len(self.steps)))

    @functools.cached_property
    def modules(self) -> list[str]:
        return list(self.head["modules"])

    def names(self) -> dict[str, Any]:
        """Return all names of parameters and buffers, and what is known of each at the start."""
        start = self.head["start"]
        return start | {name: start[first] for name, first in self.head["tied"].items()}

    def rename(self, table: dict[str, str], prefix: str = "") -> None:
        """Give the weights in `table` its names, and forget the others.

        `prefix` is what the modules' names lose; without it they are named after the weights.
        """
        modules = self.modules  # before the head's are renamed
        self.table, self.prefix = table, prefix
        parents = {_parent(name): _parent(other) for name, other in table.items()}
        self.layers = {n: self._layer(n, parents) for n in modules}
        head = self.head
        head["start"] = self._keys(head["start"])
        head["buffers"] = self._keys(head["buffers"])
        head["tied"] = {table[n]: table[f] for n, f in head["tied"].items() if n in table}
        head["trainable"] = [table[n] for n in head["trainable"] if n in table]
        self.described = {self.layers[n]: d for n, d in head["modules"].items()
                          if self.layers[n] is not None}  # fmt: skip
        for part in ("weights", "digests"):
            self.end[part] = self._keys(self.end[part])
        self.step.cache_clear()
        held = [any(g["params"] for g in self.step(n)["groups"]) for n in range(len(self.steps))]
        self.steps = [line for line, is_held in zip(self.steps, held, strict=True) if is_held]
        self.step.cache_clear()

    described: dict[str | None, str] | None = None

    def settings(self) -> dict:
        """Return the modules' descriptions by the names that both runs have."""
        return self.head["modules"] if self.described is None else self.described

    def _layer(self, name: str, parents: dict[str, str]) -> str | None:
        if not self.prefix:
            return parents.get(name, name)
        if name == self.prefix[:-1] or not name:
            return ""
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else None

    def _keys(self, line: dict[str, Any]) -> dict[str, Any]:
        table = self.table or {}
        return {table[name]: value for name, value in line.items() if name in table}

    def _stage(self, stage: Line | None) -> Line | None:
        if stage is None:
            return None
        if "norms" in stage:
            norms = dict(zip(stage["bits"], stage["norms"], strict=False))
            stage["norms"] = list(self._keys(norms).values())
        for part in ("bits", "full"):
            if part in stage:
                stage[part] = self._keys(stage[part])
        return stage

    def _renamed(self, step: Line) -> Line:
        for part in ("used", "fresh", "weights"):
            step[part] = self._stage(step[part])
        table = self.table or {}
        for group in step["groups"]:
            group["params"] = [table[name] for name in group["params"] if name in table]
        if "state" in step:
            split = ((key, *key.rsplit(": ", 1)) for key in step["state"])
            step["state"] = {f"{table[n]}: {w}": step["state"][k] for k, n, w in split
                             if n in table}  # fmt: skip
        passes = []
        for record in step["passes"]:
            record["module"] = self.layers.get(record["module"], record["module"])
            if record["module"] is None:
                continue
            for part in ("changed", "moved"):
                record[part] = self._keys(record[part])
            for part in ("layers", "modes", "given"):
                if part in record:
                    record[part] = self._named_layers(record[part])
            if "drew" in record:
                record["drew"] = list(self._named_layers(dict.fromkeys(record["drew"])))
            passes.append(record)
        step["passes"] = passes
        step["evaluation"]["moved"] = self._keys(step["evaluation"]["moved"])
        return step

    def _named_layers(self, line: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in line.items():
            name, call, number = key.partition(" (call ")
            layer = self.layers.get(name, name)
            if layer is not None:
                found[layer + call + number] = value
        return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def weights_before(run: Run, index: int) -> dict[str, str]:
    """Return the digests of all weights before a recorded step, by the recorded one before it."""
    if index:
        return run.step(index - 1)["weights"]["bits"]
    return {name: value["bits"] for name, value in run.head["start"].items()}


def weights_found(run: Run, index: int) -> dict[str, str]:
    """Return the digests of all weights as the step's first pass found them that had a gradient."""
    found = dict(weights_before(run, index))
    for record in run.step(index)["passes"]:
        found |= {name: value["bits"] for name, value in record["changed"].items()}
        if record["loss"]:
            break
        counted = record.get("evaluation", {}).get("moved", {})
        found |= counted | record["moved"]
    return found


def training(step: Line) -> list[Line]:
    """Return the passes that gave a gradient; where none is known to, all that could."""
    passes = [p for p in step["passes"] if p["kind"] == "train"]
    return [p for p in passes if p["loss"]] or passes


def losses(step: Line) -> list[float | None]:
    """Return the numbers with which the backward passes of a step began; None of another shape."""
    return [value for backward in step["backwards"] for value in backward["loss"]]


def same_losses(x: Line, y: Line) -> bool:
    """Tell whether the backward passes of a step began with the same numbers."""
    ours = losses(x)
    return bool(ours) and None not in ours and ours == losses(y)


def stepped(step: Line) -> set[str]:
    """Return the parameters that the step's optimizer holds."""
    return {name for group in step["groups"] for name in group["params"]}


def paired(x: Line, y: Line) -> tuple[list[Line], list[Line]]:
    """Return the passes of a step that are held against each other.

    All that could train, where both runs called the same modules; so a part that is detached on one
    side keeps its place. Else those that gave a gradient.
    """
    every = [[p for p in step["passes"] if p["kind"] == "train"] for step in (x, y)]
    if [p["module"] for p in every[0]] == [p["module"] for p in every[1]]:
        return every[0], every[1]
    return training(x), training(y)


def joined(run: Run) -> None:
    """Make one step of several optimizers' steps that follow one backward pass.

    So that two optimizers, one for each part of a network, are held against one for all of it.
    """
    if not any('"which": 2,' in line for line in run.steps):
        return
    steps: list[Line] = []
    for line in map(json.loads, run.steps):
        before = steps[-1] if steps else None
        if (
            before
            and all(record["kind"] == "no_grad" for record in line["passes"])
            and not line["backwards"]
            and (stepped(before).isdisjoint(stepped(line)))
        ):
            _join(before, line)
        else:
            steps.append(line)
    run.is_joined = run.is_joined or len(steps) < len(run.steps)
    run.steps = [json.dumps(line) for line in steps]
    run.step.cache_clear()


def without_idle_steps(run: Run) -> None:
    """Leave out steps without any gradient that changed no weight.

    The Trainer makes them where training_step returns None, and a loop continues with the next
    batch. What their passes moved is what the next step found.
    """
    if not any('"used": {"bits": {},' in line for line in run.steps):
        return
    steps: list[Line] = []
    passes: list[Line] = []
    known = {name: value["bits"] for name, value in run.head["start"].items()}
    for line in map(json.loads, run.steps):
        after = line["weights"]["bits"]
        names = [n for n in after if n not in run.head["buffers"]]
        if not line["used"]["bits"] and all(after[n] == known.get(n) for n in names):
            passes += line["passes"]
            continue
        line["passes"], passes, known = passes + line["passes"], [], after
        steps.append(line)
    if steps and len(steps) < len(run.steps):
        run.is_joined = True
        run.steps = [json.dumps(line) for line in steps]
        run.step.cache_clear()


def _join(before: Line, line: Line) -> None:
    before["passes"] += line["passes"]
    fresh = [step["fresh"] or step["used"] for step in (before, line)]
    if before["fresh"] or line["fresh"]:
        before["fresh"] = _both(*fresh)
    before["used"] = _both(before["used"], line["used"])
    weights = _both(before["weights"], line["weights"])
    before["weights"] = weights
    before["groups"] += line["groups"]
    before["between"] = before["between"] or line["between"]
    kinds = {*before["optimizer"].split(" and "), line["optimizer"]}
    before["optimizer"] = " and ".join(sorted(kinds))
    if "state" in before:
        before["state"] |= line.get("state", {})


def _both(one: Line, other: Line) -> Line:
    """Join two stages of other tensors; of weights, the later ones count."""
    found = {
        "bits": one["bits"] | other["bits"],
        "norm": math.hypot(one["norm"], other["norm"]),
        "sketch": [x + y for x, y in zip(one["sketch"], other["sketch"], strict=True)],
    }
    if "norms" in one:
        found["norms"] = one["norms"] + other["norms"]
    if "full" in one and "full" in other:
        found["full"] = one["full"] | other["full"]
    return found


def align(a: Run, b: Run) -> tuple[str, ...]:
    """Bring the names of both traces together; return what there is to say about it."""
    for run in (a, b):
        without_idle_steps(run)
        joined(run)
    ours, theirs = a.names(), b.names()
    if ours.keys() == theirs.keys():
        return ()
    for part, whole, its in ((ours, b, theirs), (theirs, a, ours)):
        prefix = _prefix(part, its, whole)
        if prefix is None:
            continue
        others = sorted(its.keys() - {prefix + name for name in part})
        if prefix == "" and any(name in _stepped(whole) for name in others):
            return ()  # more is trained: another network
        whole.rename({prefix + name: name for name in part}, prefix)
        said = f"{whole.name}'s names begin with '{prefix}'" if prefix else "The names fit"
        if others:
            said += f"; {len(others)} others of {whole.name} are not compared: {others[0]} ..."
        return (f"{said}.",)
    table = _by_values(ours, theirs)
    if table and list(table.values()) != list(ours):
        b.rename(table)
        first = next(name for name in table if table[name] != name)
        return (f"The parameters have other names, and were paired by their initial values: "
                f"{first} is {table[first]}.",)  # fmt: skip
    shapes = [[t.get("shape") for t in names.values()] for names in (ours, theirs)]
    if shapes[0] != shapes[1] or any(map(unknown, [*ours.values(), *theirs.values()])):
        return ()
    table = dict(zip(theirs, ours, strict=True))
    b.rename(table)
    first = next(name for name in table if table[name] != name)
    return (f"The parameters have other names, and were paired in their order: {first} is "
            f"{table[first]}.",)  # fmt: skip


def _by_values(ours: dict, theirs: dict) -> dict[str, str]:
    """Return which name of the first each name of the second is, where all values are the same."""
    places: dict[str, list[str]] = {}
    for name, tensor in ours.items():
        places.setdefault(bits(tensor), []).append(name)
    table = {}
    for name, tensor in theirs.items():
        if unknown(tensor) or not places.get(bits(tensor)):
            return {}
        table[name] = places[bits(tensor)].pop(0)
    return table if len(ours) == len(theirs) else {}


def _prefix(part: dict, whole: dict, run: Run) -> str | None:
    """Return what stands before all names of `part` in `whole`; of several, what is trained."""
    first = next(iter(part))
    prefixes = [n[: -len(first)] for n in whole if n.endswith(first)]
    fits = [p for p in prefixes if (not p or p.endswith("."))
            and all(p + name in whole for name in part)
            and all(whole[p + n].get("shape") == part[n].get("shape") for n in part)]  # fmt: skip
    stepped = _stepped(run)
    return max(fits, key=lambda p: sum(p + n in stepped for n in part), default=None)


def _stepped(run: Run) -> set[str]:
    """Return the parameters that the optimizers of the first steps hold."""
    steps = (run.step(n) for n in range(min(4, len(run.steps))))
    return {name for step in steps for name in stepped(step)}


def load(path: Path | str, name: str) -> Run:
    """Read a trace; refuse one that holds no step."""
    run = Run(path, name)
    if not run.steps:
        why = (
            run.end["error"]
            or "no optimizer that holds its parameters made a step, or a compiled one"
        )
        raise BadInput(f"'{path}' holds no step ({why}); trace the code that trains.")
    return run
