"""Finished runs to statistics to a report. Works without torch."""
