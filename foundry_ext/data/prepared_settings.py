"""Keys of a loader's `dataset` section for prepared data, checked before anything is read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import parse_uri
from streaming.base.util import bytes_to_int

from foundry_ext.utils.errors import UserError, suggest

KEYS = frozenset(("prepared", "local", "cache_limit", "window"))
_AMOUNTS = ("repeat", "share", "choose")
_ENTRY_KEYS = frozenset(("prepared", "overlong", *_AMOUNTS))
# Of one source.
_SOURCE_KEYS = (
    *("hf_name", "split", "hf_kwargs", "safe_load", "holdout", "overlong", "text_key"),
    *("preprocessing_fn", "target_prompts", "target_responses", *_AMOUNTS),
)
_STREAM_KEYS = ("streams", "remote")
DEFAULT_WINDOW = 2**18


@dataclass(frozen=True, kw_only=True)
class PreparedSettings:
    """A source of prepared data in a YAML, and how much of it an epoch uses."""

    where: str
    """Its key, for errors."""
    place: str
    overlong: str | None
    """None for the default of its rows: split for plain text, truncate for others."""
    repeat: float | None = None
    """Passes over it in an epoch."""
    share: float | None = None
    """Share of an epoch's tokens."""
    choose: int | None = None
    """Tokens in an epoch."""


def is_prepared(dataset: Mapping[str, Any]) -> bool:
    """Return whether a section names prepared data."""
    entries = dataset.get("datasets")
    inside = isinstance(entries, list) and any(
        isinstance(entry, Mapping) and entry.get("prepared") is not None for entry in entries
    )
    return dataset.get("prepared") is not None or inside


def get_prepared(dataset: Mapping[str, Any]) -> list[PreparedSettings]:
    """Return the sources of a section for which `is_prepared` holds.

    Raises:
        UserError: unknown or contradictory keys, or amounts that are none.
    """
    entries = dataset.get("datasets")
    for key in _STREAM_KEYS:
        if dataset.get(key):
            raise UserError(f"dataset.{key} does not go with dataset.prepared: leave one out")
    if entries is None:
        return [_source(dataset, "dataset")]
    if dataset.get("prepared") is not None:
        raise UserError("dataset.prepared does not go with dataset.datasets: move it into an entry")
    own = sorted(key for key in _SOURCE_KEYS if dataset.get(key))
    if own:
        raise UserError(
            f"dataset.{own[0]} does not go with dataset.datasets: move it into the entries it is"
            " meant for"
        )
    sources = []
    for position, entry in enumerate(entries):
        where = f"dataset.datasets[{position}]"
        if not isinstance(entry, Mapping) or entry.get("prepared") is None:
            raise UserError(
                f"{where} is not prepared, and others are; prepare it, too, with `foundry-ext"
                " prepare`, because an epoch is planned over all of them"
            )
        unknown = sorted(entry.keys() - _ENTRY_KEYS, key=str)
        if unknown:
            hint = suggest(unknown[0], sorted(_ENTRY_KEYS)) or ";"
            raise UserError(
                f"unknown key {where}.{unknown[0]}{hint} the keys are"
                f" {', '.join(sorted(_ENTRY_KEYS))}"
            )
        sources.append(_source(entry, where))
    _check_amounts(sources)
    return sources


def _source(section: Mapping[str, Any], where: str) -> PreparedSettings:
    place = section["prepared"]
    if not isinstance(place, str) or not place:
        raise UserError(
            f"{where}.prepared: {place!r} is no place; give a folder, or a URI such as s3://b/edu"
        )
    amounts = {key: section[key] for key in _AMOUNTS if section.get(key) is not None}
    if len(amounts) > 1:
        raise UserError(f"{where}: give one of {' and '.join(amounts)}, not both")
    if "repeat" in amounts:
        _check_number(amounts["repeat"], f"{where}.repeat", "passes in an epoch")
    if "share" in amounts and not _check_number(amounts["share"], f"{where}.share", "a share") < 1:
        raise UserError(f"{where}.share: {amounts['share']} must be below 1, an epoch's tokens")
    if "choose" in amounts:
        amounts["choose"] = _tokens(amounts["choose"], f"{where}.choose")
    return PreparedSettings(where=where, place=place, overlong=section.get("overlong"), **amounts)


