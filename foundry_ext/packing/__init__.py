"""Document lengths to packs, and packs to batches; needs numpy and torch only."""
