"""Helpers for every package; they need only the standard library."""
