"""Weights on disk: atomic files, safe reading, export, merge."""
