"""A lesson in a notebook: both sides cell by cell, and the proof at the end.

`%load_ext common.proof.notebook` gives the cell magics %%plain and %%lightning, which run a cell in
the module of that side, and `prove`. Both sides have names in common, such as `Args` and `main`;
so each has a module of its own.
"""

from common import ROOT, SIDES
from common.messages import keep_quiet
from common.proof.compare import compare_results
from common.proof.explain import draw
from common.proof.lessons import on_the_path
from common.proof.parity import show
from common.proof.watch import watch
from common.run import ready

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = {side: ModuleType(f"notebook_{side}") for side in SIDES}


def load_ipython_extension(shell: Any) -> None:
    """Register the magics and `prove`; called by %load_ext."""
    for side, module in MODULES.items():
        module.__dict__.clear()
        module.__dict__["__name__"] = f"notebook_{side}"
        sys.modules[f"notebook_{side}"] = module  # where dataclasses look for it
        shell.register_magic_function(_runner(side), "cell", side)
    shell.push({"prove": prove})


def _runner(side: str) -> Any:
    def run_cell(_: str, cell: str) -> None:
        with on_the_path(side):
            exec(compile(cell, f"<{side}>", "exec"), MODULES[side].__dict__)

    return run_cell


def prove(lesson: str, **options: Any) -> bool:
    """Train both sides as the cells above define them, compare and show; tell whether they agree.

    `options` are the lesson's, such as max_epochs=1. The results go to runs/notebook/.
    """
    keep_quiet()
    results = []
    for side in SIDES:
        module = MODULES[side]
        # In a folder of its own: what was trained in the terminal stays.
        settings = {"runs_dir": Path("runs", "notebook")} | options
        args = ready(module.Args(**settings), ROOT / side / f"{lesson}.py")
        results.append(watch(module.main, args))
        print(f"{side}: sha256 of the weights {results[-1]['weights_sha256']}")
    plain, lightning = results
    comparison = compare_results(plain, lightning)
    show(plain, lightning, comparison)
    picture = args.runs_dir / lesson / "parity.png"
    draw([result["train_loss"] for result in results], f"{lesson}: both sides", picture)
    with contextlib.suppress(ImportError):  # outside of a notebook there is nothing to show it
        from IPython.display import Image, display

        display(Image(picture))
    return comparison.agree
