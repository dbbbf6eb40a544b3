"""Coverage of the intervals of `foundry-ext compare` on fronts, by simulation with known truth.

    python -m experiments.simulations.fronts [--trials 2000] [--truths NAME ...]

Each trial draws seeds, runs and items of two to four methods, hands them to the report's own
`compare_fronts`, and compares its intervals with the truth. The truth is the mean over 20,000 fresh
seeds, each with fresh items, at the reference or level that the trial chose from its own data.
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.simulations.truths import TRUTHS, Method, Noise, Truth
from foundry_ext.comparison.front_comparison import (
    FrontComparison,
    FrontValue,
    LevelPair,
    compare_fronts,
)
from foundry_ext.comparison.fronts import SeedPoints, forgetting_at, resampled_ratios
from foundry_ext.comparison.hypervolume import hypervolume
from foundry_ext.comparison.pairwise import MethodPair
from foundry_ext.comparison.statistics import Interval
from foundry_ext.comparison.tradeoff import Point

ITEMS = 100
RESAMPLES = 400
FRESH = 20_000


def draw(
    truth: Truth, num_seeds: int, rng: np.random.Generator, resamples: int = RESAMPLES
) -> dict[str, SeedPoints]:
    """Return the points of one trial: the same seeds and items for all methods."""
    noise, labels = truth.noise, list(truth.methods)
    num_rates = len(next(iter(truth.methods.values())).learning)
    order = noise.data_order * rng.normal(size=(num_seeds, 1))
    values: list[list[np.ndarray]] = [[], []]  # learning and forgetting, [S, K, I] per method
    common = [noise.item * rng.normal(size=ITEMS) for _ in range(2)]
    for label in labels:
        method, shape = truth.methods[label], (num_seeds, num_rates)
        own = _seed_noise(method, noise, order, shape, rng)
        for axis, means in enumerate((method.learning, method.forgetting)):
            response = noise.response * rng.normal(size=(num_rates, ITEMS))
            rest = noise.rest * rng.normal(size=(*shape, ITEMS))
            values[axis].append((means + own[axis])[..., None] + common[axis] + response + rest)
    ends, resampled = [], []
    for each in values:
        stacked = np.stack(each)  # [methods, S, K, I]
        flat = stacked.reshape(-1, ITEMS)
        drawn = resampled_ratios(
            flat, np.ones(ITEMS), resamples=resamples, seed=int(rng.integers(1 << 31))
        )
        ends.append(stacked.mean(-1))
        resampled.append(drawn.reshape(resamples, *stacked.shape[:-1]))
    rates, seeds = tuple(map(float, range(1, num_rates + 1))), tuple(range(num_seeds))
    return {
        label: SeedPoints(
            rates, seeds, ends[0][m], ends[1][m], (resampled[0][:, m], resampled[1][:, m]), ITEMS
        )
        for m, label in enumerate(labels)
    }


def _seed_noise(
    method: Method,
    noise: Noise,
    order: np.ndarray,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what seeds add to learning and to forgetting, [S, K] each."""
    parts = [
        order
        + np.array(method.scale)
        * (noise.seed * rng.normal(size=(shape[0], 1)) + noise.run * rng.normal(size=shape))
        for _ in range(2)
    ]
    return parts[0], noise.coupling * parts[0] + math.sqrt(1 - noise.coupling**2) * parts[1]


