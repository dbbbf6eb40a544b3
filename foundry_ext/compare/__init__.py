"""Runs compared: records, sweeps, fairness, statistics, the report. No torch is imported here."""
