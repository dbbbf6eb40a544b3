"""The report's sections on the trade-off: the front, and forgetting at matched learning."""

from foundry_ext.comparison.comparison import Comparison, dominated_points
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.report.document import Block, Bullets, Figure, Heading, Paragraph, Table
from foundry_ext.comparison.report.wording import (
    limits,
    listed,
    p_value,
    seed_list,
    seeds_used,
    with_limits,
)
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.comparison.tradeoff import Matched, matched_pairs


def tradeoff_blocks(comparison: Comparison) -> list[Block]:
    x, y = comparison.learning, comparison.forgetting
    on_front = [f"{point.label} at {point.learning_rate:g}" for point in comparison.front]
    worse = [
        f"{one.label} at its chosen {one.learning_rate:g} learned {x.show(one.learning)} and forgot"
        f" {y.show(one.forgetting)} ({seed_list(one.seeds)}); {other.label} at"
        f" {other.learning_rate:g} learned more, {x.show(other.learning)}, and forgot less,"
        f" {y.show(other.forgetting)} ({seed_list(other.seeds)})."
        for one, other in dominated_points(comparison)
    ]
    blocks: list[Block] = [
        Heading("Learning against forgetting"),
        Figure(
            "tradeoff",
            "Each small point is a run at its end, its learning rate beside it; thin lines join the"
            " means of a method's learning rates; each large one is the"
            " mean at the method's chosen learning rate with 95 % intervals"
            f" ({seeds_used(comparison)}). Right is more learned, down is less forgotten: lower"
            " right is better. Dashed: the Pareto front of the means of every method and learning"
            " rate, those that none beats in both.",
        ),
        Paragraph(
            f"On the front: {listed(on_front)}. The base model itself, at 0 and 0, forgets nothing"
            " and learns nothing."
        ),
    ]
    if worse:
        blocks.append(
            Paragraph(
                "Learning rates are chosen by learning alone. Where another method, at any of its"
                " own, did better in both, what the findings below say of forgetting is of the"
                " chosen learning rates and not of the methods:"
            )
        )
        blocks.append(Bullets(worse))
    return blocks


def matched_blocks(comparison: Comparison) -> list[Block]:
    if not comparison.matched:
        return []
    x, y = comparison.learning, comparison.forgetting
    labels = list(comparison.groups)
    rows = []
    for level, methods in comparison.matched.items():
        cells = []
        for label in labels:
            one = methods[label]
            if one.mean is None:
                reached = f"{len(one.by_seed)} of {one.num_seeds} seeds" if one.by_seed else "not"
                cells.append(f"{reached} reached")
            else:
                cells.append(
                    with_limits(y, one.mean, one.interval) + (" †" if one.is_early else "")
                )
        rows.append([f"{x.show(level)}, over evaluations", *cells])
        ends = [methods[label] for label in labels]
        shown = [_over_rates(y, one) for one in ends]
        if any(one.over_rates is not None for one in ends):
            rows.append([f"{x.show(level)}, over learning rates", *shown])
    return [
        Heading("Forgetting at matched learning"),
        Table(
            [f"learning, {x.unit}", *labels],
            rows,
            f"Forgetting ({y.subject}, {y.unit}; less is better) where each method has learned as"
            f" much ({x.subject}). Over evaluations: along the runs at the chosen learning rate,"
            " where the schedule has not ended yet, with 95 % t intervals over seeds where there"
            f" are {MIN_SEEDS}. Over learning rates: between the ends of runs. Interpolated"
            " linearly, never extrapolated: a level that a method does not reach, or that lies"
            " outside its learning rates, is named. ≤: it learned more at each of its learning"
            " rates, and forgot this much where it forgot least. †: learned before the first"
            " evaluation after step 0, so the value lies on a straight line from the base model.",
        ),
        Bullets(_matched_sentences(comparison)),
    ]


def _over_rates(metric: Metric, one: Matched) -> str:
    if one.over_rates is not None:
        return metric.show(one.over_rates)
    return "outside" if one.at_most is None else f"≤ {metric.show(one.at_most)}"


def _matched_sentences(comparison: Comparison) -> list[str]:
    """Of every two methods, at the highest level that all runs reach."""
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
            text = f"{more} has forgotten {size} more than {less} in these runs; no interval, for"
            text += f" want of {MIN_SEEDS} seeds."
        elif pair.is_distinguishable:
            low, high = sorted(abs(end) for end in (pair.interval.low, pair.interval.high))
            text = f"{more} forgets more than {less}: {size} [{y.show(low)}, {y.show(high)}]."
        else:
            shown = y.show(pair.difference, signed=True)
            shown += f" {y.unit} {limits(y, pair.interval, signed=True)}"
            text = f"{pair.first} and {pair.second} are not distinguishable in forgetting:"
            text += f" difference {shown}, p = {p_value(pair.adjusted_p)} after Holm's correction."
        early = [label for label in (pair.first, pair.second) if methods[label].is_early]
        if early:
            text += f" {listed(early)} learned as much before the first evaluation after step 0, so"
            text += " this rests on a straight line from the base model."
        sentences.append(start + text)
    return sentences
