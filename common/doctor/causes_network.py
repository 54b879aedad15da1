"""The causes of a difference in the forward pass: modes, weights, buffers, layers, randomness."""

from .evidence import Cause, Found, bits, unknown
from .files import Line
from .messages import SAMENESS
from .run import Run, training


def other_mode(p: Line, q: Line) -> Found:
    both = [(name or "the network", mode, q["modes"][name]) for name, mode in p["modes"].items()
            if name in q["modes"]]  # fmt: skip
    unlike = [(name, m, n) for name, m, n in both if m != n]
    words = {"1": "train", "0": "eval"}
    said = f"{len(unlike)} of {len(both)} modules, first {unlike[0][0]}: "
    said += f"{words[unlike[0][1]]} in A, {words[unlike[0][2]]} in B."
    causes = [Cause("model.train() is missing after an evaluation, or before the training", said,
                    "train-and-eval")]  # fmt: skip
    if len(unlike) < len(both):
        causes.insert(0, Cause("A part of the network is frozen on one side", said,
                               "train-and-eval"))  # fmt: skip
    return Found("mode", unlike[0][0], causes, len(unlike) - 1)


FROZEN = "Frozen or detached on one side (requires_grad, detach, no_grad, create_graph)"
EVAL = "model.eval() is missing before an evaluation"
AGAIN = "A forward pass without a backward pass, in train mode, moved buffers (running averages)"
RECOMPUTED = "The running averages move twice: once more in the recomputation of a checkpoint"


def changed(a: Run, b: Run, index: int, x: Line, y: Line, names: list[str]) -> Found:
    """Say who changed the weights that a step's first forward pass found."""
    for run, step in ((a, x), (b, y)):
        for record in step["passes"]:
            counted = record.get("evaluation", {"moved": {}, "batches": 0, "mode": ""})
            moved = record["moved"] | counted["moved"]
            if record["loss"] or not any(n in moved for n in names):
                if record["loss"]:
                    break
                continue
            first = next(n for n in names if n in moved)
            if record["kind"] == "train" and first in record["moved"]:
                said = f"{run.name} made a forward pass with gradients, but no backward pass from "
                said += f"it; it moved {first}."
                cause = Cause(AGAIN, said, "summary")
            else:
                cause = _without_gradients(run, index, record, first)
            return Found("weights", names[0], [cause], len(names) - 1)
    touched = {run.name: {n: t for record in step["passes"] for n, t in record["changed"].items()}
               for run, step in ((a, x), (b, y))}  # fmt: skip
    who = [name for name, found in touched.items() if any(n in found for n in names)]
    said = f"between two steps, in {' and '.join(who) or 'one run'}: no optimizer that was traced "
    said += "did it."
    if all(a.head["buffers"].get(n) is not None for n in names):
        said = f"only buffers changed, first {names[0]}, in {' and '.join(who) or 'one run'}."
        cause = Cause("Running averages were changed between two steps", said, "summary")
        return Found("weights", names[0], [cause], len(names) - 1)
    if not index:
        said = f"within the block, before step 1, in {' and '.join(who) or 'one run'}."
        cause = Cause("Other weights before the first step: initialized otherwise, or loaded", said,
                      "seed-and-layers")  # fmt: skip
        return Found("weights", names[0], [cause], len(names) - 1)
    for run in (a, b):
        found = touched[run.name]
        largest = {found[n].get("max") for n in names if n in found}
        if len(names) > 1 and len(largest) == 1 and None not in largest:
            said += f" In {run.name} the largest magnitude is {largest.pop():.6g} in each: clamped?"
        if index and names and all(bits(found.get(n, "?")) == _start(run, n) for n in names):
            said += f" They are {run.name}'s initial weights again."
    cause = Cause("Weights were loaded, averaged or clamped between two steps", said)
    return Found("weights", names[0], [cause], len(names) - 1)


