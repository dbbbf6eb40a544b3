"""Section on the methods' whole fronts over learning rates, with their areas."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.front_comparison import AreaPair, LevelPair
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.pairwise import MethodPair
from foundry_ext.comparison.report.best_points import best_point_table
from foundry_ext.comparison.report.document import Block, Bullets, Figure, Heading, Paragraph, Table
from foundry_ext.comparison.report.wording import (
    NO_VALUE,
    format_mean_and_interval,
    format_p,
    join_names,
)
from foundry_ext.comparison.seed_item_interval import interval_of_mean
from foundry_ext.comparison.statistics import MIN_SEEDS, Interval


def front_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on whole fronts: their picture, areas and differences."""
    fronts = comparison.fronts
    on_front = [f"{point.label} at {point.learning_rate:g}" for point in comparison.front]
    blocks: list[Block] = [
        Heading("Learning against forgetting: whole fronts"),
        Figure("tradeoff", _caption(comparison)),
        Paragraph(
            f"On the front of all methods together: {join_names(on_front)}. The base model itself,"
            " at 0 and 0, forgets nothing and learns nothing."
        ),
    ]
    if fronts.reference is None:
        text = (
            "No learning rate on any front both learned and forgot something, so there is no level"
        )
        text += " of forgetting to compare areas up to; --reference LEVEL sets one."
        return [*blocks, Paragraph(text)]
    if not fronts.areas:
        text = "No seed was run at each learning rate of its method, so no seed has a whole front,"
        return [*blocks, Paragraph(f"{text} and areas are not compared. {_WAY_OUT}")]
    blocks += [_table(comparison, fronts.reference), best_point_table(comparison)]
    if has_points_only(comparison):
        blocks.append(Paragraph(ONE_RATE))
        return blocks
    sentences = [area_sentence(comparison, pair) for pair in fronts.area_pairs]
    sentences += [
        f"{first} and {second} are not compared by area: {reason}."
        for first, second, reason in fronts.not_compared
    ]
    sentences += [
        f"{label} learned nothing that is distinguishable from 0. Its area is noise and has no"
        " interval, and forgetting is not compared at matched learning along fronts."
        for label in fronts.at_floor
    ]
    if sentences:
        blocks.append(Bullets(sentences))
    if fronts.not_compared:
        blocks.append(
            Paragraph(f"More learning rates make an area larger by luck alone. {_WAY_OUT}")
        )
    return blocks


def has_points_only(comparison: Comparison) -> bool:
    """Return whether each of several methods was run at one learning rate."""
    points = comparison.fronts.points.values()
    return len(points) > 1 and all(len(each.rates) == 1 for each in points)


ONE_RATE = (
    "Each method was run at one learning rate, so its front is one point, and areas are not"
    " compared. The section on best learning rates compares the points. To compare fronts, run"
    " several learning rates of each method."
)
_WAY_OUT = (
    "To compare fronts, run the same seeds at equally many learning rates of each method, or leave"
    " runs out."
)


def _caption(comparison: Comparison) -> str:
    text = (
        "Each method's front over its learning rates, from the means over seeds at the end of"
        " training: the steps show the most learned within each budget of forgetting. Large points"
        " are means on the front, small crosses means at rates that another rate of the method"
        " beats. Light points are single runs. Numbers are learning rates; a ring marks the"
        " rate at which the method learns most. Right is more learned, down is less forgotten:"
        " lower right is better."
    )
    if comparison.at_matched_rates is not None:
        text += (
            " Points with a dark edge and 95 % intervals: runs at learning rates chosen for equal"
            " learning."
        )
    if comparison.fronts.reference is not None:
        text += " Dashed: the level of forgetting up to which areas count."
    return text


