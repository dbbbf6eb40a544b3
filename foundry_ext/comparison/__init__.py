"""Comparison of finished runs: statistics and a report. Works without torch."""
