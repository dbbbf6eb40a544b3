"""What a verification found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One promise: kept or not, with the figures that say so."""

    name: str
    passed: bool
    said: str
