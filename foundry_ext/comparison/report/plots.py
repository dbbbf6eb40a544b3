"""Plots of the report. A method keeps its colour and marker in all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import Metric, curve, final_value
from foundry_ext.comparison.report.figures import FAINT, log_ticks, new_figure, styles, thousands
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.tradeoff import pareto_front, points


def plot_tradeoff(comparison: Comparison, folder: Path) -> None:
    """Plot each method's whole front over learning rates, with every run, lightly."""
    x, y = comparison.learning, comparison.forgetting
    style = styles(list(comparison.groups))
    with new_figure(folder, "tradeoff", (7.2, 5.0)) as axes:
        _mark_base_model(axes, comparison)
        for label, runs in comparison.groups.items():
            ends = _scaled(comparison, [(final_value(run, x), final_value(run, y)) for run in runs])
            axes.scatter(*ends.T, s=14, alpha=0.3, linewidths=0, **style[label])
        _plot_matched(axes, comparison, style)
        _label_axes(axes, x, y)
        axes.set_title(
            "better: to the right (learns more) and down (forgets less)", color="#555555"
        )
        axes.margins(0.08)
        _mark_reference(axes, comparison)
        axes.autoscale(False)
        for label in comparison.groups:
            _plot_front(axes, comparison, label, style[label])
        axes.legend(loc="best")
        _label_rates(axes, comparison, style)


def _plot_front(axes: Any, comparison: Comparison, label: str, style: Mapping) -> None:
    """Draw one method's front as steps from learning 0 to the plot's top, and its means."""
    means = points({label: comparison.groups[label]}, comparison.learning, comparison.forgetting)
    front = pareto_front(means)
    path = _scaled(comparison, [point.position for point in front])
    top = max(axes.get_ylim()[1], float(path[-1, 1]))
    steps = np.array([(min(0.0, path[0, 0]), path[0, 1]), *path, (path[-1, 0], top)])
    color = style["color"]
    axes.step(*steps.T, where="pre", color=color, linewidth=1.5, alpha=0.9, zorder=2)
    axes.plot(
        *path.T,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linestyle="",
        label=label,
        zorder=4,
        **style,
    )
    beaten = [point.position for point in means if point not in front]
    if beaten:
        off = _scaled(comparison, beaten)
        axes.plot(*off.T, marker="x", markersize=5, color=color, linestyle="", zorder=3)
    rate = comparison.best[label].learning_rate
    chosen = next(point.position for point in means if point.learning_rate == rate)
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": color}
    axes.plot(*_scaled(comparison, [chosen]).T, linestyle="", zorder=3, **ring)


def _plot_matched(axes: Any, comparison: Comparison, style: Mapping) -> None:
    """Draw the means at matched rates, with intervals, if there are such runs."""
    at_rates = comparison.at_matched_rates
    if at_rates is None:
        return
    axes_metrics = (comparison.learning, comparison.forgetting)
    for across, up in zip(*(at_rates.summaries[metric] for metric in axes_metrics), strict=True):
        bars = [
            np.abs([[one.interval.low - one.mean], [one.interval.high - one.mean]]) * metric.scale
            if one.interval
            else None
            for one, metric in zip((across, up), axes_metrics, strict=True)
        ]
        position = _scaled(comparison, [(across.mean, up.mean)])[0]
        look = {"markersize": 9, "markeredgecolor": "#222222", "elinewidth": 1.2, "zorder": 5}
        axes.errorbar(*position, bars[1], bars[0], **look, **style[across.label])


