"""The causes of a difference before the forward pass: in the initial weights, or in an input.

Like its neighbours, it looks at the same part of both traces. The causes come in the order in which
they fit; each says what it saw, so that a reader can judge it.
"""

import math

from .causes_batch import argument_causes, batch_causes
from .evidence import Cause, Found, bits, differ, is_rounding, named, size, unknown
from .files import Line
from .run import Run, training


def other_network(a: Run, b: Run) -> Found | None:
    """Compare the parameters' names and shapes, and which of them are one tensor."""
    names = [run.names() for run in (a, b)]
    # What one of the two does not save is no part of the network that both have.
    left_out = {n for run in (a, b) for n, is_saved in run.head["buffers"].items() if not is_saved}
    ours, theirs = ({n: t.get("shape") for n, t in side.items() if n not in left_out}
                    for side in names)  # fmt: skip
    if ours == theirs:
        return _tied(a, b)
    one_sided = sorted(ours.keys() ^ theirs.keys())
    unlike = one_sided or [n for n in ours if ours[n] != theirs[n]]
    said = f"{unlike[0]}: {ours.get(unlike[0], 'none')} in A, {theirs.get(unlike[0], 'none')} in B."
    if len(ours) != len(theirs):
        said += f" A has {len(ours)} tensors, B {len(theirs)}; is the same part watched?"
    for who, own, other in (("A", ours, theirs), ("B", theirs, ours)):
        if own.keys() < other.keys():
            said += f" A part that {who} holds in a plain list or dict is not registered; use "
            said += "nn.ModuleList or nn.ModuleDict."
    cause = Cause("Another network", said, "layer")
    if sorted(map(str, ours.values())) == sorted(map(str, theirs.values())):
        cause = Cause("Layers in another order", f"all shapes are in both, elsewhere; {said}",
                      "seed-and-layers")  # fmt: skip
    return Found("start", f"shape of {unlike[0]}", [cause], len(unlike) - 1)


def _tied(a: Run, b: Run) -> Found | None:
    ours, theirs = a.head["tied"], b.head["tied"]
    names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if not names:
        return None
    name = names[0]
    who, other, first = ("A", "B", ours[name]) if name in ours else ("B", "A", theirs[name])
    said = f"{name} and {first} are one tensor in {who}, and two in {other}."
    cause = Cause(f"Weights are tied in {who}, and not in {other}", said, "layer")
    return Found("start", f"{name}, which is {first} in {who}", [cause], len(names) - 1)


def start_causes(a: Run, b: Run) -> list[Cause]:
    ours, theirs = a.head["start"], b.head["start"]
    both = [n for n in ours if n in theirs and not unknown(ours[n]) and not unknown(theirs[n])]
    different = [n for n in both if differ(ours[n], theirs[n])]
    drawn = [n for n in both if ours[n]["norm"] and not _is_constant(ours[n])]
    if {bits(ours[n]) for n in both} == {bits(theirs[n]) for n in both}:
        said = "the same tensors have other names."
        return [Cause("Layers in another order", said, "seed-and-layers")]
    for run, other in ((a, b), (b, a)):
        wanted = {n: bits(other.head["start"][n]) for n in different}
        for line in run.every_step():
            if all(line["weights"]["bits"].get(n) == wanted[n] for n in different):
                said = f"{other.name} starts with the weights that {run.name} has after step "
                said += f"{line['step']:,}."
                return [Cause(f"{other.name} goes on from a training, or a checkpoint was loaded",
                              said)]  # fmt: skip
    ratios = [_ratio(ours[n], theirs[n]) for n in different]
    similar = all(0.5 < r < 2 for n, r in zip(different, ratios, strict=True)
                  if math.prod(ours[n]["shape"]) > 64)  # fmt: skip
    share = f"{len(different)} of {len(both)} tensors differ, and those that are drawn"
    seed = Cause(
        "Another seed, or random numbers drawn before the network was built",
        f"{share} have about the same norms.", "seed-and-layers",
    )  # fmt: skip
    if similar and len(different) < len(drawn):
        cause = Cause(
            "Random numbers drawn between the layers, or layers built in another order",
            f"{len(drawn) - len(different)} tensors are equal, such as "
            f"{next(n for n in drawn if n not in different)}; {different[0]} is not.",
            "seed-and-layers",
        )
        return [cause, seed]
    if similar:
        return [seed]
    far = max(zip(ratios, different, strict=True), key=lambda p: abs(math.log(p[0] or 1e-9)))[1]
    said = f"norms differ: {far} {ours[far]['norm']:.4g} in A, {theirs[far]['norm']:.4g} in B."
    return [Cause("Another initialization, or pretrained weights on one side", said), seed]


