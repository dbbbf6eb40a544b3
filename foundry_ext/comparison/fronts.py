"""Each method's points by seed and learning rate, and what follows from a seed's whole front.

A point is the end of a run: (learning, forgetting), both as change from the base model. Evaluations
before the end are not points: the schedule had not ended there, nobody would stop there, and more
of them would only add luck.

Only a seed that ran at every learning rate of its method has a whole front. A rate at which a run
diverged counts as tried, and its point adds nothing.

S is the number of such seeds, K of learning rates, B of bootstrap samples of the items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foundry_ext.comparison.hypervolume import hypervolume
from foundry_ext.comparison.metrics import Metric, final_value, item_matrix
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.seed_item_interval import Sample
from foundry_ext.comparison.statistics import draws

RESAMPLES = 2000


@dataclass(frozen=True)
class SeedPoints:
    """One method's points: S seeds with a whole front, K learning rates."""

    rates: tuple[float, ...]
    """Learning rates tried, rising: K."""
    seeds: tuple[int, ...]
    """Seeds that ran at every rate, rising: S."""
    learning: np.ndarray
    """[S, K]; -inf for a run that diverged."""
    forgetting: np.ndarray
    """[S, K]; inf for a run that diverged."""
    replicates: tuple[np.ndarray, np.ndarray] | None = None
    """Learning and forgetting, [B, S, K] each, from bootstrap samples of the items that are the
    same for all methods; None without items."""
    num_items: int = 0
    """Items of the smaller of the two sets; 0 without items."""

    def hypervolumes(self, reference: float, start: float = 0.0) -> Sample:
        """Return the area that each seed's front dominates, between two levels of forgetting.

        See hypervolume.py.
        """
        areas = hypervolume(self.learning, self.forgetting, reference, start)
        resampled = hypervolume(*self.replicates, reference, start) if self.replicates else None
        return Sample(self._by_seed(areas), resampled, self.num_items)

    def most_learned(self) -> Sample:
        """Return the most that each seed learned at any rate."""
        resampled = self.replicates[0].max(-1) if self.replicates else None
        return Sample(self._by_seed(self.learning.max(1)), resampled, self.num_items)

    def least_forgotten_by_seed(self) -> Sample:
        """Return the least that each seed forgot at any rate."""
        resampled = self.replicates[1].min(-1) if self.replicates else None
        return Sample(self._by_seed(self.forgetting.min(1)), resampled, self.num_items)

    @property
    def least_forgotten(self) -> float:
        """Mean over seeds of the least forgotten at any rate; inf if all runs diverged."""
        least = self.forgetting.min(1)
        return float(least[np.isfinite(least)].mean()) if np.isfinite(least).any() else np.inf

    def learned_on_front(self) -> np.ndarray:
        """Return the least and the most learned on each seed's front, [S, 2]."""
        fronts = [front_of(*ends) for ends in zip(self.learning, self.forgetting, strict=True)]
        rows = zip(self.learning, fronts, strict=True)
        return np.array([learned[front[[0, -1]]] for learned, front in rows]).reshape(-1, 2)

    def forgetting_at(self, level: float) -> tuple[Sample, int]:
        """Return each seed's forgetting where its front reaches a level of learning.

        Returns:
            The sample, and the number of seeds whose value is an upper bound, because all of their
            front learned more; see the function of this name.
        """
        values = forgetting_at(self.learning, self.forgetting, level)
        resampled = forgetting_at(*self.replicates, level) if self.replicates else None
        learned = self.learned_on_front()
        sample = Sample(self._by_seed(values), resampled, self.num_items)
        return sample, int((learned[:, 0] > level).sum())

    def _by_seed(self, values: Sequence[float] | np.ndarray) -> dict[int, float]:
        return dict(zip(self.seeds, map(float, values), strict=True))


def front_of(learning: np.ndarray, forgetting: np.ndarray) -> np.ndarray:
    """Return the indices of the points, [K], that no other dominates, by rising learning.

    Of equal points, one is returned.
    """
    order = np.lexsort((-learning, forgetting))
    learned = learning[order]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], learned[:-1]]))
    is_first = np.arange(len(order)) == 0  # of points that all diverged, one is left
    return order[(learned > before) | is_first]


def forgetting_at(learning: np.ndarray, forgetting: np.ndarray, level: float) -> np.ndarray:
    """Return the forgetting where the front of K points reaches a level of learning.

    The front reaches it between `high`, of the points that learned as much the one that forgot
    least, and `low`, of the points that learned and forgot less the one that learned most. Between
    them the forgetting is interpolated linearly; nothing is extrapolated.

    Args:
        learning: [..., K].
        forgetting: [..., K].
        level: the level of learning.

    Returns:
        [...]. If all of the front learned more, the forgetting of its first point. If no point
        learned as much, that of its last one.
    """
    forgot_high = np.where(learning >= level, forgetting, np.inf)
    least = forgot_high.min(-1, keepdims=True)
    learned_low = np.where((learning < level) & (forgetting < least), learning, -np.inf)
    most = learned_low.max(-1, keepdims=True)
    # Of points that are equal in the one, the better one in the other is on the front.
    high = np.where(forgot_high == least, learning, -np.inf).argmax(-1)[..., None]
    low = np.where(learned_low == most, forgetting, np.inf).argmin(-1)[..., None]
    has_high, has_low = np.isfinite(least), np.isfinite(most)
    high = np.where(has_high, high, low)
    low = np.where(has_low, low, high)
    (x_low, y_low), (x_high, y_high) = (
        [np.take_along_axis(values, index, -1) for values in (learning, forgetting)]
        for index in (low, high)
    )
    is_between = has_high & has_low
    run = np.where(is_between, x_high - x_low, 1.0)
    share = np.where(is_between, (level - x_low) / run, 0.0)
    return (y_low + share * np.where(is_between, y_high - y_low, 0.0))[..., 0]


