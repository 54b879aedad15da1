"""Compare one step of two runs: go along what happened in it, as far as a weight depends on it."""

from typing import Any

from . import causes_input, causes_network, causes_step
from .evidence import Cause, Found, bits, differ, differing, is_rounding, size, stage
from .files import Line
from .loss_causes import loss_causes
from .run import Run, paired, weights_found


def first_in_step(a: Run, b: Run, index: int, x: Line, y: Line) -> Found | None:
    """Return the first difference in a step after which some weight differs; None without one."""
    buffers = a.head["buffers"]
    differ_after = differing(x["weights"]["bits"], y["weights"]["bits"])
    kept = [n for n in differ_after if buffers.get(n, True)]  # a checkpoint holds them
    if not kept:
        return None
    if causes_step.stepped(x).isdisjoint(causes_step.stepped(y)):
        return causes_step.other_order(x, y)
    if found := causes_step.skipped(a, b, index, x, y):
        return found
    parameters = [n for n in kept if n not in buffers]
    fresh = [side["fresh"] or side["used"] for side in (x, y)]
    both = causes_step.stepped(x) & causes_step.stepped(y)
    gradients = [{n: t for n, t in side["bits"].items() if n in both} for side in fresh]
    is_early = bool(differing(*gradients)) or gradients[0].keys() != gradients[1].keys()
    # FSDP calls no hook with the gradients of this process: nobody knows whether they are equal.
    is_blind = all(step["between"].get("missing") for step in (x, y))
    # Equal gradients of the same weights: what went before can only have moved buffers.
    if found := _passes(a, b, index, x, y, is_early or is_blind, len(parameters) < len(kept)):
        return found
    dtypes = _dtypes(a, both)
    if is_early:
        if found := causes_step.other_count(a, b, index, x, y):
            return found
        return stage(
            "gradient", fresh[0], fresh[1], among=both, dtypes=dtypes,
            find=lambda rounding: causes_step.gradient_causes(a, b, index, x, y, rounding),
        )  # fmt: skip
    return (
        stage("clipping", x["used"], y["used"], among=both, dtypes=dtypes,
              find=lambda rounding: causes_step.clipping_causes(a, b, index, x, y))
        or causes_step.settings(a, b, index, x, y)
        or _moved(a, b, index, x, y, parameters, kept)
    )  # fmt: skip


def _moved(
    a: Run, b: Run, index: int, x: Line, y: Line, parameters: list[str], kept: list[str]
) -> Found | None:
    """Gradients and settings are equal: the step itself, or a buffer that something else moved."""
    if not parameters:
        return causes_network.other_buffers(a, b, index, x, y, kept)
    if found := causes_step.untrained(a, b, index, x, y, parameters):
        return found
    return stage(
        "update", x["weights"], y["weights"], among=parameters, dtypes=_dtypes(a, parameters),
        before=_sketch_before(a, index, x),
        find=lambda rounding: causes_step.update_causes(a, b, index, x, y, rounding),
    )  # fmt: skip


def _sketch_before(a: Run, index: int, x: Line) -> list[float]:
    """Return the sketch of the weights that a step's optimizer holds, before that step."""
    for place in range(index - 1, -1, -1):
        if causes_step.stepped(step := a.step(place)) == causes_step.stepped(x):
            return step["weights"]["sketch"]
    start = [t["sketch"] for n, t in a.head["start"].items()
             if n in causes_step.stepped(x) and "sketch" in t]  # fmt: skip
    return [sum(numbers) for numbers in zip(*start, strict=True)]


def _dtypes(a: Run, names: Any) -> set[str]:
    start = a.head["start"]
    return {start[n].get("dtype", "float32") for n in names if n in start} or {"float32"}