def _ratio(one: Line, other: Line) -> float:
    return other["norm"] / one["norm"] if one["norm"] else math.inf


def _is_constant(tensor: Line) -> bool:
    """Tell whether all values are equal, as the ones of a BatchNorm."""
    count = math.prod(tensor["shape"])
    return count > 1 and math.isclose(tensor["norm"] ** 2 * count, tensor["sum"] ** 2, rel_tol=1e-6)


def other_input(a: Run, b: Run, index: int, x: Line, y: Line, p: Line, q: Line) -> Found | None:
    """Compare the arguments of a forward pass by their names."""
    pairs, missing = _match(p["inputs"], q["inputs"])
    tensors = [pair for pair in pairs if "bits" in pair[1] and "bits" in pair[2]]
    for path, one, other in pairs:
        if not differ(one, other):
            continue
        if "bits" not in one or "bits" not in other:
            said = f"{path} is {bits(one)} in A, {bits(other)} in B."
            cause = Cause(f"Another value of the argument {path}", said)
            return Found("batch", f"argument {path}", [cause])
        if found := _computed(a, b, index, x, y, p, q, path, one, other):
            return found
        how_far = size(one, other)
        what = " and ".join(dict.fromkeys(map(named, (one, other))))  # once, where both are alike
        what = f"{path}: {what}" if len(tensors) > 1 else what
        if path == _of_samples(p) and "rows" in p and "rows" in q:
            causes = batch_causes(a, b, index, p, q, one, other)
        else:
            causes = argument_causes(a, b, index, p, q, path)
        return Found("batch", what, causes, 0, how_far, is_rounding(how_far, one, other))
    for path, one, who, other in missing:
        root = path.split(".")[0]
        said = f"{who} passes {path} ({named(one) if 'bits' in one else bits(one)}), {other} does "
        said += f"not; {len(missing)} in all." if len(missing) > 1 else "not."
        name = f"The argument {root} is missing in {other}"
        run, record = (a, p) if who == "A" else (b, q)
        origin = _origin(run, index, record, bits(one))
        if origin and "step" in origin:
            name += f": a state that {who} carries on from one step to the next"
            said += f" It is {origin}."
        return Found("batch", f"argument {root}", [Cause(name, said)], len(missing) - 1)
    return None


def _of_samples(record: Line) -> str:
    """Return the argument whose samples were recorded: the first tensor with a dimension."""
    return next((s for s, t in record["inputs"].items() if t.get("shape")), "")


def _match(ours: Line, theirs: Line) -> tuple[list, list]:
    """Pair arguments by name; those that are left by their order, where both have as many."""
    pairs = [(s, t, theirs[s]) for s, t in ours.items() if s in theirs]
    left = [[(s, t) for s, t in one.items() if s not in other]
            for one, other in ((ours, theirs), (theirs, ours))]  # fmt: skip
    kinds = [["bits" in t for _, t in side] for side in left]
    if kinds[0] == kinds[1]:
        return pairs + [(s, t, other) for (s, t), (_, other) in zip(*left, strict=True)], []
    names = (("A", "B"), ("B", "A"))
    missing = [(s, t, *who) for side, who in zip(left, names, strict=True) for s, t in side]
    return pairs, sorted(missing, key=lambda m: "bits" not in m[1])


def _origin(run: Run, index: int, record: Line, wanted: str) -> str:
    """Say which output of an earlier pass an input is; '' where it is none."""
    if index:
        before = run.step(index - 1)
        for other in before["passes"]:
            for path, tensor in other["outputs"].items():
                if bits(tensor) == wanted:
                    where = f"output {path}".strip()
                    return f"{where} of step {before['step']:,}"
    made = _made_by(run, index, record, wanted)
    return f"what {made['module'] or 'the network'} gave before" if made else ""


