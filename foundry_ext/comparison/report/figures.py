"""Style of the figures. They are written as PNG and SVG and need no display."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# From Okabe and Ito, and from Tol: distinct under the common kinds of colour blindness. The
# markers tell methods apart in greyscale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#56B4E9", "#444444")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FAINT = "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "foundry-ext",  # equal figures give equal bytes
    "svg.fonttype": "path",
}


@contextmanager
def new_figure(
    folder: Path, name: str, size: tuple[float, float], columns: int = 1
) -> Iterator[Any]:
    """Yield axes to draw on, then write folder/name.png and folder/name.svg.

    With several columns, yield an array of axes.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield axes[0] if columns == 1 else axes
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def styles(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return a colour and a marker per label."""
    return {
        label: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(labels)
    }


def log_ticks(axes: Any) -> None:
    """Make the x axis logarithmic, with ticks at 1, 2 and 5 in each decade.

    Ticks are plain numbers, because mathematical notation is off (see _STYLE).
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.tick_params(axis="x", labelsize=8)


def thousands(value: float, _position: int) -> str:
    """Format a tick in thousands, millions or billions."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
