"""Plots of the report. A method keeps its colour and marker in all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import Metric, curve, final_value
from foundry_ext.comparison.report.figures import FAINT, log_ticks, new_figure, styles, thousands
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.tradeoff import points


def plot_tradeoff(comparison: Comparison, folder: Path) -> None:
    """Plot every run, each method's mean with its intervals, and the Pareto front."""
    x, y = comparison.learning, comparison.forgetting
    style = styles(list(comparison.groups))
    with new_figure(folder, "tradeoff", (6.6, 4.6)) as axes:
        axes.step(
            *_scaled(comparison, [point.position for point in comparison.front]).T,
            where="pre",  # up, then right: between two points, the second is the best reached
            color=FAINT,
            linestyle=(0, (4, 3)),
            linewidth=1.1,
            label="Pareto front",
            zorder=1,
        )
        _mark_base_model(axes, comparison)
        for label, runs in comparison.groups.items():
            ends = _scaled(comparison, [(final_value(run, x), final_value(run, y)) for run in runs])
            axes.scatter(*ends.T, s=20, alpha=0.4, linewidths=0, **style[label])
            by_rate = [point.position for point in points({label: runs}, x, y)]
            path = _scaled(comparison, by_rate)
            axes.plot(*path.T, color=style[label]["color"], lw=0.8, alpha=0.5, zorder=2)
            _plot_mean(axes, comparison, label, style[label])
        _label_axes(axes, x, y)
        axes.set_title(
            "better: to the right (learns more) and down (forgets less)", color="#555555"
        )
        axes.legend(loc="upper left")
        axes.margins(0.08)
        _label_rates(axes, comparison)


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


def _label_rates(axes: Any, comparison: Comparison) -> None:
    """Write learning rates beside their points, on the side with the most room.

    The chosen ones are in the legend.
    """
    x, y = comparison.learning, comparison.forgetting
    axes.figure.canvas.draw()  # settles the layout, which maps data to pixels
    all_points = points(comparison.groups, x, y)
    data = _scaled(comparison, [point.position for point in all_points])
    positions = axes.transData.transform(data) * 72 / axes.figure.dpi
    taken = list(positions)
    for point, end, position in zip(all_points, data, positions, strict=True):
        if point.learning_rate == comparison.best[point.label].learning_rate:
            continue
        text = f"{point.learning_rate:g}"
        half = 2.2 * len(text)
        sides = [(half + 5, 0), (-half - 5, 0), (0, 8), (0, -8), (half + 5, 8), (-half - 5, -8)]
        side = max(sides, key=lambda s: min(_gap(position + np.array(s), t) for t in taken))
        taken.append(position + np.array(side))
        axes.annotate(
            text,
            end,
            side,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color="#6a6a6a",
        )


def _gap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the distance between two labels' centres in label sizes, at most 1.5.

    Labels are wider than high.
    """
    return float(min(np.hypot((first[0] - second[0]) / 18, (first[1] - second[1]) / 7), 1.5))


def _plot_mean(axes: Any, comparison: Comparison, label: str, style: Mapping) -> None:
    """Draw a method's mean at its chosen learning rate with both intervals."""
    x = comparison.summary(label, comparison.learning)
    y = comparison.summary(label, comparison.forgetting)
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
        **style,
    )


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
    lines: Sequence[tuple[str, int, Sequence[tuple[float, float]]]],
    folder: Path,
) -> None:
    """Plot learning against forgetting on the lines from the base weights to tuned ones.

    Args:
        comparison: the comparison, for its metrics and methods.
        lines: (method's label, seed, points) per run.
        folder: where interpolation.png and .svg are written.
    """
    style = styles(list(comparison.groups))
    with new_figure(folder, "interpolation", (6.0, 4.0)) as axes:
        for label, seed, line in lines:
            name = f"{label}, seed {seed}"
            axes.plot(*_scaled(comparison, line).T, markersize=5, label=name, **style[label])
        _label_axes(axes, comparison.learning, comparison.forgetting)
        axes.legend(loc="best", fontsize=8)
