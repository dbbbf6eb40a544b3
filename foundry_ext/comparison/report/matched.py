"""Part of the report on runs at learning rates that were chosen for equal learning."""

from collections.abc import Iterator

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.matched_runs import MatchedRuns
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.pairwise import PairwiseComparison
from foundry_ext.comparison.report.document import Block, Bullets, Subheading, Table
from foundry_ext.comparison.report.wording import format_mean_and_interval, format_seeds


def matched_rate_blocks(comparison: Comparison) -> list[Block]:
    """Return the part of the section on matched learning; nothing without such runs."""
    at_rates = comparison.at_matched_rates
    if at_rates is None:
        return []
    rows = [["learning rate", *(f"{rate:.3g}" for rate in at_rates.rates.values())]]
    rows += [
        [
            f"{metric.title}, {metric.unit}",
            *(format_mean_and_interval(metric, one.mean, one.interval) for one in summaries),
        ]
        for metric, summaries in at_rates.summaries.items()
    ]
    x = comparison.learning
    return [
        Subheading("At learning rates chosen for equal learning"),
        Table(
            ["at the end", *at_rates.runs],
            rows,
            f"Runs at one learning rate per method ({_seeds(at_rates)}), chosen so that all methods"
            f" learn the same on {x.subject}. Means of the change from step 0, with 95 %"
            " intervals. These runs are given by --matched; fronts and best rates do not use them.",
        ),
        Bullets(matched_rate_sentences(comparison)),
    ]


def _seeds(at_rates: MatchedRuns) -> str:
    by_label = {label: [run.seed for run in runs] for label, runs in at_rates.runs.items()}
    first = next(iter(by_label.values()))
    if all(seeds == first for seeds in by_label.values()):
        return format_seeds(first)
    return "; ".join(f"{label}: {format_seeds(seeds)}" for label, seeds in by_label.items())


def matched_rate_sentences(comparison: Comparison) -> list[str]:
    """Return how equally the methods learned, then findings on every loss of forgetting."""
    at_rates = comparison.at_matched_rates
    x = comparison.learning
    if at_rates is None or not at_rates.pairs[x]:
        return []
    means = [summary.mean for summary in at_rates.summaries[x]]
    start = (
        "At the learning rates chosen for equal learning, the methods learned"
        f" {x.show(min(means))} to {x.show(max(means))} {x.unit} on {x.subject}"
    )
    unequal = [_learned_more(pair) for pair in at_rates.pairs[x] if pair.is_distinguishable]
    start += (
        f", and these pairs not equally: {'; '.join(unequal)}."
        if unequal
        else "; no two are distinguishable in it."
    )
    losses = [metric for metric in at_rates.pairs if metric.role == "forgetting"]
    losses = [
        metric for metric in losses if metric.kind == "loss" or metric == comparison.forgetting
    ]
    return [start, *(text for metric in losses for text in _findings(at_rates, x, metric))]


def _findings(at_rates: MatchedRuns, learning: Metric, metric: Metric) -> Iterator[str]:
    for learned, pair in zip(at_rates.pairs[learning], at_rates.pairs[metric], strict=True):
        sentence = pair.sentence.replace("In these runs", "in these runs", 1)
        text = f"At the learning rates chosen for equal learning, {sentence}"
        if learned.is_distinguishable:
            text += f" But {_learned_more(learned)}, so this is not at equal learning."
        yield text


def _learned_more(pair: PairwiseComparison) -> str:
    more, less = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
    assert pair.interval is not None, "distinguishable without an interval"
    limits = sorted(abs(end) for end in (pair.interval.low, pair.interval.high))
    size = pair.metric.show(abs(pair.difference))
    return f"{more} learned {size} {pair.metric.show_limits(*limits)} more than {less}"
