"""How much rounding there is: measured by a run that began one unit in the last place beside.

`Trace(..., nudge=True)` moves all weights of a network by one unit in their last place before it
records. What a stage of that run differs by from the same run without it, rounding can make: so
much, and some times more, is rounding in a comparison with another run.
"""

import torch
from torch import nn

from .evidence import apart, size
from .files import Line
from .messages import BadInput
from .run import Run, paired

TIMES = 4  # as much as rounding can differ from one run to the next, and sketches from the truth


def nudge(model: nn.Module) -> None:
    """Move each weight to the next number above it, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                above = torch.full_like(parameter, float("inf"))
                parameter.copy_(torch.nextafter(parameter, above))


def measured(a: Run, nudged: Run, step: int, stage: str) -> float:
    """Return how far the nudged run is from A at a stage of a step, relative to A.

    Raises BadInput where the nudged run has no such step, or is another network.
    """
    found = [{line["step"]: line for line in run.every_step()}.get(step) for run in (a, nudged)]
    x, y = found
    if x is None or y is None or x["weights"]["bits"].keys() != y["weights"]["bits"].keys():
        raise BadInput(
            f"the nudged run has no step {step} of A's network; make it as A, with nudge=True."
        )
    stages = {"gradient": ("fresh", "used"), "clipping": ("used",), "update": ("weights",)}
    for part in stages.get(stage, ()):
        if x[part] and y[part]:
            return apart(x[part], y[part], list(x[part]["bits"])) or 0.0
    return _of_passes(x, y, "loss" if stage == "loss" else "outputs")


def _of_passes(x: Line, y: Line, part: str) -> float:
    sizes = [size(p[part][s], q[part][s]) for p, q in zip(*paired(x, y), strict=False)
             for s in p[part] if s in q[part]]  # fmt: skip
    return max((found for found in sizes if found is not None), default=0.0)