def _without_gradients(run: Run, index: int, record: Line, name: str) -> Cause:
    """Say what a forward pass without gradients was for, by the batch that it got."""
    said = f"{run.name} made forward passes without gradients in train mode; they moved {name}."
    given: set[str] = set()
    if record["kind"] == "no_grad":  # else it is one of many that were counted alone
        given = {bits(t) for t in record["inputs"].values() if "bits" in t}
    steps = [run.step(n) for n in (index - 1, index) if n >= 0]
    batches = [{bits(t) for t in p["inputs"].values() if "bits" in t}
               for step in steps for p in training(step)]  # fmt: skip
    if given and given in batches:
        return Cause(AGAIN, f"{said} Their batch is one of the training, as for a metric.",
                     "summary")  # fmt: skip
    return Cause(EVAL, said, "train-and-eval")


def _start(run: Run, name: str) -> str:
    return bits(run.head["start"].get(name, "none"))


def other_buffers(a: Run, b: Run, index: int, x: Line, y: Line, names: list[str]) -> Found:
    """Say by which forward passes a buffer moved: the parameters are equal after the step."""
    name = names[0]
    module = name.rpartition(".")[0]
    moves = [[p for p in step["passes"] if name in p["moved"]] for step in (x, y)]
    counts = [len(side) for side in moves]
    said = f"{name} was moved by {counts[0]} forward passes in A, by {counts[1]} in B"
    setting = other_setting(a, b, module)
    causes = [setting] if setting else []
    more = [p for side in moves for p in side]
    kinds = [[sum(p["kind"] == kind for p in side) for side in moves]
             for kind in ("recompute", "no_grad")]  # fmt: skip
    without = [sum(p["kind"] == "train" and not p["loss"] for p in side) for side in moves]
    if kinds[0][0] != kinds[0][1]:
        who = "A" if kinds[0][0] > kinds[0][1] else "B"
        causes.append(Cause(RECOMPUTED, f"{said}; in {who} also within the backward pass."))
    if without[0] != without[1]:
        who = "A" if without[0] > without[1] else "B"
        causes.append(Cause(AGAIN, f"{said}; in {who} one of them had no backward pass.",
                            "summary"))  # fmt: skip
    if kinds[1][0] != kinds[1][1]:
        run, side = (a, moves[0]) if kinds[1][0] > kinds[1][1] else (b, moves[1])
        record = next(p for p in side if p["kind"] == "no_grad")
        causes.append(_without_gradients(run, index, record, name))
    if not causes:
        what = "as often" if counts[0] == counts[1] and more else "otherwise"
        name_of = "Buffers are moved by something else than the forward pass, or computed otherwise"
        causes = [Cause(name_of, f"{said}: {what} in both; all parameters are equal.")]
    return Found("buffers", name, causes, len(names) - 1)


def other_setting(a: Run, b: Run, module: str | None) -> Cause | None:
    """Hold a module's settings against those that it has in the other run, if it is there."""
    ours, theirs = (run.settings().get(module) for run in (a, b))
    if ours == theirs or ours is None or theirs is None:
        return None
    said = f"{module} is {ours} in A, {theirs} in B."
    return Cause("A layer with another setting", said, "layer")


