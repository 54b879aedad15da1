"""Watches a training from outside, and compares two of them. No lesson imports it."""
