"""What lessons import, flat; and two folders that none imports: what proves, and the doctor."""

from common.environment import clean
from common.messages import one_sentence_during_imports
from common.signals import end_with_starter

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("plain", "lightning")
# A lesson can have a third side, "trainer", whose script stands beside Lightning's.
THIRD = {"fabric": "lightning/fabric_trainer.py"}


def sides_of(lesson: str) -> tuple[str, ...]:
    """Return the names of a lesson's sides."""
    return (*SIDES, "trainer") if lesson in THIRD else SIDES


def script_of(side: str, lesson: str) -> Path:
    """Return the path of one side's script."""
    return ROOT / (THIRD[lesson] if side == "trainer" else f"{side}/{lesson}.py")


def lesson_and_side(script: Path) -> tuple[str, str]:
    """Return which lesson and which side a script is of, by its place alone."""
    path = "/".join(script.absolute().parts[-2:])
    for lesson, third in THIRD.items():
        if path == third:
            return lesson, "trainer"
    return script.stem, script.absolute().parent.name


clean(sys.argv[0] if sys.argv else "")
one_sentence_during_imports()
end_with_starter()
# Before PyTorch is imported, which reads it once: its network code warns of host names that no
# server knows, and prints each failure before it raises the error that is told in one sentence.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
# Pictures go into files. A notebook's kernel names a backend here that this Python may not have,
# and Matplotlib would end each import of Lightning with a traceback.
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"