def _made_by(run: Run, index: int, record: Line, wanted: str) -> Line | None:
    for other in run.step(index)["passes"]:
        if other["begin"] < record["begin"] and any(
            bits(t) == wanted for t in other["outputs"].values()
        ):
            return other
    return None


def _computed(
    a: Run, b: Run, index: int, x: Line, y: Line, p: Line, q: Line, path: str, one: Line,
    other: Line,
) -> Found | None:  # fmt: skip
    """Look whether an input was computed by the network itself, and so is no part of a batch."""
    makers = [_made_by(run, index, record, bits(tensor))
              for run, record, tensor in ((a, p, one), (b, q, other))]  # fmt: skip
    first, second = makers
    if first and second and first["module"] == second["module"]:
        given_to = [t for m in (first, second) for t in m["inputs"].values() if "bits" in t]
        if all("attached" in t for t in given_to):
            return other_input(a, b, index, x, y, first, second)
        pairs, _ = _match(first["inputs"], second["inputs"])
        for given, t, u in pairs:
            if differ(t, u):
                said = f"what {p['module']} gets was made by {first['module']}, whose {given} "
                said += "differs."
                return Found("batch", f"{given} of {first['module']}", [_drawn(first, second, said)
                             or Cause(f"Another value of the argument {given}", said)])  # fmt: skip
        return None
    origins = [_origin(run, index, record, bits(tensor))
               for run, record, tensor in ((a, p, one), (b, q, other))]  # fmt: skip
    attached = one.get("attached") or other.get("attached")
    if not attached and origins[0] == origins[1]:
        return _made_of_batch(a, b, index, p, path, one, other)
    module = p["module"] or "the network"
    what = f"{path} of {module}"
    how_far = size(one, other)
    rounding = is_rounding(how_far, one, other)
    said = f"{path} of {module} is the first that differs; what the parts before it gave is equal."
    for name, origin, rest in (("A", origins[0], origins[1]), ("B", origins[1], origins[0])):
        if origin and not rest:
            said += f" In {name} it is {origin}, in the other run it is not."
    cause = Cause(f"Another computation before {module}, outside of the parts of the network", said,
                  "layer")  # fmt: skip
    if any("step" in origin for origin in origins):
        who = "A" if "step" in origins[0] else "B"
        cause = Cause(f"A state is carried on from one step to the next in {who} alone", said)
    if drawn := _drawn(p, q, said):
        return Found("random", what, [drawn, cause], 0, how_far, rounding)
    return Found("output", what, [cause], 0, how_far, rounding)


def _made_of_batch(
    a: Run, b: Run, index: int, p: Line, path: str, one: Line, other: Line
) -> Found | None:
    """Look whether an input is that of an earlier pass of the step, changed, as by an attack."""
    for before, after in zip(training(a.step(index)), training(b.step(index)), strict=False):
        known, same = before["inputs"].get(path, {}), after["inputs"].get(path, {})
        if before["begin"] >= p["begin"] or not known.get("sketch") or differ(known, same):
            continue
        changes = [size(known, one) or 9.0, size(known, other) or 9.0]
        if max(changes) > 1:
            continue
        said = (
            f"A's {path} is that of the pass before it, changed by {changes[0]:.3g} of its norm; "
        )
        said += f"B's by {changes[1]:.3g}."
        cause = Cause("Another change of a batch between two forward passes, such as an attack",
                      said, "augmentation")  # fmt: skip
        how_far = size(one, other)
        return Found("batch", f"{path}: {named(one)}", [cause], 0, how_far,
                     is_rounding(how_far, one, other))  # fmt: skip
    return None


def _drawn(p: Line, q: Line, said: str) -> Cause | None:
    if p["random"].get("torch") == q["random"].get("torch"):
        return None
    more = f"{said} The state of torch's generator differs before {p['module'] or 'the network'}."
    return Cause("Random numbers from another state, outside of the network's parts", more,
                 "validation-and-order")  # fmt: skip
