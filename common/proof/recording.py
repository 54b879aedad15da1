"""What `order` and `hooks` share: a side in a process of its own, few images, small pictures."""

from common import shapes
from common.data import Data, Images
from common.folders import write_whole
from common.messages import BadInput

import io
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any


def give_few_images(lesson: ModuleType) -> None:
    """Let a lesson find 32 drawn images, the same in each split."""
    drawn = Images(*shapes.draw_shapes(32, seed=1), name="shapes", classes=shapes.CLASSES)
    few = Data(*(replace(drawn, split=split) for split in ("train", "val", "test")))
    lesson.load_images = lambda name, args, transform: few  # type: ignore[attr-defined]


def record_elsewhere(module: str, side: str) -> Any:
    """Return what `python -m MODULE --side SIDE` prints last, as JSON, run in a folder of its own.

    Both sides have modules of the same names: hence two processes. Raises BadInput, with its last
    words, where it breaks off.
    """
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        command = [sys.executable, "-m", module, "--side", side]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.splitlines() or ["nothing"])[-1]
        raise BadInput(f"the {side} side could not be recorded; its last words were: {said}")
    return json.loads(ended.stdout.splitlines()[-1])


def save_small(figure: Any, path: Path, dpi: int) -> None:
    """Write a picture of words and boxes: 64 colours are enough, and a third of the bytes."""
    from PIL import Image

    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=dpi)
    small = Image.open(drawing).convert("RGB").quantize(64)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda half: small.save(half, optimize=True))
