"""Counts of documents in the log, and in the error if none is left."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from composer.utils import dist

from foundry_ext.data.documents import Documents
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.settings import TokenizeSettings

log = logging.getLogger(__name__)


def log_counts(name: str, documents: Documents, settings: TokenizeSettings) -> None:
    """Log the counts; what is not trained or not whole is a warning, seen at any log level."""
    counts = {kind: count for kind, count in documents.counts.items() if count}
    log.info("%s: %d tokens; documents: %s", name, documents.lengths.sum(), counts)
    if set(counts) - {"kept"} and dist.get_global_rank() == 0:
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        if "responses_not_trained" in counts:
            text += " (target_responses: all trains those too)"
        if "dropped_empty" in counts:
            text += _describe_empty(documents, settings)
        log.warning("%s (max_seq_len %d): %s", name, settings.max_seq_len, text)


def _describe_empty(documents: Documents, settings: TokenizeSettings) -> str:
    """Return "; 2 rows dropped, with an empty prompt or response; the first is row 0"."""
    empty = np.flatnonzero(documents.outcomes == RowOutcome.DROPPED_EMPTY)
    count, first = len(empty), int(empty[0])
    before = documents.outcomes[:first]
    may_be_split = (
        settings.overlong == "split"
        and not np.isin(before, (RowOutcome.KEPT, RowOutcome.DROPPED_EMPTY)).all()
    )
    rows = "row" if count == 1 else "rows"
    what = "prompt or response" if settings.text_key is None else repr(settings.text_key)
    return (
        f"; {count} {rows} dropped, with an empty {what}; the first is"
        f" {'document' if may_be_split else 'row'} {first}, counted from 0"
    )


def log_mixture(descriptions: Sequence[dict[str, Any]]) -> None:
    """Log each source's part of an epoch."""
    total = sum(source["tokens"] for source in descriptions)
    for source in descriptions:
        share = 100 * source["tokens"] / max(total, 1)
        log.info(
            "%s: %.2f %% of an epoch's tokens, %d in %d documents",
            *(source["name"], share, source["tokens"], source["documents"]),
        )


def describe_nothing_left(
    counts: Mapping[str, int], description: list[dict[str, Any]], max_seq_len: int
) -> str:
    """Return the error's line if no document has a token to learn."""
    names = " + ".join(str(source["name"]) for source in description)
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return (
        f"no document of {names} is left to train on: {text}, with max_seq_len {max_seq_len};"
        " for overlong rows raise max_seq_len or set overlong: truncate; no_loss rows have a prompt"
        " that fills max_seq_len; empty ones lack a prompt or a response"
    )
