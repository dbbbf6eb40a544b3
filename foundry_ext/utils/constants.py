"""Constants that several packages share."""

IGNORE_INDEX = -100  # label of a position without loss, as in torch's cross_entropy
