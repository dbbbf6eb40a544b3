"""Grids of runs, started on this machine."""
