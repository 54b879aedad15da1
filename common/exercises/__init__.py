"""Exercises made from the lessons themselves, and graded by running them beside their twins."""
