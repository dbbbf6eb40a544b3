"""Outcomes of tokenising rows, and their counts."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class RowOutcome(IntEnum):
    """Outcome of tokenising a row; a dropped row stays as an empty document, to be counted."""

    KEPT = 0
    TRUNCATED = 1
    SPLIT = 2
    DROPPED_OVERLONG = 3
    DROPPED_NO_LOSS = 4
    DROPPED_EMPTY = 5


def count_outcomes(
    outcomes: NDArray[np.integer],
    num_truncated_tokens: NDArray[np.integer],
    num_untrained: NDArray[np.integer],
) -> dict[str, int]:
    """Return {"kept": 3, "truncated": 1, ..., "tokens_cut": 9}.

    `responses_not_trained` follows if there are any, which only chats have.
    """
    counts = np.bincount(outcomes, minlength=len(RowOutcome)).tolist()
    named = {kind.name.lower(): counts[kind] for kind in RowOutcome}
    named["tokens_cut"] = int(num_truncated_tokens.sum())
    if num_untrained.any():
        named["responses_not_trained"] = int(num_untrained.sum())
    return named
