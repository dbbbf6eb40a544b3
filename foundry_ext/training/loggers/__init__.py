"""Loggers that a YAML can name."""