def _table(comparison: Comparison, reference: float) -> Table:
    x, y, fronts = comparison.learning, comparison.forgetting, comparison.fronts
    labels = list(comparison.groups)
    up_to = [y.show(reference / part) for part in (1, 2, 4)]

    def row(name: str, cell: Callable[[str], str]) -> list[str]:
        return [name, *(cell(label) if label in fronts.areas else NO_VALUE for label in labels)]

    def area(label: str) -> str:
        return f"{fronts.areas[label].mean * x.scale * y.scale:.4g}"

    rows = [
        row(f"learning averaged over budgets up to {up_to[0]}", partial(_averaged, comparison, 1)),
        row(f"the same up to {up_to[1]}", partial(_averaged, comparison, 2)),
        row(f"the same up to {up_to[2]}", partial(_averaged, comparison, 4)),
        row("least forgotten at any rate", partial(_least_forgotten, comparison)),
        row(f"hypervolume up to {up_to[0]}: the first row times {up_to[0]}", area),
        ["learning rates", *(str(len(fronts.points[label].rates)) for label in labels)],
        [
            "seeds with a whole front",
            *(_counted(fronts.points[label].seeds) for label in labels),
        ],
    ]
    return Table(["", *labels], rows, _table_caption(comparison, up_to[0]))


def _counted(seeds: Sequence[int]) -> str:
    """Return e.g. "2 (17, 18)", so that a seed's name is not read as a number of seeds."""
    return f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none"


def _averaged(comparison: Comparison, divisor: int, label: str) -> str:
    """Return the learning averaged over budgets up to the reference level over `divisor`."""
    fronts = comparison.fronts
    assert fronts.reference is not None, "areas without a reference"
    level, points = fronts.reference / divisor, fronts.points[label]
    if divisor > 1 and points.least_forgotten >= level:
        return NO_VALUE
    areas = points.hypervolumes(level)
    interval = None if label in fronts.at_floor else interval_of_mean(areas)
    shown = scaled(interval, 1 / level)
    return format_mean_and_interval(comparison.learning, areas.mean / level, shown)


def _least_forgotten(comparison: Comparison, label: str) -> str:
    points = comparison.fronts.points[label]
    sample = points.least_forgotten_by_seed()
    is_finite = np.isfinite(list(sample.values.values())).all()
    interval = interval_of_mean(sample) if is_finite else None
    return format_mean_and_interval(comparison.forgetting, points.least_forgotten, interval)


def _table_caption(comparison: Comparison, reference: str) -> str:
    x, y, fronts = comparison.learning, comparison.forgetting, comparison.fronts
    where = (
        "given by --reference"
        if fronts.is_given
        else "1.1 times the largest forgetting on any method's front, rounded up; --reference sets"
        " another"
    )
    return (
        f"Hypervolume: the area that a seed's front dominates, from learning 0 (the base model) up"
        f" to a forgetting of {reference} {y.unit}, the same for every method ({where}). Divided by"
        f" {reference}, it is the learning ({x.subject}, {x.unit}) that a method reaches within a"
        f" budget of forgetting ({y.subject}), averaged over budgets from 0 to {reference};"
        " forgetting less than nothing counts as 0. Means"
        f" over seeds that ran at every learning rate, {_basis(comparison)}. A front is the best of"
        " several noisy points, so luck adds a little to every area; methods with equally many"
        " rates gain alike if they are equally noisy. A budget below the least forgotten at any"
        " rate counts as nothing learned, so two methods are ranked only if the difference has the"
        " same sign, and is distinguishable, over the budgets that both fronts cover. The"
        " smaller budgets show whether the order depends on the level;"
        f" {NO_VALUE}: no rate forgot so little."
    )


def _basis(comparison: Comparison) -> str:
    """Return in words what the areas' intervals vary."""
    intervals = [value.interval for value in comparison.fronts.areas.values()]
    kinds = sorted({interval.kind for interval in intervals if interval is not None})
    return f"with 95 % intervals over {' or '.join(kinds)}" if kinds else "without intervals"


def scaled(interval: Interval | None, factor: float) -> Interval | None:
    """Return the interval of the estimate times a positive factor."""
    if interval is None:
        return None
    return replace(
        interval,
        estimate=interval.estimate * factor,
        low=interval.low * factor,
        high=interval.high * factor,
        standard_error=interval.standard_error * factor,
    )