def _passes(
    a: Run, b: Run, index: int, x: Line, y: Line, is_early: bool, are_buffers: bool
) -> Found | None:
    """Compare what the passes found, got, gave and were told, in the order of their happening."""
    found = [weights_found(run, index) for run in (a, b)]
    names = [n for n in differing(*found) if a.head["buffers"].get(n, True)
             and (n not in a.head["buffers"] or are_buffers)]  # fmt: skip
    if names:
        return causes_network.changed(a, b, index, x, y, names)
    if not is_early and not are_buffers:
        return None
    ours, theirs = paired(x, y)
    if {p["module"] for p in ours} != {p["module"] for p in theirs}:
        ours, theirs = _joined(ours), _joined(theirs)
    theirs = [*map(_named_alike, ours, theirs), *theirs[len(ours) :]]
    # Forward passes and gradients at outputs, as A did them; before a gradient come all forward
    # passes that came before it in B.
    events = [(p["begin"], n, False) for n, p in enumerate(ours)]
    events += [(p.get("loss at", 1 << 60), n, True) for n, p in enumerate(ours)]
    done: set[int] = set()
    for _, number, is_loss in sorted(events):
        if number >= len(theirs):
            continue
        late = theirs[number].get("loss at", 1 << 60) if is_loss else 0
        earlier = [n for n, p in enumerate(theirs[: len(ours)]) if p["begin"] < late]
        for place in [*earlier, *([] if is_loss else [number])]:
            if place not in done:
                done.add(place)
                p, q = ours[place], theirs[place]
                if place and _is_untrained(a, x, y, p, q):
                    return causes_step.within(a, b, index, x, y, p, q)
                if one := _forward(a, b, index, x, y, p, q):
                    return one
        if is_loss and is_early:
            p, q = ours[number], theirs[number]
            paths = told(p, q)
            if any(differ(p["loss"].get(s, "?"), q["loss"].get(s, "?")) for s in paths) or (
                _told_elsewhere(p, q)
            ):
                said = loss_causes(a, b, x, y, p, q, ours, theirs)
                return said if said.rounding else _same_gradients(a, x, y, said) or said
    return None


def _is_untrained(a: Run, x: Line, y: Line, p: Line, q: Line) -> bool:
    """Tell whether weights that no optimizer holds were changed before one of two later passes."""
    names = (p["changed"].keys() ^ q["changed"].keys()) - a.head["buffers"].keys()
    return bool(names) and not names & (causes_step.stepped(x) | causes_step.stepped(y))


def _same_gradients(a: Run, x: Line, y: Line, found: Found) -> Found | None:
    """Look whether the weights' gradients agree, though those at the outputs do not."""
    both = causes_step.stepped(x) & causes_step.stepped(y)
    fresh = [side["fresh"] or side["used"] for side in (x, y)]
    said = "the gradients at the output differ, and all gradients of weights agree but for rounding"
    cause = Cause("Another formula of the same loss, such as log_softmax before cross entropy",
                  f"{said}.", "loss")  # fmt: skip
    gradients = stage("gradient", *fresh, among=both, dtypes=_dtypes(a, both),
                      find=lambda rounding: [cause])  # fmt: skip
    if gradients is None or not gradients.rounding:
        return None
    return Found("loss", found.what, [cause], found.others, gradients.size, True)


def told(p: Line, q: Line) -> list[str]:
    """Return the outputs whose gradients can be compared."""
    return [path for path in p["loss"] if path in q["loss"]]


def _told_elsewhere(p: Line, q: Line) -> bool:
    """Tell whether a loss uses outputs that the other does not, beside the loss itself."""
    paths = p["loss"].keys() ^ q["loss"].keys()
    known = [s for s in paths if s in p["outputs"] and s in q["outputs"]]
    both = told(p, q)
    if both and all(map(_is_number, (p["outputs"].get(s, {}) for s in both))):
        return bool(known)  # the network gives losses, and one of them is left out
    return not all(_is_number(p["outputs"][s]) for s in known)


def _is_number(tensor: Line) -> bool:
    return (tensor.get("shape") or [1]) == [1]


