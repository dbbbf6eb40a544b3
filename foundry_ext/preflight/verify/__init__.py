"""Checks packing and resumption on the model and data of a run."""
