"""The record of a run, and the settings that decide its result. Works without torch."""