def _named_alike(p: Line, q: Line) -> Line:
    """Name the outputs of a pass as the other run does, where they are the same ones."""
    table = {path: path for path in q["outputs"] if path in p["outputs"]}
    free = [path for path in p["outputs"] if path not in table]
    for path, tensor in q["outputs"].items():
        alike = [s for s in free if s not in table.values() and bits(p["outputs"][s]) ==
                 bits(tensor)]  # fmt: skip
        if path not in table and alike:
            table[path] = alike[0]
    others = [path for path in q["outputs"] if path not in table]
    left = [path for path in free if path not in table.values()]
    if len(others) == len(left):
        table |= dict(zip(others, left, strict=True))
    parts = ("outputs", "values", "loss", "loss values")
    return q | {part: {table.get(s, s): v for s, v in q[part].items()} for part in parts}


def _joined(passes: list[Line]) -> list[Line]:
    """Join passes of parts that are called one by one, to hold them against a whole one."""
    if not passes:
        return []
    layers: Line = {}
    for record in passes:
        layers |= record["layers"]
        if record["module"] and len(record["outputs"]) == 1:
            layers.setdefault(record["module"], next(iter(record["outputs"].values())))
    modes: Line = {}
    for record in reversed(passes):
        modes |= record["modes"]
    last = {k: passes[-1][k] for k in ("outputs", "values", "loss", "loss values")}
    moved = {n: bits for p in passes for n, bits in p["moved"].items()}
    at = max(p.get("loss at", 0) for p in passes)
    return [passes[0] | last | {"layers": layers, "modes": modes, "moved": moved, "loss at": at,
                                "draws": any(p.get("draws") for p in passes)}]  # fmt: skip


def _is_known(x: Line, y: Line) -> bool:
    """Tell whether the traces saw which passes gave a gradient."""
    return all(any(p["loss"] for p in step["passes"]) for step in (x, y))


def _forward(a: Run, b: Run, index: int, x: Line, y: Line, p: Line, q: Line) -> Found | None:
    """Compare one forward pass; where all that it gave is equal, nothing before it matters."""
    if not p["loss"] and not q["loss"] and _is_known(x, y):
        return None  # what was made of it is seen where it is used
    outputs = {s: t for s, t in p["outputs"].items() if s in q["outputs"]}
    used = {s: t for s, t in outputs.items() if s in p["loss"] or s in q["loss"]} or outputs
    named = [(f"output {s}", t, q["outputs"][s]) for s, t in used.items()]
    gave = [name for name, one, other in named if differ(one, other)]
    moved = [n for n in differing(p["moved"], q["moved"]) if a.head["buffers"].get(n, True)]
    layers = differing(p["layers"], q["layers"])
    is_seen = bool(named or p["layers"])
    if is_seen and not gave and not moved and (named or not layers):
        return None
    if found := causes_input.other_input(a, b, index, x, y, p, q):
        return found
    if any(p["modes"][n] != q["modes"].get(n, p["modes"][n]) for n in p["modes"]):
        return causes_network.other_mode(p, q)
    if p is not x["passes"][0] and (found := causes_step.within(a, b, index, x, y, p, q)):
        return found
    if not gave and not layers:
        return None  # averages that had other ones before them: that is found elsewhere
    name = layers[0] if layers else gave[0]
    pair = next(((s, t) for n, s, t in named if n in gave and "norm" in s and "norm" in t), None)
    how_far = size(*pair) if pair else None
    rounding = is_rounding(how_far, *pair) if pair else False
    causes = causes_network.output_causes(a, b, index, name, p, q, rounding)
    rounding = rounding and causes[1][0].page != "layer"
    what = f"output of {name}" if layers else name.strip().replace("output", "the output")
    return Found(causes[0], what.strip(), causes[1], max(len(layers) - 1, 0) + len(gave) *
                 bool(layers), how_far, rounding)  # fmt: skip