def _mark_reference(axes: Any, comparison: Comparison) -> None:
    """Draw a dashed line at the forgetting up to which areas count, unless it is far away."""
    if comparison.fronts.reference is None:
        return
    level = comparison.fronts.reference * comparison.forgetting.scale
    low, high = axes.get_ylim()
    if level < low + 1.5 * (high - low):
        line = {"color": FAINT, "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 1}
        axes.axhline(level, label="areas count up to here", **line)
        axes.set_ylim(low, max(high, level + 0.02 * (high - low)))


def _scaled(comparison: Comparison, positions: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return (learning, forgetting) in the units that are shown: [n, 2]."""
    return np.array(positions) * (comparison.learning.scale, comparison.forgetting.scale)


def _mark_base_model(axes: Any, comparison: Comparison) -> None:
    """Draw a star at the origin, unless that would squeeze the runs into a corner of the plot."""
    x, y = comparison.learning, comparison.forgetting
    ends = [(final_value(run, x), final_value(run, y)) for run in comparison.runs]
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


def _label_rates(axes: Any, comparison: Comparison, style: Mapping[str, Mapping]) -> None:
    """Write learning rates beside their points, where no other text or mark of a point is.

    A rate that finds no such place is left out; learning_rates.png has them all.
    """
    x, y = comparison.learning, comparison.forgetting
    axes.figure.canvas.draw()  # settles the layout, which maps data to pixels
    all_points = points(comparison.groups, x, y)
    data = _scaled(comparison, [point.position for point in all_points])
    positions = axes.transData.transform(data) * 72 / axes.figure.dpi
    at_rates = comparison.at_matched_rates
    matched = [at_rates.summaries[metric] for metric in (x, y)] if at_rates else [[], []]
    means = [(one.mean, other.mean) for one, other in zip(*matched, strict=True)]
    big = axes.transData.transform(_scaled(comparison, means)) if means else np.empty((0, 2))
    taken = [*positions, *big * 72 / axes.figure.dpi]
    for point, end, position in zip(all_points, data, positions, strict=True):
        text = f"{point.learning_rate:g}"
        half = 2.2 * len(text)
        beside = [(sign * (half + 6), up) for sign in (1, -1) for up in (0, 8, -8)]
        sides = [np.array(side) for side in (*beside, (0, 9), (0, -9))]
        gaps = [min(_gap(position + side, other) for other in taken) for side in sides]
        best = int(np.argmax(gaps))
        if gaps[best] < 0.8:
            continue
        taken.append(position + sides[best])
        look = {"ha": "center", "va": "center", "fontsize": 7, "color": style[point.label]["color"]}
        axes.annotate(text, end, sides[best], textcoords="offset points", **look)


def _gap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the distance between two labels' centres in label sizes, at most 1.5.

    Labels are wider than high.
    """
    return float(min(np.hypot((first[0] - second[0]) / 18, (first[1] - second[1]) / 7), 1.5))


def plot_curves(comparison: Comparison, folder: Path) -> None:
    """Plot learning and forgetting against real tokens, at the chosen learning rates."""
    style = styles(list(comparison.groups))
    with new_figure(folder, "curves", (7.6, 3.4), columns=2) as panels:
        for axes, metric in zip(panels, (comparison.learning, comparison.forgetting), strict=True):
            for label, runs in comparison.chosen.items():
                curves = [curve(run, metric) for run in runs]
                color = style[label]["color"]
                for run_curve in curves:
                    tokens, values = run_curve.T
                    axes.plot(tokens, values * metric.scale, color=color, alpha=0.3, lw=0.8)
                for index, mean in enumerate(_mean_curves(curves)):
                    tokens, values = mean.T
                    name = None if index else label  # one entry per method in the legend
                    axes.plot(
                        tokens, values * metric.scale, markersize=5, label=name, **style[label]
                    )
            axes.set_xlabel("real tokens")
            axes.xaxis.set_major_formatter(thousands)
            _label_panel(axes, metric)
        panels[0].legend(loc="best")


def _mean_curves(curves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the mean curve alone, or every curve if their lengths differ.

    They differ where --allow let runs have other numbers of evaluations.
    """
    if len({len(run_curve) for run_curve in curves}) > 1:
        return list(curves)
    return [np.mean(curves, axis=0)]


def plot_learning_rates(comparison: Comparison, folder: Path) -> None:
    """Plot final learning and forgetting by learning rate.

    The chosen rate is ringed, and marked if it lies at the edge of the grid.
    """
    style = styles(list(comparison.groups))
    with new_figure(folder, "learning_rates", (7.6, 3.6), columns=2) as panels:
        for axes, metric in zip(panels, (comparison.learning, comparison.forgetting), strict=True):
            for label, runs in comparison.groups.items():
                _plot_rates(axes, comparison, label, runs, metric, style[label])
            log_ticks(axes)
            axes.set_xlabel("learning rate")
            _label_panel(axes, metric)
            axes.margins(0.1, 0.14)
        panels[0].legend(loc="best", fontsize=8)


def _plot_rates(
    axes: Any,
    comparison: Comparison,
    label: str,
    runs: Sequence[Run],
    metric: Metric,
    style: Mapping,
) -> None:
    """Draw one method's runs and their means by learning rate."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        by_rate.setdefault(run.learning_rate, []).append(final_value(run, metric) * metric.scale)
    for rate, values in sorted(by_rate.items()):
        axes.scatter([rate] * len(values), values, s=12, alpha=0.4, linewidths=0, **style)
    means = {rate: float(np.mean(values)) for rate, values in sorted(by_rate.items())}
    axes.plot(list(means), list(means.values()), markersize=5, label=label, **style)
    best = comparison.best[label]
    chosen = (best.learning_rate, means[best.learning_rate])
    color = style["color"]
    axes.plot(*chosen, marker="o", markersize=13, markerfacecolor="none", color=color, linestyle="")
    if best.edge is not None:
        axes.annotate(
            "edge of\nthe grid",
            chosen,
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=color,
        )


def plot_differences(comparison: Comparison, folder: Path) -> None:
    """Plot every pair's difference with its interval, filled if distinguishable from 0."""
    metrics = (comparison.learning, comparison.forgetting)
    rows = len(comparison.pairs_of(metrics[0]))
    with new_figure(folder, "differences", (7.6, 1.5 + 0.32 * rows), columns=2) as panels:
        for axes, metric in zip(panels, metrics, strict=True):
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
            axes.set_yticks(range(rows), names if axes is panels[0] else [""] * rows)
            axes.set_ylim(-0.6, rows - 0.4)
            axes.axvline(0, color="#555555", linewidth=0.9)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"difference in {metric.subject}, {metric.unit}")
            axes.set_title(metric.role)


def _label_panel(axes: Any, metric: Metric) -> None:
    axes.set_ylabel(f"{metric.subject}, {metric.unit}")
    better = "higher" if metric.role == "learning" else "lower"
    axes.set_title(f"{metric.role}: {better} is better")


def _label_axes(axes: Any, x: Metric, y: Metric) -> None:
    axes.set_xlabel(f"learning: {x.subject}, {x.unit} →")
    axes.set_ylabel(f"forgetting: {y.subject}, {y.unit} →")


def plot_lines(
    comparison: Comparison,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    folder: Path,
) -> None:
    """Plot learning against forgetting on the lines from the base weights to tuned ones.

    Args:
        comparison: the comparison, for its metrics and methods.
        lines: (run, its method's label, points) per run.
        folder: where interpolation.png and .svg are written.
    """
    style = styles(list(comparison.groups))
    with new_figure(folder, "interpolation", (6.0, 4.0)) as axes:
        for name, label, line in lines:
            axes.plot(*_scaled(comparison, line).T, markersize=5, label=name, **style[label])
        _label_axes(axes, comparison.learning, comparison.forgetting)
        axes.legend(loc="best", fontsize=8)