def area_sentence(comparison: Comparison, pair: AreaPair) -> str:
    """Return the finding on two methods' areas, as learning averaged over budgets."""
    x, y, reference = comparison.learning, comparison.forgetting, comparison.fronts.reference
    assert reference is not None, "pairs without a reference"
    where = f"averaged over budgets of forgetting up to {y.show(reference)} {y.unit}"
    if pair.is_distinguishable or pair.interval is None or pair.interval.includes_zero:
        interval = scaled(pair.interval, 1 / reference)
        return _finding(pair, pair.difference / reference, interval, x, "learns", where)
    # Budgets that one front does not cover, or Holm's correction, are the reason.
    text = (
        f"{_start(pair, where)}, {pair.first} and {pair.second} are not ranked by learning: the"
        f" difference is {_difference(x, pair.interval, reference)}, but"
    )
    points = comparison.fronts.points
    later = max((pair.first, pair.second), key=lambda label: points[label].least_forgotten)
    if pair.covered_from is None:
        return f"{text} all runs of {later} diverged."
    start = f"{y.show(pair.covered_from)} {y.unit}"
    text += f" {later} forgot {start} or more at each of its learning rates."
    if pair.covered is None:
        return text
    text += " From there, where both fronts have points, it is "
    text += _difference(x, pair.covered, reference - pair.covered_from)
    if pair.covered.estimate * pair.difference > 0:  # else the sign is the reason
        text += f" ({format_p(pair.adjusted_p)} for the two together, after Holm's correction)"
    return f"{text}."


def _difference(metric: Metric, interval: Interval, width: float) -> str:
    """Return an area's difference and limits, divided by the width of the budgets."""
    value = metric.show(interval.estimate / width, signed=True)
    limits = metric.show_limits(interval.low / width, interval.high / width, signed=True)
    return f"{value} {metric.unit} {limits}"


def _finding(
    pair: MethodPair,
    difference: float,
    interval: Interval | None,
    metric: Metric,
    verb: str,
    where: str,
    least: str = "",
) -> str:
    """Return "... A learns more than B ...", or that they are not distinguishable."""
    start = _start(pair, where)
    more, less = (pair.first, pair.second) if difference > 0 else (pair.second, pair.first)
    size = f"{metric.show(abs(difference))} {metric.unit}"
    shown = f"{metric.show(difference, signed=True)} {metric.unit}"
    not_distinguishable = (
        f"{start}, {pair.first} and {pair.second} are not distinguishable in {metric.role}:"
        f" difference {shown}"
    )
    if interval is None:
        missing = f"neither items nor {MIN_SEEDS} seeds to show its spread"
        return f"{not_distinguishable}, with {missing}."
    if pair.is_distinguishable:
        limits = metric.show_limits(*sorted(abs(end) for end in (interval.low, interval.high)))
        return f"{start}, {more} {verb} more than {less}: {least}{size} {limits}."
    limits = metric.show_limits(interval.low, interval.high, signed=True)
    if not interval.includes_zero:  # the p-value is the reason
        limits += f", {format_p(pair.adjusted_p)} after Holm's correction"
    return f"{not_distinguishable} {limits}."


def _start(pair: MethodPair, where: str) -> str:
    """Return the beginning of a sentence.

    The place stands first, because "token: " before a number would be redacted as a secret.
    """
    return where[0].upper() + where[1:] if pair.in_general else f"In these runs, {where}"


def level_sentence(comparison: Comparison, pair: LevelPair) -> str:
    """Return the finding on two methods' forgetting at the tested level of learning."""
    x, y, level = comparison.learning, comparison.forgetting, comparison.fronts.tested_level
    assert level is not None, "pairs without a level"
    where = f"where both have learned {x.show(level)} {x.unit}"
    if pair.bound is not None and not pair.is_distinguishable:
        label = pair.first if pair.bound == "first" else pair.second
        return (
            f"{_start(pair, where)}, {pair.first} and {pair.second} are not distinguishable in"
            f" forgetting: {label} learned more all along a front, so only an upper bound of its"
            " forgetting is known."
        )
    least = "at least " if pair.bound else ""
    return _finding(pair, pair.difference, pair.interval, y, "forgets", where, least)
