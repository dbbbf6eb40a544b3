"""The report's plots: a colour and a marker a method, intervals, which way is better."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.comparison.comparison import Comparison, points
from foundry_ext.comparison.metrics import Metric, curve, final_value
from foundry_ext.comparison.report.figures import FAINT, log_ticks, new_figure, styles, thousands
from foundry_ext.comparison.runs import Run


def plot_tradeoff(comparison: Comparison, folder: Path) -> None:
    """A point per run, the chosen learning rate's mean with its intervals, the Pareto front."""
    x, y = comparison.learning, comparison.forgetting
    style = styles(list(comparison.groups))
    with new_figure(folder, "tradeoff", (6.6, 4.6)) as axes:
        front = [
            (point.learning * x.scale, point.forgetting * y.scale) for point in comparison.front
        ]
        axes.step(
            *zip(*front, strict=True),
            where="pre",  # up, then right: between two points the second is the best attained
            color=FAINT,
            linestyle=(0, (4, 3)),
            linewidth=1.1,
            label="Pareto front",
            zorder=1,
        )
        _base_model(axes, comparison)
        for label, runs in comparison.groups.items():
            own = style[label]
            values = [
                (final_value(run, x) * x.scale, final_value(run, y) * y.scale) for run in runs
            ]
            axes.scatter(*zip(*values, strict=True), s=20, alpha=0.4, linewidths=0, **own)
            path = [
                (point.learning * x.scale, point.forgetting * y.scale)
                for point in points({label: runs}, x, y)  # by learning rate
            ]
            axes.plot(*zip(*path, strict=True), color=own["color"], lw=0.8, alpha=0.5, zorder=2)
            _mean_with_intervals(axes, comparison, label, own)
        _label_axes(axes, x, y)
        axes.set_title(
            "better: to the right (learns more) and down (forgets less)", color="#555555"
        )
        axes.legend(loc="upper left")
        axes.margins(0.08)
        _label_rates(axes, comparison)


def _base_model(axes: Any, comparison: Comparison) -> None:
    """A star at the origin, unless that would press the runs into a corner of the plot."""
    x, y = comparison.learning, comparison.forgetting
    ends = [
        (final_value(run, x), final_value(run, y))
        for runs in comparison.groups.values()
        for run in runs
    ]
    low, high = np.min(ends, axis=0), np.max(ends, axis=0)
    spread, with_base = high - low, np.maximum(high, 0) - np.minimum(low, 0)
    if (spread > 0.4 * with_base).all():
        axes.plot(0, 0, marker="*", markersize=10, color="#222222", linestyle="", zorder=3)
        axes.annotate("base model", (0, 0), (7, 5), textcoords="offset points", fontsize=8)
    else:
        axes.annotate(
            "base model at 0, 0: outside",
            (0.01, 0.01),
            xycoords="axes fraction",
            fontsize=7,
            color="#6a6a6a",
        )


def _label_rates(axes: Any, comparison: Comparison) -> None:
    """Learning rates beside their points, where they hide the least; chosen ones are in the"
    " legend."""
    x, y = comparison.learning, comparison.forgetting
    axes.figure.canvas.draw()  # settles the layout, so that data have places in points
    every = points(comparison.groups, x, y)
    at = axes.transData.transform([(p.learning * x.scale, p.forgetting * y.scale) for p in every])
    at = at * 72 / axes.figure.dpi
    taken = list(at)
    for point, place in zip(every, at, strict=True):
        if point.learning_rate == comparison.best[point.label].learning_rate:
            continue
        text = f"{point.learning_rate:g}"
        half = 2.2 * len(text)
        sides = [(half + 5, 0), (-half - 5, 0), (0, 8), (0, -8), (half + 5, 8), (-half - 5, -8)]
        side = max(sides, key=lambda s: min(_gap(place + np.array(s), other) for other in taken))
        taken.append(place + np.array(side))
        axes.annotate(
            text,
            (point.learning * x.scale, point.forgetting * y.scale),
            side,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color="#6a6a6a",
        )


def _gap(first: np.ndarray, second: np.ndarray) -> float:
    """Distance between two labels' middles, in label sizes: they are wider than high."""
    return float(min(np.hypot((first[0] - second[0]) / 18, (first[1] - second[1]) / 7), 1.5))


def _mean_with_intervals(axes: Any, comparison: Comparison, label: str, own: Mapping) -> None:
    x, y = (comparison.summary(label, one) for one in (comparison.learning, comparison.forgetting))
    bars = {}
    for name, summary in (("xerr", x), ("yerr", y)):
        if summary.interval is not None:
            scale = summary.metric.scale
            below, above = summary.mean - summary.interval.low, summary.interval.high - summary.mean
            bars[name] = [[max(0.0, below) * scale], [max(0.0, above) * scale]]
    axes.errorbar(
        x.mean * x.metric.scale,
        y.mean * y.metric.scale,
        **bars,
        markersize=8,
        capsize=3,
        elinewidth=1.2,
        markeredgecolor="#222222",
        markeredgewidth=0.8,
        linestyle="",
        label=f"{label}, lr {comparison.best[label].learning_rate:g}",
        zorder=4,
        **own,
    )


