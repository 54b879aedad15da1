"""What is worth knowing beside the first difference: surroundings, and what did no harm."""

from .evidence import differing, unknown
from .files import Line
from .run import Run


def environment(a: Run, b: Run) -> list[str]:
    """Say what of the surroundings differs: it can change the last bit of a sum."""
    ours, theirs = (dict(run.head["environment"]) for run in (a, b))
    both = [side.pop("versions", {}) for side in (ours, theirs)]
    pairs = [(f"{name} of the package", both[0][name], both[1][name])
             for name in both[0] if name in both[1]]  # fmt: skip
    pairs = [(name.removesuffix(" of the package"), x, y) for name, x, y in pairs]
    pairs += [(name, ours[name], theirs[name]) for name in ours if name in theirs]
    said = [f"{name} {x} and {y}" for name, x, y in pairs if x != y]
    return [f"The runs were not made alike: {'; '.join(said)}."] if said else []


def not_seen(a: Run, b: Run) -> list[str]:
    """Say what the traces could not read, and so cannot compare."""
    remarks = []
    for run in (a, b):
        first = run.step(0)
        what = [f"{where} ({why})" for where, why in run.end.get("unseen", {}).items()]
        what += [w for record in first["passes"] for w in record["unseen"]]
        what += [f"output of {n}" for p in first["passes"] for n, bits in p["layers"].items()
                 if unknown(bits)]  # fmt: skip
        if not any(record["kind"] == "train" for record in first["passes"]):
            what.insert(0, "the forward passes (compiled code, or another module was called)")
        if what:
            more = f" and {len(what) - 1} more" if len(what) > 1 else ""
            remarks.append(f"Not seen in {run.name}, and not compared: {what[0]}{more}.")
    return remarks


def harmless(x: Line, y: Line) -> str:
    """Say what differs in a step after which all weights are equal."""
    ours, theirs = ([p for p in step["passes"] if p["kind"] == "train"] for step in (x, y))
    for one, other in zip(ours, theirs, strict=False):
        seen = [record["evaluation"]["batches"] for record in (one, other)]
        drawn = [n for n in one["random"] if one["random"][n] != other["random"].get(n)]
        given = sorted(one["inputs"].keys() ^ other["inputs"].keys())
        if drawn:
            said = f"the state of {drawn[0]}'s generator differs"
        elif seen[0] != seen[1]:
            said = f"A had evaluated {seen[0]} batches, B {seen[1]}"
        elif given and len(one["inputs"]) != len(other["inputs"]):
            said = f"only {'A' if given[0] in one['inputs'] else 'B'} passes {given[0]}"
        elif differing(one["outputs"], other["outputs"]):
            said = "an output differs"
        else:
            continue
        return f"Before step {x['step']:,} {said}; no weight depended on it."
    if len(ours) != len(theirs):
        return (f"Before step {x['step']:,} A made {len(ours)} forward passes, B {len(theirs)}; "
                "no weight depended on it.")  # fmt: skip
    if differing(x["used"]["bits"], y["used"]["bits"]) or x["fresh"] != y["fresh"]:
        return f"In step {x['step']:,} gradients differ on which no weight depended."
    return ""
