"""Runs compared: records, fairness, statistics, report; no torch here, nor a trainer."""
