"""Sections on forgetting at matched learning, and on methods that are dominated."""

from foundry_ext.comparison.comparison import Comparison, dominated_points
from foundry_ext.comparison.front_comparison import FrontValue
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.report.document import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Subheading,
    Table,
)
from foundry_ext.comparison.report.fronts import level_sentence
from foundry_ext.comparison.report.matched import matched_rate_blocks
from foundry_ext.comparison.report.wording import (
    NO_VALUE,
    format_mean_and_interval,
    format_p_value,
    format_seeds,
    join_names,
)
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import Matched, matched_pairs


def dominated_blocks(comparison: Comparison) -> list[Block]:
    """Return a list of methods that another method beats at some rate in both; maybe nothing."""
    x, y = comparison.learning, comparison.forgetting
    dominated = [
        f"{point.label} at its chosen {point.learning_rate:g} learned {x.show(point.learning)} and"
        f" forgot {y.show(point.forgetting)} ({format_seeds(point.seeds)}); {better.label} at"
        f" {better.learning_rate:g} learned more, {x.show(better.learning)}, and forgot less,"
        f" {y.show(better.forgetting)} ({format_seeds(better.seeds)})."
        for point, better in dominated_points(comparison)
    ]
    if not dominated:
        return []
    return [
        Paragraph(
            "Each method listed here was beaten in learning and forgetting by another method at"
            " some learning rate, so for it the findings on forgetting are about the chosen"
            " learning rates, not about methods:"
        ),
        Bullets(dominated),
    ]


def matched_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on forgetting at equal learning; nothing without common levels."""
    over_fronts, at_rates = _front_blocks(comparison), matched_rate_blocks(comparison)
    # Along runs the schedule has not ended; runs at matched rates answer the same question better.
    along_runs = [] if at_rates else _run_blocks(comparison)
    if not (over_fronts or along_runs or at_rates):
        return []
    if not over_fronts:
        text = (
            "No level above 0 lies between two points of a method's front and within reach of every"
            " other one, so forgetting is not compared at equal learning along fronts."
        )
        over_fronts = [Paragraph(text)] if len(comparison.groups) > 1 else []
    if at_rates and over_fronts:
        at_rates.append(Subheading("Along the fronts"))
    return [Heading("Forgetting at matched learning"), *at_rates, *over_fronts, *along_runs]


def _front_blocks(comparison: Comparison) -> list[Block]:
    x, y, fronts = comparison.learning, comparison.forgetting, comparison.fronts
    if fronts.tested_level is None:
        return []
    labels = list(comparison.groups)
    rows = []
    for level, values in sorted(fronts.levels.items()):
        cells = [_at_level(y, values[label]) if label in values else NO_VALUE for label in labels]
        rows.append([x.show(level), *cells])
    blocks: list[Block] = [
        Table(
            [f"learning, {x.unit}", *labels],
            rows,
            f"Forgetting ({y.subject}, {y.unit}; less is better) where each method's front over"
            f" learning rates has learned equally much ({x.subject}): the mean over the seeds with"
            " a whole front, with 95 % intervals, interpolated linearly between neighbouring points"
            " of a seed's front and never extrapolated. The levels lie a quarter, half and three"
            " quarters of the way through the learning that the fronts have in common. ≤: the"
            " method learned more all along the front of at least one seed, so this is an upper"
            " bound.",
        ),
    ]
    if fronts.level_pairs:
        blocks.append(Bullets([level_sentence(comparison, pair) for pair in fronts.level_pairs]))
    return blocks


def _at_level(metric: Metric, value: FrontValue) -> str:
    shown = format_mean_and_interval(metric, value.mean, value.interval)
    return f"≤ {shown}" if value.num_bounds else shown


def _run_blocks(comparison: Comparison) -> list[Block]:
    """Return the part on runs at the chosen learning rates.

    Runs that were measured at their start and end only have no course to match along.
    """
    evaluations = max(len(run.record["evaluations"]) for run in comparison.chosen_runs)
    if not comparison.matched or evaluations < 3:
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
        Subheading("Along the runs at the best learning rates"),
        Table(
            [f"learning, {x.unit}", *labels],
            rows,
            f"Forgetting ({y.subject}, {y.unit}; less is better) where each method has learned"
            f" equally much ({x.subject}). Over evaluations: along the runs at the chosen learning"
            " rate, before the schedule has ended, with 95 % t intervals over seeds if there are"
            f" {MIN_SEEDS}. Over learning rates: between neighbouring means of the"
            " front. Values are interpolated"
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
