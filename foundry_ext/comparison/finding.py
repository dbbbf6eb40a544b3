"""A finding on a claim about methods, and the verdict that follows from it."""

from dataclasses import dataclass
from enum import Enum

from foundry_ext.comparison.interval import Interval
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.statistics import MIN_SEEDS


class Verdict(Enum):
    """Relation of a finding to a claim."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    CANNOT_BE_TOLD = "cannot be told at this size and budget"
    NOT_TESTED = "not tested by these runs"


@dataclass(frozen=True)
class Finding:
    """One claim, tested on two groups of runs. A positive estimate agrees with the claim."""

    claim: str = ""
    groups: tuple[str, ...] = ()
    """Labels: first minus second is the estimate."""
    metric: Metric | None = None
    """None for numbers of the weights."""
    estimate: float | None = None
    interval: Interval | None = None
    is_distinguishable: bool = False
    in_general: bool = False
    """True if there are enough seeds for a claim about methods."""
    detail: str = ""
    """More about what was seen, as a sentence without its point."""
    needs: str = ""
    """Runs that would tell, or would test the claim."""

    @property
    def in_these_runs(self) -> Verdict:
        """The verdict if seeds did not matter."""
        if self.estimate is None:
            return Verdict.NOT_TESTED
        if not self.is_distinguishable:
            return Verdict.CANNOT_BE_TOLD
        return Verdict.AGREES if self.estimate > 0 else Verdict.DISAGREES

    @property
    def verdict(self) -> Verdict:
        """The verdict on the claim, which is about methods."""
        verdict = self.in_these_runs
        return verdict if self.in_general or self.estimate is None else Verdict.CANNOT_BE_TOLD


def needed(in_general: bool, more: str, where: str = "") -> str:
    """Return what it takes to tell: seeds if there are too few, else `more`."""
    return more if in_general else f"at least {MIN_SEEDS} seeds of each{where}"
