"""Claims that follow from pairs of groups: at their best rates, and where they learned equally."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.finding import Finding, needed
from foundry_ext.comparison.front_comparison import LevelPair
from foundry_ext.comparison.matched_runs import MatchedRuns
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.pairwise import PairwiseComparison, needs
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.utils.nested import get

FULL = "full"


def method_of_group(comparison: Comparison, label: str) -> str:
    return comparison.groups[label][0].record["method"]


def plain_full(comparison: Comparison) -> str | None:
    """Return the group of full fine-tuning; of several, the only one without a regulariser."""
    labels = [label for label in comparison.groups if method_of_group(comparison, label) == FULL]
    plain = [label for label in labels if not regularisers(comparison.groups[label][0])]
    candidates = labels if len(labels) == 1 else plain
    return candidates[0] if len(candidates) == 1 else None


def regularisers(run: Run) -> list[str]:
    """Return the names of weight decay and dropout that a run trained with."""
    config = run.record["config"]
    keys = {
        "weight decay": "optimizer.weight_decay",
        "attention dropout": "model.config_overrides.attention_dropout",
    }
    return [name for name, key in keys.items() if get(config, key)]


def _of_pair(
    pair: PairwiseComparison | LevelPair, first: str, metric: Metric, needs: str, detail: str = ""
) -> Finding:
    """Return the finding on `first` minus the other one."""
    finding = Finding(
        groups=(pair.first, pair.second),
        metric=metric,
        estimate=pair.difference,
        interval=pair.interval,
        is_distinguishable=pair.is_distinguishable,
        in_general=pair.in_general,
        detail=detail,
        needs=needs,
    )
    if pair.first == first:
        return finding
    turned = pair.interval and replace(
        pair.interval,
        estimate=-pair.interval.estimate,
        low=-pair.interval.high,
        high=-pair.interval.low,
    )
    return replace(
        finding, groups=(pair.second, pair.first), estimate=-pair.difference, interval=turned
    )


def _at_best(pair: PairwiseComparison, first: str, detail: str = "") -> Finding:
    """Return the finding on `first` minus the other one, at one learning rate each."""
    more = needs(pair).removeprefix("a difference this large needs ")
    return _of_pair(pair, first, pair.metric, needed(pair.in_general, more), detail)


def _pair(comparison: Comparison, metric: Metric, labels: set[str]) -> PairwiseComparison | None:
    """Return the pair at best rates; None if only runs at matched rates are compared."""
    pairs = comparison.pairs_of(metric)
    return next((pair for pair in pairs if {pair.first, pair.second} == labels), None)


_UNTESTED = Finding(needs=f"at least {MIN_SEEDS} seeds of each at its best learning rate")


def learns_less(comparison: Comparison, full: str, adapters: Sequence[str]) -> Iterator[Finding]:
    for label in adapters:
        pair = _pair(comparison, comparison.learning, {full, label})
        yield _at_best(pair, full) if pair else _UNTESTED


def forgets_less(comparison: Comparison, full: str, adapters: Sequence[str]) -> Iterator[Finding]:
    others = [
        metric
        for metric in comparison.metrics
        if metric.role == "forgetting" and metric != comparison.forgetting
    ]
    for label in adapters:
        pair = _pair(comparison, comparison.forgetting, {full, label})
        if pair is None:
            yield _UNTESTED
            continue
        signs = [_pair(comparison, metric, {full, label}) for metric in others]
        same = sum(each is not None and each.difference * pair.difference > 0 for each in signs)
        detail = f"{same} of {len(others)} other measures have the same sign" if others else ""
        if len(others) == 1:
            detail = f"the other measure has {'the same' if same else 'another'} sign"
        yield _at_best(pair, full, detail)


def forgets_less_at_equal_learning(
    comparison: Comparison, full: str, adapters: Sequence[str]
) -> Iterator[Finding]:
    if comparison.at_matched_rates is not None:
        yield from _at_matched_rates(comparison, comparison.at_matched_rates, full, adapters)
        return
    pairs = {frozenset((pair.first, pair.second)): pair for pair in comparison.fronts.level_pairs}
    for label in adapters:
        pair = pairs.get(frozenset((full, label)))
        if pair is None:
            yield Finding(needs="learning rates at which both learn equally much")
        else:
            yield _at_level(comparison, pair, full)


def _at_matched_rates(
    comparison: Comparison, at_rates: MatchedRuns, full: str, adapters: Sequence[str]
) -> Iterator[Finding]:
    """Yield the findings on runs at rates that were chosen for equal learning.

    A method that forgot more but also learned more tells nothing about equal learning.
    """
    for label in adapters:
        learned, forgot = (
            next(
                pair
                for pair in at_rates.pairs[metric]
                if {pair.first, pair.second} == {full, label}
            )
            for metric in (comparison.learning, comparison.forgetting)
        )
        rates = " and ".join(f"{at_rates.rates[each]:.3g}" for each in (full, label))
        show = learned.metric.show
        detail = f"at rates {rates}; learning there: {learned.first} − {learned.second}"
        detail += f" {show(learned.difference, signed=True)}"
        if learned.interval is not None:
            limits = (learned.interval.low, learned.interval.high)
            detail += f" {learned.metric.show_limits(*limits, signed=True)}"
        finding = _at_best(forgot, full, detail)
        is_unequal = learned.is_distinguishable and learned.difference * forgot.difference > 0
        if is_unequal:
            closer = needed(finding.in_general, "rates at which both learn equally much")
            finding = replace(finding, is_distinguishable=False, needs=closer)
        yield finding


def _at_level(comparison: Comparison, pair: LevelPair, full: str) -> Finding:
    level = comparison.fronts.tested_level
    assert level is not None, "a pair without a level"
    learning = comparison.learning
    detail = f"where both fronts have learned {learning.show(level)} {learning.unit}"
    if pair.bound:
        detail += f"; {getattr(pair, pair.bound)} learned more all along its front, so its"
        detail += " forgetting is an upper bound"
    more = "more seeds or items, or learning rates closer to that level"
    more = needed(pair.in_general, more, " at every learning rate")
    return _of_pair(pair, full, comparison.forgetting, more, detail)


def gap_shrinks(comparison: Comparison, full: str, adapters: Sequence[str]) -> Iterator[Finding]:
    for method in dict.fromkeys(method_of_group(comparison, label) for label in adapters):
        ranks = {
            label: comparison.groups[label][0].record["model"]["rank"]
            for label in adapters
            if method_of_group(comparison, label) == method
        }
        if len(set(ranks.values())) < 2 or len(set(ranks.values())) < len(ranks):
            yield Finding(needs="runs of two ranks of one adapter (in a clone, experiments/ranks)")
            continue
        high, low = max(ranks, key=ranks.__getitem__), min(ranks, key=ranks.__getitem__)
        pair = _pair(comparison, comparison.learning, {high, low})
        yield _at_best(pair, high) if pair else _UNTESTED


def regularises_more(
    comparison: Comparison, full: str, adapters: Sequence[str]
) -> Iterator[Finding]:
    regularised = {
        label: names
        for label, runs in comparison.groups.items()
        if method_of_group(comparison, label) == FULL and label != full
        if (names := regularisers(runs[0]))
    }
    if not regularised:
        yield Finding(
            needs="full fine-tuning with weight decay or dropout, too"
            " (in a clone, experiments/regularisers)",
        )
    for (label, names), adapter in product(regularised.items(), adapters):
        pair = _pair(comparison, comparison.forgetting, {label, adapter})
        detail = f"full fine-tuning with {' and '.join(names)}"
        yield _at_best(pair, label, detail) if pair else _UNTESTED
