"""What both sides need and nothing about how to train: recipes, data, models, results, parity."""
