"""The first packs of a run as the model receives them, as a page."""