def _check_number(value: Any, where: str, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where}: {value!r} must be a number above 0, {what}")
    return value


def _tokens(value: Any, where: str) -> int:
    if isinstance(value, float) and value.is_integer():  # 1e9
        value = int(value)
    text = str(value).replace("_", "").removesuffix("tok")
    if isinstance(value, bool) or not text.isdecimal() or int(text) == 0:
        raise UserError(f"{where}: {value!r} must be a number of tokens, such as 100_000_000tok")
    return int(text)


def _check_amounts(sources: Sequence[PreparedSettings]) -> None:
    shares = [source.share for source in sources if source.share is not None]
    if len(shares) == len(sources):
        raise UserError(
            "dataset.datasets: every source has a share of an epoch's tokens; leave it out for one,"
            " which is used completely, or give one repeat or choose"
        )
    if sum(shares) >= 1:
        raise UserError(
            f"dataset.datasets: shares add up to {sum(shares):g}, which leaves nothing for the"
            " others; their sum must be below 1"
        )


def passes(sources: Sequence[PreparedSettings], tokens: Sequence[int]) -> list[float]:
    """Return the passes over each source in an epoch.

    Args:
        sources: the sources.
        tokens: tokens of one pass over each.

    Example: 100 tokens without an amount, and 500 with a share of 0.2: 1 pass, which leaves 0.2 of
    125 tokens, and .05 passes over the 500.
    """
    fixed = [
        None
        if source.share is not None
        else source.choose / max(count, 1)
        if source.choose is not None
        else float(source.repeat or 1)
        for source, count in zip(sources, tokens, strict=True)
    ]
    total = sum(one * count for one, count in zip(fixed, tokens, strict=True) if one is not None)
    whole = total / (1 - sum(source.share or 0 for source in sources))
    return [
        one if one is not None else (source.share or 0) * whole / max(count, 1)
        for source, one, count in zip(sources, fixed, tokens, strict=True)
    ]


def get_window(dataset: Mapping[str, Any]) -> int:
    """Return the rows that a window has at least.

    Raises:
        UserError: it is no whole number above 0.
    """
    window = dataset.get("window", DEFAULT_WINDOW)
    if type(window) is not int or window < 1:
        raise UserError(
            f"dataset.window: {window!r} must be a whole number of rows, which are shuffled and"
            f" packed together; the default is {DEFAULT_WINDOW}"
        )
    return window


def get_local(dataset: Mapping[str, Any], sources: Sequence[PreparedSettings]) -> Path | None:
    """Return the folder for fetched shards, or None to read folders in place.

    Raises:
        UserError: data in an object store needs one.
    """
    local = dataset.get("local")
    if local is not None:
        if not isinstance(local, str) or Path(local).is_file():
            raise UserError(
                f"dataset.local: {local!r} is no folder; name one on a disk of this machine"
            )
        return Path(local)
    for source in sources:
        if parse_uri(source.place)[0]:
            raise UserError(
                f"{source.where}.prepared: {source.place} is fetched while training; set"
                " dataset.local to a folder on a disk of this machine"
            )
    if dataset.get("cache_limit") is not None:
        raise UserError("dataset.cache_limit needs dataset.local, the folder that it limits")
    return None


def get_cache_limit(dataset: Mapping[str, Any]) -> int | None:
    """Return the most bytes of fetched shards, from a number or a text such as 200gb.

    Raises:
        UserError: it is neither.
    """
    limit = dataset.get("cache_limit")
    if limit is None:
        return None
    try:
        size = 0 if isinstance(limit, bool) else bytes_to_int(limit)
    except (ValueError, TypeError, AttributeError):
        size = 0
    if size <= 0:
        raise UserError(f"dataset.cache_limit: {limit!r} is no size; give bytes, or such as 200gb")
    return int(size)