def output_causes(
    a: Run, b: Run, index: int, what: str, p: Line, q: Line, rounding: bool
) -> tuple[str, list[Cause]]:
    """Return the stage, output or random, and the causes; `what` is the first that differs."""
    causes: list[Cause] = []
    types = [{t.get("dtype") for t in record["outputs"].values()} for record in (p, q)]
    if types[0] != types[1]:
        said = f"the output is {_words(types[0])} in A, {_words(types[1])} in B."
        causes.append(Cause("Another precision (autocast on one side)", said, "precision"))
    # Only layers without parts: the class that holds them may have another name.
    modules = a.settings()
    leaves = [n for n in modules if n and not any(m.startswith(f"{n}.") for m in modules)]
    causes += [cause for name in leaves if (cause := other_setting(a, b, name))][:1]
    drawn = [n for n in p["random"] if p["random"][n] != q["random"].get(n)]
    draws = p.get("draws") or q.get("draws")
    noise = _noise(p, q)
    if drawn and draws and not noise and not rounding and not causes:
        said = f"before the forward pass the state of {drawn[0]}'s generator differs; the first "
        said += f"output that differs is that of {what}."
        seen = [record["evaluation"]["batches"] for record in (p, q)]
        if seen[0] != seen[1]:
            said += f" A evaluated {seen[0]} batches before it, B {seen[1]}."
        name = "Random numbers, such as a dropout's, from another state"
        return "random", [Cause(name, said, "validation-and-order")]
    if rounding:
        causes += rounding_causes(a, b, p, q)
    if noise:
        causes.append(noise)
    said = f"batch and weights are equal; {what} is the first whose output differs."
    name = "Another computation in the network"
    if what.startswith("output") and p["layers"] and p["layers"].keys() == q["layers"].keys():
        name += ", after its layers"
        said = f"batch and weights are equal, and so is what each layer gave; {what.strip()} is "
        said += "made of it otherwise, or of a buffer."
    given = p.get("given", {}).get(what), q.get("given", {}).get(what)
    if None not in given and given[0] != given[1]:
        name += f", before {what}"
        said += f" What {what} gets differs already: the difference is in the code that calls it."
    elif None not in given:
        name += f", in {what}"
        said += f" What {what} gets is equal."
    elif index and not draws and not causes:
        name += ", or a state that it keeps outside of its buffers"
        said += f" In the {index} recorded steps before, all outputs were equal."
        again = [n for n in range(index) if any(r.get("rows") == p.get("rows")
                                                for r in training(a.step(n)))]  # fmt: skip
        if again and "rows" in p:
            said += f" The batch is that of step {a.step(again[-1])['step']:,} again: an epoch "
            said += "ended between."
    return "output", [*causes, Cause(name, said, "layer")]


def _noise(p: Line, q: Line) -> Cause | None:
    """Look for random numbers that are drawn on one side alone, or in another module."""
    name = "Dropout, or other noise, on one side"
    if "drew" in p and "drew" in q:
        for who, own, other in (("A", p["drew"], q["drew"]), ("B", q["drew"], p["drew"])):
            if only := [module for module in own if module not in other]:
                said = f"{only[0] or 'the network itself'} draws random numbers in {who} alone."
                return Cause(name, said, "layer")
    if bool(p.get("draws")) != bool(q.get("draws")):
        who = "A" if p.get("draws") else "B"
        return Cause(name, f"only {who}'s forward pass draws random numbers.", "layer")
    return None


def _words(types: set) -> str:
    return " and ".join(sorted(map(str, types)))


def rounding_causes(a: Run, b: Run, p: Line | None, q: Line | None) -> list[Cause]:
    """Say what of the two runs' surroundings can have put sums into another order."""
    ours, theirs = (run.head["environment"] | ({"threads": record["threads"]} if record else {})
                    for run, record in ((a, p), (b, q)))  # fmt: skip
    others = [name for name in ours if name != "versions" and ours[name] != theirs.get(name)]
    said = "; ".join(f"{name}: {ours[name]} in A, {theirs.get(name)} in B" for name in others)
    said = said or "a kernel chosen by memory layout, another device, or compiled code"
    return [Cause(f"The same sums in another order: {SAMENESS}", f"{said}.")]


def recomputed_otherwise(run: Run, index: int) -> str:
    """Return the layer whose recomputation, in a backward pass, gave something else; else ''."""
    first: Line = {}
    for record in run.step(index)["passes"]:
        if record["kind"] == "train":
            first |= record["layers"]
        elif record["kind"] == "recompute":
            for layer, value in record["layers"].items():
                known = first.get(layer, "?")
                if not unknown(known) and not unknown(value) and value != known:
                    return layer
            for value in record["outputs"].values():
                known = first.get(record["module"], "?")
                if not unknown(known) and not unknown(value) and bits(value) != known:
                    return record["module"]
    return ""