def plot_curves(comparison: Comparison, folder: Path) -> None:
    """Learning and forgetting against real tokens, at the chosen learning rates."""
    style = styles(list(comparison.groups))
    with new_figure(folder, "curves", (7.6, 3.4), columns=2) as both:
        for axes, metric in zip(both, (comparison.learning, comparison.forgetting), strict=True):
            for label, runs in comparison.chosen.items():
                own = style[label]
                curves = [curve(run, metric) for run in runs]
                for one in curves:
                    axes.plot(
                        one[:, 0], one[:, 1] * metric.scale, color=own["color"], alpha=0.3, lw=0.8
                    )
                for number, mean in enumerate(_mean_curves(curves)):
                    name = None if number else label
                    axes.plot(
                        mean[:, 0], mean[:, 1] * metric.scale, markersize=5, label=name, **own
                    )
            axes.set_xlabel("real tokens")
            axes.xaxis.set_major_formatter(thousands)
            axes.set_ylabel(f"{metric.subject}, {metric.unit}")
            better = "higher" if metric.role == "learning" else "lower"
            axes.set_title(f"{metric.role}: {better} is better")
        both[0].legend(loc="best")


def _mean_curves(curves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The mean, once; each curve where --allow let them have another number of evaluations."""
    if len({len(one) for one in curves}) > 1:
        return list(curves)
    return [np.mean(curves, axis=0)]


def plot_learning_rates(comparison: Comparison, folder: Path) -> None:
    """Final learning and forgetting by learning rate; the chosen one ringed, an edge marked."""
    style = styles(list(comparison.groups))
    with new_figure(folder, "learning_rates", (7.6, 3.6), columns=2) as both:
        for axes, metric in zip(both, (comparison.learning, comparison.forgetting), strict=True):
            for label, runs in comparison.groups.items():
                _rate_response(axes, comparison, label, runs, metric, style[label])
            log_ticks(axes)
            axes.set_xlabel("learning rate")
            axes.set_ylabel(f"{metric.subject}, {metric.unit}")
            better = "higher" if metric.role == "learning" else "lower"
            axes.set_title(f"{metric.role}: {better} is better")
            axes.margins(0.1, 0.14)
        both[0].legend(loc="best", fontsize=8)


def _rate_response(
    axes: Any,
    comparison: Comparison,
    label: str,
    runs: Sequence[Run],
    metric: Metric,
    own: Mapping,
) -> None:
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        by_rate.setdefault(run.learning_rate, []).append(final_value(run, metric) * metric.scale)
    rates = sorted(by_rate)
    for rate in rates:
        axes.scatter(
            [rate] * len(by_rate[rate]), by_rate[rate], s=12, alpha=0.4, linewidths=0, **own
        )
    means = {rate: float(np.mean(by_rate[rate])) for rate in rates}
    axes.plot(rates, list(means.values()), markersize=5, label=label, **own)
    best = comparison.best[label]
    at = (best.learning_rate, means[best.learning_rate])
    axes.plot(
        *at, marker="o", markersize=13, markerfacecolor="none", color=own["color"], linestyle=""
    )
    if best.edge is not None:
        axes.annotate(
            "edge of\nthe grid",
            at,
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=own["color"],
        )


def plot_differences(comparison: Comparison, folder: Path) -> None:
    """Every pair's difference with its interval; filled where it is distinguishable from 0."""
    metrics = (comparison.learning, comparison.forgetting)
    rows = len(comparison.pairs_of(metrics[0]))
    with new_figure(folder, "differences", (7.6, 1.5 + 0.32 * rows), columns=2) as both:
        for axes, metric in zip(both, metrics, strict=True):
            pairs = comparison.pairs_of(metric)
            for row, pair in enumerate(reversed(pairs)):
                filled = "#222222" if pair.is_distinguishable else "white"
                if pair.interval is not None:
                    limits = np.array([pair.interval.low, pair.interval.high]) * metric.scale
                    axes.plot(limits, [row, row], color="#222222", linewidth=1.3, zorder=2)
                axes.plot(
                    pair.difference * metric.scale,
                    row,
                    marker="o",
                    markersize=6,
                    color="#222222",
                    markerfacecolor=filled,
                    zorder=3,
                )
            names = [f"{pair.first} − {pair.second}" for pair in reversed(pairs)]
            axes.set_yticks(range(rows), names if axes is both[0] else [""] * rows)
            axes.set_ylim(-0.6, rows - 0.4)
            axes.axvline(0, color="#555555", linewidth=0.9)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"difference in {metric.subject}, {metric.unit}")
            axes.set_title(metric.role)


def _label_axes(axes: Any, x: Metric, y: Metric) -> None:
    axes.set_xlabel(f"learning: {x.subject}, {x.unit} →")
    axes.set_ylabel(f"forgetting: {y.subject}, {y.unit} →")


def plot_lines(
    comparison: Comparison,
    lines: Sequence[tuple[str, int, Sequence[tuple[float, float]]]],
    folder: Path,
) -> None:
    """Learning against forgetting along the lines from the base to tuned weights.

    Args:
        lines: (method's label, seed, its points).
    """
    x, y = comparison.learning, comparison.forgetting
    own = styles(list(comparison.groups))
    with new_figure(folder, "interpolation", (6.0, 4.0)) as axes:
        for label, seed, line in lines:
            learned, forgot = np.array(line).T
            axes.plot(
                learned * x.scale,
                forgot * y.scale,
                markersize=5,
                label=f"{label}, seed {seed}",
                **own[label],
            )
        _label_axes(axes, x, y)
        axes.legend(loc="best", fontsize=8)
