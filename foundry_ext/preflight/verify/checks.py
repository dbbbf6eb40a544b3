"""The result of one check of a verification."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One promise, whether it holds, and the figures behind that."""

    name: str
    passed: bool
    detail: str
