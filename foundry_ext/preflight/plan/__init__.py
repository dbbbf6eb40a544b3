"""Estimates steps, tokens, memory and time of a run."""
