"""Sections on the trade-off: the Pareto front, and forgetting at matched learning."""

from foundry_ext.comparison.comparison import Comparison, dominated_points
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.report.document import Block, Bullets, Figure, Heading, Paragraph, Table
from foundry_ext.comparison.report.wording import (
    format_mean_and_interval,
    format_p_value,
    format_seeds,
    format_seeds_and_items,
    join_names,
)
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import Matched, matched_pairs


def tradeoff_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on learning against forgetting, with the methods that are dominated."""
    x, y = comparison.learning, comparison.forgetting
    on_front = [f"{point.label} at {point.learning_rate:g}" for point in comparison.front]
    dominated = [
        f"{point.label} at its chosen {point.learning_rate:g} learned {x.show(point.learning)} and"
        f" forgot {y.show(point.forgetting)} ({format_seeds(point.seeds)}); {better.label} at"
        f" {better.learning_rate:g} learned more, {x.show(better.learning)}, and forgot less,"
        f" {y.show(better.forgetting)} ({format_seeds(better.seeds)})."
        for point, better in dominated_points(comparison)
    ]
    blocks: list[Block] = [
        Heading("Learning against forgetting"),
        Figure(
            "tradeoff",
            "Each small point is a run at its end, with its learning rate beside it. Thin lines"
            " join a method's means by learning rate. Each large point is the mean at the method's"
            f" chosen learning rate with 95 % intervals ({format_seeds_and_items(comparison)})."
            " Right is more learned, down is less forgotten: lower right is better. Dashed: the"
            " Pareto front over every method and learning rate, the means that no other beats in"
            " both.",
        ),
        Paragraph(
            f"On the front: {join_names(on_front)}. The base model itself, at 0 and 0, forgets"
            " nothing and learns nothing."
        ),
    ]
    if dominated:
        blocks.append(
            Paragraph(
                "Learning rates are chosen by learning alone. Each method listed here was beaten in"
                " learning and forgetting by another method at some learning rate, so for it the"
                " findings on forgetting are about the chosen learning rates, not about methods:"
            )
        )
        blocks.append(Bullets(dominated))
    return blocks


def matched_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on forgetting at equal learning; nothing without common levels."""
    if not comparison.matched:
        return []
    x, y = comparison.learning, comparison.forgetting
    labels = list(comparison.groups)
    rows = []
    for level, methods in comparison.matched.items():
        ends = [methods[label] for label in labels]
        cells = [_over_evaluations(y, end) for end in ends]
        rows.append([f"{x.show(level)}, over evaluations", *cells])
        if any(end.over_rates is not None for end in ends):
            cells = [_over_rates(y, end) for end in ends]
            rows.append([f"{x.show(level)}, over learning rates", *cells])
    return [
        Heading("Forgetting at matched learning"),
        Table(
            [f"learning, {x.unit}", *labels],
            rows,
            f"Forgetting ({y.subject}, {y.unit}; less is better) where each method has learned"
            f" equally much ({x.subject}). Over evaluations: along the runs at the chosen learning"
            " rate, before the schedule has ended, with 95 % t intervals over seeds if there are"
            f" {MIN_SEEDS}. Over learning rates: between the ends of runs. Values are interpolated"
            " linearly and never extrapolated: a cell says if a method does not reach the level, or"
            " if the level lies outside its learning rates. ≤: the method learned more at each of"
            " its learning rates, and this is the least it forgot. †: learned before the first"
            " evaluation after step 0, so the value lies on a straight line from the base model.",
        ),
        Bullets(_matched_sentences(comparison)),
    ]


def _over_evaluations(metric: Metric, end: Matched) -> str:
    if end.mean is None:
        num_reached = len(end.by_seed)
        return f"{num_reached} of {end.num_seeds} seeds reached" if num_reached else "not reached"
    shown = format_mean_and_interval(metric, end.mean, end.interval)
    return f"{shown} †" if end.is_early else shown


def _over_rates(metric: Metric, end: Matched) -> str:
    if end.over_rates is not None:
        return metric.show(end.over_rates)
    return "outside" if end.at_most is None else f"≤ {metric.show(end.at_most)}"


def _matched_sentences(comparison: Comparison) -> list[str]:
    """Return a sentence per pair of methods, at the highest level that all runs reach."""
    x, y = comparison.learning, comparison.forgetting
    level = comparison.common_level
    assert level is not None, "levels without a common one"
    start = f"At a learning of {x.show(level)} {x.unit} in runs at the chosen learning rates, "
    methods = comparison.matched[level]
    sentences = []
    for pair in matched_pairs(methods):
        more, less = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
        size = f"{y.show(abs(pair.difference))} {y.unit}"
        if pair.interval is None:
            text = f"{more} has forgotten {size} more than {less} in these runs; there is no"
            text += f" interval, because that takes {MIN_SEEDS} seeds."
        elif pair.is_distinguishable:
            low, high = sorted(abs(end) for end in (pair.interval.low, pair.interval.high))
            text = f"{more} forgets more than {less}: {size} {y.show_limits(low, high)}."
        else:
            difference = y.show(pair.difference, signed=True)
            interval = y.show_limits(pair.interval.low, pair.interval.high, signed=True)
            text = f"{pair.first} and {pair.second} are not distinguishable in forgetting:"
            text += f" difference {difference} {y.unit} {interval},"
            text += f" p = {format_p_value(pair.adjusted_p)} after Holm's correction."
        early = [label for label in (pair.first, pair.second) if methods[label].is_early]
        if early:
            text += f" {join_names(early)} learned as much before the first evaluation after step"
            text += " 0, so this rests on a straight line from the base model."
        sentences.append(start + text)
    return sentences