class Expected:
    """True expected values of one method, from fresh seeds with fresh items.

    They are computed at many references and levels. Between two of these, which lie close together,
    the mean over seeds is nearly a straight line.
    """

    def __init__(self, method: Method, noise: Noise, rng: np.random.Generator, fresh: int = FRESH):
        shape = (fresh, len(method.learning))
        order = noise.data_order * rng.normal(size=(fresh, 1))
        own = _seed_noise(method, noise, order, shape, rng)
        own_items = math.hypot(noise.response, noise.rest) / math.sqrt(ITEMS)
        ends = [
            means
            + seeds
            + noise.item / math.sqrt(ITEMS) * rng.normal(size=(fresh, 1))
            + own_items * rng.normal(size=shape)
            for means, seeds in zip((method.learning, method.forgetting), own, strict=True)
        ]
        self._references = np.linspace(0, 2 * max(method.forgetting) + 1, fresh // 50)
        self._areas = [hypervolume(ends[0], ends[1], each).mean() for each in self._references]
        least, most = min(0.0, *method.learning), max(method.learning) + 1
        self._levels = np.linspace(least, most, fresh // 20)
        some = [each[: fresh // 5] for each in ends]
        self._forgetting = [_mean_forgetting(some[0], some[1], each) for each in self._levels]

    def area(self, reference: float) -> float:
        """Return the mean over the fresh seeds."""
        return float(np.interp(reference, self._references, self._areas))

    def forgetting(self, level: float) -> float:
        """Return the mean over a fifth of the fresh seeds, without those that do not reach it."""
        return float(np.interp(level, self._levels, self._forgetting))


def _mean_forgetting(learning: np.ndarray, forgetting: np.ndarray, level: float) -> float:
    reached = learning.max(1) >= level
    values = forgetting_at(learning[reached], forgetting[reached], level)
    return float(values.mean()) if reached.any() else math.nan


@dataclass
class Counts:
    """Counts over trials, for areas or for forgetting at a level."""

    trials: int = 0
    covered: int = 0
    """Intervals of a method that hold its truth; `methods` is the number of them."""
    methods: int = 0
    pairs_covered: int = 0
    pairs: int = 0
    families_found: int = 0
    """Trials with a pair that was called distinguishable."""
    wrong_sign: int = 0
    """Trials with a pair that was called distinguishable in the wrong direction."""

    def add(
        self,
        values: Mapping[str, FrontValue],
        pairs: Sequence[MethodPair],
        true: Mapping[str, float],
    ) -> None:
        """Add a trial; values without an interval, and upper bounds, cover nothing."""
        self.trials += 1
        for label, value in values.items():
            if value.interval is not None and not value.num_bounds:
                self.methods += 1
                self.covered += _holds(value.interval, true[label])
        found = wrong = False
        for pair in pairs:
            difference = true[pair.first] - true[pair.second]
            if not (isinstance(pair, LevelPair) and pair.bound):
                self.pairs += 1
                self.pairs_covered += _holds(pair.interval, difference)
            found |= pair.is_distinguishable
            wrong |= pair.is_distinguishable and pair.difference * difference < 0
        self.families_found += found
        self.wrong_sign += wrong

    def cells(self) -> list[str]:
        return [
            _percent(self.covered, self.methods, self.trials),
            _percent(self.pairs_covered, self.pairs, self.trials),
            _percent(self.families_found, self.trials, self.trials),
        ]


def _holds(interval: Interval | None, true: float) -> bool:
    return interval is not None and interval.low <= true <= interval.high


def _percent(hits: int, number: int, trials: int) -> str:
    """Return e.g. "95.1 ± 0.5"; intervals of one trial share seeds, so only trials are counted."""
    if not number:
        return "–"
    share = hits / number
    error = math.sqrt(max(share * (1 - share), 1e-9) / min(number, trials))
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def simulate(
    truth: Truth, num_seeds: int, trials: int, *, seed: int = 0, fresh: int = FRESH
) -> tuple[Counts, Counts]:
    """Return the counts for areas and for forgetting at the tested level."""
    rng = np.random.default_rng([seed, num_seeds])
    expected: dict[int, Expected] = {}  # equal methods share theirs
    for method in truth.methods.values():
        if id(method) not in expected:
            expected[id(method)] = Expected(method, truth.noise, rng, fresh)
    areas, levels = Counts(), Counts()
    for comparison in _trials(truth, num_seeds, trials, rng):
        if comparison.reference is not None:
            known = {key: each.area(comparison.reference) for key, each in expected.items()}
            true = {label: known[id(method)] for label, method in truth.methods.items()}
            areas.add(comparison.areas, comparison.area_pairs, true)
        level = comparison.tested_level
        if level is not None:
            known = {key: each.forgetting(level) for key, each in expected.items()}
            true = {label: known[id(method)] for label, method in truth.methods.items()}
            levels.add(comparison.levels[level], comparison.level_pairs, true)
    return areas, levels


def _trials(
    truth: Truth, num_seeds: int, trials: int, rng: np.random.Generator
) -> Iterator[FrontComparison]:
    for _ in range(trials):
        drawn = draw(truth, num_seeds, rng)
        yield compare_fronts(drawn, {label: _means(label, each) for label, each in drawn.items()})


def _means(label: str, each: SeedPoints) -> list[Point]:
    ends = zip(each.rates, each.learning.mean(0), each.forgetting.mean(0), strict=True)
    return [Point(label, rate, float(x), float(y), each.seeds) for rate, x, y in ends]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.simulations.fronts")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--truths", nargs="+", choices=list(TRUTHS), default=list(TRUTHS))
    arguments = parser.parse_args(argv)
    print(
        "| truth | seeds | area | difference | found | forgetting | difference | found | trials |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    started = time.monotonic()
    for name in arguments.truths:
        for num_seeds in arguments.seeds:
            areas, levels = simulate(TRUTHS[name], num_seeds, arguments.trials)
            cells = [name, str(num_seeds), *areas.cells(), *levels.cells()]
            print(f"| {' | '.join(cells)} | {areas.trials}, {levels.trials} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
