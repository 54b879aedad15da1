"""What both sides need and nothing about how to train: recipes, data, models, results, parity."""

from common.messages import one_sentence_during_imports

from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("plain", "lightning")

one_sentence_during_imports()