def matching_levels(seed_points: Mapping[str, SeedPoints]) -> list[float]:
    """Return three levels of learning at which fronts are compared, or none.

    They lie a quarter, half and three quarters of the way from the least learned on a front to the
    most that every front reaches. The least is the highest of the fronts' lowest points. It leaves
    out methods that learned more than the most that every front reaches, because no level is on
    their front and on all others.
    """
    ends = [each.learned_on_front() for each in seed_points.values()]
    if len(ends) < 2:
        return []
    most = min(float(each[:, 1].min()) for each in ends)
    lowest = [float(each[:, 0].max()) for each in ends]
    least = max((each for each in lowest if each < most), default=most)
    if not np.isfinite(least) or least >= most or most <= 0:
        return []
    return [_rounded(least + share * (most - least), least, most) for share in (0.25, 0.5, 0.75)]


def _rounded(value: float, low: float, high: float) -> float:
    """Return the value with as few digits, at least three, as keep it between low and high."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(3, 17))
    return next((each for each in rounded if low < each < high), value)


def seed_points(
    groups: Mapping[str, Sequence[Run]],
    diverged: Mapping[str, Sequence[Run]],
    x: Metric,
    y: Metric,
) -> dict[str, SeedPoints]:
    """Return every method's points by seed and learning rate.

    Args:
        groups: label -> runs that did not diverge.
        diverged: label -> runs that diverged.
        x: the metric of learning.
        y: the metric of forgetting.
    """
    grids = {label: _grid(runs, diverged.get(label, ())) for label, runs in groups.items()}
    used = [run for _, rows in grids.values() for row in rows.values() for run in row if run]
    columns = {id(run): column for column, run in enumerate(used)}
    # A column more, the last one, stands for every run that diverged.
    learning = np.array([*(final_value(run, x) for run in used), -np.inf])
    forgetting = np.array([*(final_value(run, y) for run in used), np.inf])
    of_x, of_y = _resampled(used, x, seed=0), _resampled(used, y, seed=1)
    result = {}
    for label, (rates, rows) in grids.items():
        cells = [[columns.get(id(run), -1) for run in row] for row in rows.values()]
        index = np.array(cells, dtype=int).reshape(len(rows), len(rates))
        replicates, num_items = None, 0
        if of_x is not None and of_y is not None:
            num_items = min(of_x[1], of_y[1])
            replicates = (
                _with_worst(of_x[0], -np.inf)[:, index],
                _with_worst(of_y[0], np.inf)[:, index],
            )
        result[label] = SeedPoints(
            rates, tuple(rows), learning[index], forgetting[index], replicates, num_items
        )
    return result


def _with_worst(values: np.ndarray, worst: float) -> np.ndarray:
    return np.concatenate([values, np.full((len(values), 1), worst)], 1)


def _grid(
    runs: Sequence[Run], diverged: Sequence[Run]
) -> tuple[tuple[float, ...], dict[int, list[Run | None]]]:
    """Return the rates tried, and the runs by rate of each seed that ran at all of them.

    None stands for a run that diverged.
    """
    by_seed: dict[int, dict[float, Run | None]] = {}
    for run in diverged:
        by_seed.setdefault(run.seed, {})[run.learning_rate] = None
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.learning_rate] = run
    rates = tuple(sorted({rate for row in by_seed.values() for rate in row}))
    return rates, {
        seed: [row[rate] for rate in rates]
        for seed, row in sorted(by_seed.items())
        if len(row) == len(rates)
    }


def _resampled(runs: Sequence[Run], metric: Metric, seed: int) -> tuple[np.ndarray, int] | None:
    """Return the runs' values from bootstrap samples of the items, [B, runs], and their number."""
    found = item_matrix([runs], metric)
    if found is None:
        return None
    (values,), weights = found
    return resampled_ratios(values, weights, seed=seed), len(weights)


def resampled_ratios(
    values: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return [B, N] ratios of sums over items drawn with replacement, the same draws for all N.

    Args:
        values: [N, I].
        weights: [I].
        resamples: B.
        seed: of the draws.
    """
    num_items, ratios = len(weights), []
    for drawn in draws(num_items, resamples, np.random.default_rng(seed)):
        num = len(drawn)
        drawn += np.arange(num)[:, None] * num_items
        counts = np.bincount(drawn.ravel(), minlength=num * num_items).reshape(num, num_items)
        ratios.append(counts @ values.T / (counts @ weights)[:, None])
    return np.concatenate(ratios)
