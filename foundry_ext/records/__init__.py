"""The record of a run, and the settings that its result depends on. Works without torch."""
