"""Draws docs/both.png, the README's picture: the losses of both sides, and the order of one step.

`python -m common.proof.overview`, or `make overview`, after `make parity-cifar`: the losses are
those of the two runs, and the order is recorded anew, in single precision.
"""

from common import ROOT, SIDES, figures
from common.messages import BadInput, clear_messages
from common.proof.compare import as_data, compare_results
from common.proof.explain import draw_losses
from common.proof.order import COLORS, KINDS, WATCHED, Call, last_step, recorded_side
from common.proof.parity import read_result, settings_of

import itertools
import json
from pathlib import Path
from typing import Any

PICTURE = ROOT / "docs" / "both.png"
PROOF = ROOT / "docs" / "cifar" / "parity.json"  # what the web page shows


def draw(losses: list[list[Any]], title: str, steps: list[list[Call]], path: Path) -> None:
    """Draw the losses on the left, and the calls of one step of each side on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left, right = halves
    draw_losses(left, losses, title)
    axis = right.add_axes((0, 0, 1, 1))
    rows = list(itertools.zip_longest(*steps))
    axis.set(xlim=(0, 100), ylim=(len(rows) + 0.3, -1.7))
    axis.axis("off")
    axis.text(
        50,
        -1.3,
        "One step of the lesson optimize, of two batches, as recorded",
        ha="center",
        fontsize=12,
    )
    for column, name in enumerate(figures.SIDES.values()):
        axis.text(5 + 48 * column, -0.3, name, fontsize=11, weight="bold")
        for row, pair in enumerate(rows):
            if call := pair[column]:
                color = COLORS[KINDS.index(WATCHED[call.name][0])]
                axis.barh(row + 0.5, 46, 0.86, left=4 + 48 * column, color=color)
                axis.text(5 + 48 * column, row + 0.52, call.name, va="center", fontsize=11)
    for row in range(len(rows)):
        axis.text(3, row + 0.52, f"{row + 1}", ha="right", va="center", fontsize=10)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Draw the picture. Raises BadInput where cifar has not been run, or a side breaks off."""
    args = settings_of("cifar", [])
    results = [read_result(side, args) for side in SIDES]
    if not all(results):
        raise BadInput("there are no two results of cifar yet; type make parity-cifar first.")
    title = f"cifar on {results[0]['data']}: both sides"
    steps = [last_step(recorded_side(side)["32-true"]) for side in SIDES]
    draw([result["train_loss"] for result in results], title, steps, PICTURE)
    plain, lightning = results
    data = as_data(plain, lightning, compare_results(plain, lightning))
    PROOF.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {title}.")


if __name__ == "__main__":
    with clear_messages():
        main()
