"""What both sides need and nothing about how to train: recipes, data, models, results, parity."""

from common.messages import one_sentence_during_imports

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("plain", "lightning")

one_sentence_during_imports()
# Before PyTorch is imported, which reads it once: its network code warns of host names that no
# server knows, on every start where machines have none.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
