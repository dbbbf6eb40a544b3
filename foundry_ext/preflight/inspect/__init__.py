"""Shows the first packs of a run as the model receives them."""
