"""Record when both sides of the lesson `when` validate, look, save and end, for many settings.

`python -m common.proof.moments` trains both sides on a few images, ten batches in an epoch, once
for each setting, prints what happened after which batch, and writes the table of docs/when.md. Exit
status 0: both sides did the same at the same moments; 1: they did not; 2: a side broke off.
"""

from common import ROOT, SIDES
from common.messages import Parser, clear_messages
from common.proof.lessons import load
from common.proof.recording import give_few_images, record_elsewhere
from common.run import ready

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

PAGE = ROOT / "docs" / "when.md"
MARK, END = "<!-- made by make moments -->\n", "<!-- end -->"
NEVER = {"patience": 1000}
BAD = {"patience": 2, "lr": 1e-30}  # no validation is better than the first one
SETTINGS: list[dict[str, Any]] = [
    dict(val_check_interval=1.0),
    dict(val_check_interval=0.25),
    dict(val_check_interval=0.3),
    dict(val_check_interval=3),
    dict(val_check_interval=1),
    dict(val_check_interval=1, check_val_every_n_epoch=None),
    dict(val_check_interval=7, check_val_every_n_epoch=None),
    dict(val_check_interval=25, check_val_every_n_epoch=None),
    dict(val_check_interval=1.0, check_val_every_n_epoch=2),
    dict(val_check_interval=5, check_val_every_n_epoch=2),
    dict(val_check_interval=1.0, max_steps=13),
    dict(val_check_interval=0.5, max_steps=13),
    dict(val_check_interval=3, **BAD),
    dict(val_check_interval=1.0, max_epochs=6, **BAD),
    dict(val_check_interval=3, min_epochs=2, **BAD),
    dict(val_check_interval=1.0, overfit_batches=2),
    dict(fast_dev_run=3),
]
DID = ("validates", "looks", "saves", "ends")
HEADINGS = ("validates after batch", "early stopping looks", "saves", "ends")


def watched(side: str, module: Any, note: Any) -> None:
    """Let a side tell `note` whenever it validates, looks or saves."""

    def telling(owner: Any, name: str, what: str, when: Any) -> None:
        usual = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            if when(*given):
                note(what)
            return usual(*given, **more)

        setattr(owner, name, call)

    def always(*_: Any) -> bool:
        return True

    if side == "plain":

        def validates(net: Any, loader: Any, device: Any, stage: str, *_: Any) -> bool:
            return stage == "val" and hasattr(loader, "dataset")  # the sanity check gets a part

        telling(module, "evaluate", "validates", validates)
        telling(module.EarlyStopping, "update", "looks", always)
        telling(module, "save", "saves", always)
        return
    telling(module.Moments, "on_validation_end", "validates",
            lambda callback, trainer, module: not trainer.sanity_checking)  # fmt: skip
    telling(module.EarlyStopping, "_run_early_stopping_check", "looks",
            lambda callback, trainer: not trainer.fast_dev_run)  # fmt: skip
    telling(module.ModelCheckpoint, "_save_checkpoint", "saves", always)


def record(side: str) -> list[dict[str, list[int]]]:
    """Train one side with each setting; return after how many steps it did what."""
    found = []
    module = load(side, "when")
    give_few_images(module)
    steps, moments = 0, dict[str, list[int]]()

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    def note(what: str) -> None:
        if steps not in moments[what]:  # two checkpoints can be written at once
            moments[what].append(steps)

    watched(side, module, note)
    register_optimizer_step_post_hook(step)
    for number, settings in enumerate(SETTINGS):
        steps, moments = 0, {what: [] for what in DID}
        usual = dict(max_epochs=4, batch_size=3, limit_train_batches=10, refresh_rate=0, threads=1)
        chosen = usual | NEVER | settings
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            made = module.Args(**chosen, accelerator="cpu", runs_dir=Path(folder) / f"{number}")
            args = ready(made, ROOT / side / "when.py")
            module.main(args)
        moments["ends"] = [steps]
        found.append(moments)
    return found


def short(steps: list[int]) -> str:
    """Name the steps; of many, the first and the last ones, and how many they are."""
    if len(steps) > 8:
        first, last = (", ".join(map(str, part)) for part in (steps[:3], steps[-1:]))
        return f"{first}, ..., {last} ({len(steps)} times)"
    return ", ".join(map(str, steps)) or "never"


def named(settings: dict[str, Any]) -> str:
    """Write settings as they are typed; a learning rate that lets nothing improve as a word."""
    typed = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()
             if name != "lr"]  # fmt: skip
    return f"`{' '.join(typed)}`" + (", nothing improves" if "lr" in settings else "")


def table(found: dict[str, list[dict[str, list[int]]]]) -> tuple[str, bool]:
    """Return the table of both sides, and whether they did all at the same moments."""
    lines = ["| options | side | " + " | ".join(HEADINGS) + " |", "| --- " * 6 + "|"]
    for settings, plain, lightning in zip(SETTINGS, *(found[s] for s in SIDES), strict=True):
        for side, moments in (("plain", plain), ("lightning", lightning)):
            cells = " | ".join(short(moments[what]) for what in DID)
            lines.append(f"| {named(settings) if side == 'plain' else ''} | {side} | {cells} |")
    equal = found["plain"] == found["lightning"]
    said = "the same moments on both sides" if equal else "**different moments**"
    return "\n".join([*lines, "", f"{len(SETTINGS)} settings: {said}."]), equal


def main(argv: list[str]) -> int:
    parser = Parser(prog="common.proof.moments", description=__doc__.split("\n\n")[1])
    parser.add_argument("--side", choices=SIDES, help="record one side, and print it as JSON")
    given = parser.parse_args(argv)
    if given.side:
        print(json.dumps(record(given.side)))
        return 0
    made, equal = table({side: record_elsewhere("common.proof.moments", side) for side in SIDES})
    print(made)
    if equal:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
        PAGE.write_text(f"{before}{MARK}{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if equal else 1


if __name__ == "__main__":
    with clear_messages(failed=2):
        sys.exit(main(sys.argv[1:]))
