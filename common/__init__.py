"""What both sides need and nothing about how to train: recipes, data, models, results, parity."""

from common.messages import one_sentence_during_imports

one_sentence_during_imports()
