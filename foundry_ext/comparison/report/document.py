"""A report as blocks of plain text, and its two formats: Markdown and one HTML page.

Each format escapes the text in its own way, so no name, prompt or path from a run becomes markup.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from foundry_ext.utils.markdown import escape_markdown
from foundry_ext.utils.pages import render_page

_WIDE = 500  # points; the plots with two panels are wider


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Subheading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. The other columns are aligned right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Figure:
    name: str
    """File name of the PNG and SVG beside the report, without suffix."""
    caption: str


Block = Heading | Subheading | Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class ReportDocument:
    title: str
    blocks: Sequence[Block]


def format_markdown(document: ReportDocument) -> str:
    parts = [f"# {escape_markdown(document.title)}"]
    for block in document.blocks:
        match block:
            case Heading(text):
                parts.append(f"## {escape_markdown(text)}")
            case Subheading(text):
                parts.append(f"### {escape_markdown(text)}")
            case Paragraph(text):
                parts.append(escape_markdown(text))
            case Bullets(texts):
                parts.append("\n".join(f"- {escape_markdown(text)}" for text in texts))
            case Table(columns, rows, caption):
                rule = ["---", *["---:"] * (len(columns) - 1)]
                cells = [[escape_markdown(cell) for cell in row] for row in (columns, *rows)]
                cells.insert(1, rule)
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
                parts.append(f"*{escape_markdown(caption)}*")
            case Figure(name, caption):
                parts.append(f"![{name.replace('_', ' ')}]({name}.svg)")
                parts.append(f"*{escape_markdown(caption)}*")
    return "\n\n".join(parts) + "\n"


def format_html(document: ReportDocument, folder: Path) -> str:
    """Return one HTML page that contains everything it shows and runs no script.

    Args:
        document: the report.
        folder: the folder with the figures' SVG files.
    """
    figures = {}
    for block in document.blocks:
        if isinstance(block, Figure):
            svg = (folder / f"{block.name}.svg").read_text(encoding="utf-8")
            # The only values that autoescape passes on as markup. matplotlib wrote them, and
            # draws or escapes every text in them.
            markup = Markup(inline_svg(svg, f"f{len(figures)}-"))
            figures[block.name] = markup, _width(svg) > _WIDE
    return render_page(
        "foundry_ext.comparison.report",
        "report.html",
        title=document.title,
        blocks=[(type(block).__name__, block) for block in document.blocks],
        figures=figures,
        keep_intervals=_keep_intervals,
    )


def _keep_intervals(text: str) -> str:
    """Put a no-break space into each interval, as in [low, high]."""
    return re.sub(r"(\[[^\s\[\]]+,) (?=[^\s\[\]]+\])", "\\1\u00a0", text)


def _width(svg: str) -> float:
    """Return the width in points from the view box, `0 0 width height`."""
    box = re.search(r'viewBox="([^"]*)"', svg)
    return float(box[1].split()[2]) if box else 0.0


def inline_svg(svg: str, prefix: str) -> str:
    """Return matplotlib's SVG ready to stand in a page.

    The XML prologue, comments, metadata and the fixed size are left out. `prefix` makes the ids
    unique in the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|(?:xlink:)?href="#|url\(#)', rf"\1{prefix}", svg)
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?)\s{attribute}="[^"]*"', r"\1", svg, count=1)
    return svg
