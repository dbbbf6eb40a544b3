"""The plots of a parity: growth of the error over the layers, and each layer's worst part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.comparison.report.figures import FAINT, new_figure, styles
from foundry_ext.preflight.parity.activations import WHOLE
from foundry_ext.preflight.parity.differences import FACTOR, Column, Parity

Style = Mapping[str, Mapping[str, str]]


def plot_growth(parity: Parity, folder: Path) -> None:
    """Plot the error of the residual stream after each layer, in growth.png and growth.svg."""

    def draw(axes: Any, columns: Sequence[Column], style: Style) -> None:
        for column in columns:
            stream = [column.parts(row)[WHOLE] for row in parity.layers]
            errors = [difference.error for difference in stream]
            axes.plot(errors, label=column.backend, markersize=4, **style[column.backend])
        rounding = [columns[0].parts(row)[WHOLE].rounding for row in parity.layers]
        axes.plot(rounding, color="#222222", linestyle="--", label="transformers", zorder=3)
        axes.plot([FACTOR * x for x in rounding], color=FAINT, linestyle=":", label="bound")

    _panels(parity, folder, "growth", "relative error after the layer", draw)


def plot_parts(parity: Parity, folder: Path) -> None:
    """Plot the roundings by which each layer's worst part is off, in parts.png and parts.svg."""

    def draw(axes: Any, columns: Sequence[Column], style: Style) -> None:
        for column in columns:
            worst = [column.worst(row) for row in parity.layers]
            ratios = [part[1].ratio for part in worst if part is not None]
            axes.plot(ratios, label=column.backend, markersize=4, **style[column.backend])
        axes.axhline(FACTOR, color=FAINT, linestyle=":", label="bound")

    _panels(parity, folder, "parts", "worst part, in roundings", draw)


def _panels(parity: Parity, folder: Path, name: str, label: str, draw: Any) -> None:
    """Draw a panel per dtype, with a line per backend, in one style throughout."""
    from matplotlib.ticker import MaxNLocator

    by_dtype = parity.by_dtype()
    style = styles(list(dict.fromkeys(column.backend for column in parity.columns)))
    size = (2.6 + 2.6 * len(by_dtype), 3.0)
    with new_figure(folder, name, size, columns=len(by_dtype)) as panels:
        panels = [panels] if len(by_dtype) == 1 else panels
        for axes, (dtype, columns) in zip(panels, by_dtype.items(), strict=True):
            draw(axes, columns, style)
            _log_scale(axes)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(dtype)
            axes.set_xlabel("layer")
        panels[0].set_ylabel(label)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _log_scale(axes: Any) -> None:
    """Make the y axis logarithmic, with plain numbers, because figures take no mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
