"""Times of a YAML, read as Composer's `Time.from_input` reads them, without its slow import.

A whole number and a unit (`3ep`, `1_000tok`), a part of the duration (`0.1dur`), a number of epochs
(`3`), or hours, minutes and seconds of training (`1h30m`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foundry_ext.utils.nested import get

UNITS = ("ep", "ba", "sp", "tok", "dur", "iter", "sec")
_NUMBER = re.compile(rf"(.+)({'|'.join(UNITS)})", re.IGNORECASE)
_CLOCK = re.compile(r"(?=.)(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")


@dataclass(frozen=True)
class Time:
    """A number and its unit, one of `UNITS`."""

    number: float
    unit: str


def parse(value: Any) -> Time | None:
    """Return the time, or None if Composer would not accept it as one."""
    if type(value) is int:
        return Time(value, "ep")
    if not isinstance(value, str):
        return None
    clock = _clock(value)
    if clock is not None:
        # Two digits are the most that strptime reads.
        fits = all(len(part) <= 2 for part in re.findall("[0-9]+", value))
        inside = all(part <= end for part, end in zip(clock, (23, 59, 59), strict=True))
        return Time(_seconds(clock), "sec") if fits and inside else None
    found = _NUMBER.fullmatch(value)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        return None
    unit = found[2].lower() if found else ""
    valid = math.isfinite(number) if unit == "dur" else number.is_integer()
    return Time(number, unit) if valid else None


def find_fault(key: str, value: Any, config: Mapping[str, Any]) -> str | None:
    """Return `key, value, must be ...; way out` if the key cannot have this time, or None."""
    time = parse(value)
    by_clock = _clock(value) is not None or (time is not None and time.unit == "sec")
    if by_clock and (key == "max_duration" or key.startswith("scheduler.")):
        return (
            f"{key}, {value!r}, is a time of the clock, which Composer takes for intervals only;"
            " give steps, tokens or epochs, such as 100ba (`--dry-run` estimates how long they"
            " take)"
        )
    if time is None:
        return f"{key}, {value!r}, must be a time: {_example(value)} (units: {', '.join(UNITS)})"
    if time.number < 0:
        return f"{key}, {value!r}, is below 0; give a time from 0 on"
    # Composer's schedulers read text only; the other one is llm-foundry's.
    is_stock = get(config, "scheduler.name") != "inv_sqrt_with_warmup"
    if key.startswith("scheduler.") and is_stock and not isinstance(value, str):
        return f"{key}, {value!r}, has no unit; write {value}ba or {value}ep"
    if key == "max_duration" and time.unit == "dur":
        return f"{key}, {value!r}, is a part of itself; give steps, tokens or epochs, such as 1ep"
    if key == "max_duration" and time.unit == "iter" and not _has_iterations(config):
        return f"{key}, {value!r}, would never end: {_NO_ITERATIONS}; give ba, ep or tok"
    return None


_NO_ITERATIONS = "only the callback curriculum_learning counts iterations"


def _has_iterations(config: Mapping[str, Any]) -> bool:
    return "curriculum_learning" in (config.get("callbacks") or {})


def find_warning(key: str, value: Any, config: Mapping[str, Any]) -> str | None:
    """Return what is unlikely to be meant about an interval, or None."""
    time = parse(value)
    if time is None or time.unit != "iter" or _has_iterations(config):
        return None
    return f"{key}, {value!r}, comes only at the end: {_NO_ITERATIONS}; give ba, ep or tok"


def _clock(value: Any) -> tuple[int, int, int] | None:
    """Return the hours, minutes and seconds of text such as 1h30m, or None for other values."""
    found = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return hours, minutes, seconds


def _seconds(clock: tuple[int, int, int]) -> int:
    hours, minutes, seconds = clock
    return 3600 * hours + 60 * minutes + seconds


def _example(value: Any) -> str:
    clock = _clock(value)
    if clock is not None:
        return (
            f"Composer's hours end at 23, its minutes and seconds at 59; write {_seconds(clock)}sec"
        )
    return (
        "a whole number and a unit, such as 3ep or 100ba, a part of the duration, such as 0.1dur,"
        " or for an interval 1h30m"
    )
