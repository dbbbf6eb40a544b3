"""Learning and forgetting, measured on sets that a YAML names; knows no trainer.

A *set* is one file or loader with a role (learning or forgetting) and a type. `configuration`
checks the YAML, `measure` builds the sets and gives a line per item, and `metrics` turns those
lines into figures: whoever has the items has the figures.
"""
