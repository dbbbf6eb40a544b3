"""Measurements: each script runs by itself, the other modules are what several of them need."""
