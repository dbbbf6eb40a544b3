"""Lengths to packs, packs to batches. Only numpy and torch are needed."""
