"""The page of `foundry-ext parity --out FOLDER`: verdict, plots and tables in one file."""

from pathlib import Path

from markupsafe import Markup

from foundry_ext.comparison.report.document import inline_svg
from foundry_ext.preflight.parity.activations import LAYER_PARTS, WHOLE
from foundry_ext.preflight.parity.differences import FACTOR, Column, Difference, Parity
from foundry_ext.preflight.parity.plots import plot_growth, plot_parts
from foundry_ext.preflight.parity.text import cells, format_ratio, skipped_lines, verdict
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.pages import render_page

_FIGURES = (
    (
        "growth",
        plot_growth,
        "Error of the residual stream after each layer, in a run of the whole model: the norm of"
        " the difference from the exact result over its norm, at the worst token. transformers'"
        " own model in the same dtype shows what rounding alone makes.",
    ),
    (
        "parts",
        plot_parts,
        "Error of each layer's worst part, in units of rounding. Every layer is given the same"
        " input, so an error of one layer does not show in the next.",
    ),
)


def write_page(parity: Parity, folder: Path) -> None:
    """Write index.html, which loads nothing, and each of its plots as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, plot, caption in _FIGURES if parity.columns else ():
        plot(parity, folder)
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        # matplotlib wrote it, and draws or escapes every text in it.
        figures.append((Markup(inline_svg(svg, f"{name}-")), caption))
    page = render_page(
        "foundry_ext.preflight.parity",
        "parity.html",
        title=f"Parity of {parity.model}",
        parity=parity,
        factor=FACTOR,
        verdict=verdict(parity),
        skipped=skipped_lines(parity),
        figures=figures,
        cells=cells,
        parts=(*LAYER_PARTS, WHOLE),
        worst_layer=_worst_layer,
        format_ratio=format_ratio,
    )
    write_text(folder / "index.html", page)


def _worst_layer(parity: Parity, column: Column, part: str) -> tuple[str, Difference] | None:
    """Return the layer whose part is the most roundings off; None without that part."""
    parts = ((row, column.parts(row).get(part)) for row in parity.layers)
    found = [(row, difference) for row, difference in parts if difference is not None]
    return max(found, key=lambda item: (item[1].exceeds, item[1].ratio), default=None)
