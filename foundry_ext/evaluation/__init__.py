"""Learning and forgetting, measured on sets that a YAML names.

A *set* is one file or loader with a role (learning or forgetting) and a type. `config` checks the
YAML, `measure` builds the sets and returns one line per item, and `metrics` turns those lines into
figures. Figures can therefore be computed again from the items alone.
"""
