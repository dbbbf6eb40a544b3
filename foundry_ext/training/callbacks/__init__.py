"""Callbacks that a YAML can name."""
