"""A document as blocks of plain text, written as Markdown or as one HTML page.

Texts are plain: each writer escapes them for its own language, so no name, prompt or path that
comes from a run can become markup.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
    """The first column names the rows; the others are aligned right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Figure:
    name: str
    """File name of the PNG and SVG beside the document, without suffix."""
    caption: str


Block = Heading | Subheading | Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Document:
    title: str
    blocks: Sequence[Block]


def markdown(document: Document) -> str:
    parts = [f"# {_md(document.title)}"]
    for block in document.blocks:
        match block:
            case Heading(text):
                parts.append(f"## {_md(text)}")
            case Subheading(text):
                parts.append(f"### {_md(text)}")
            case Paragraph(text):
                parts.append(_md(text))
            case Bullets(texts):
                parts.append("\n".join(f"- {_md(text)}" for text in texts))
            case Table(columns, rows, caption):
                rule = ["---", *["---:"] * (len(columns) - 1)]
                cells = [[_md(cell) for cell in row] for row in (columns, *rows)]
                cells.insert(1, rule)
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
                parts.append(f"*{_md(caption)}*")
            case Figure(name, caption):
                parts.append(f"![{name.replace('_', ' ')}]({name}.svg)")
                parts.append(f"*{_md(caption)}*")
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """Plain text in Markdown that allows HTML: none of it is markup, and it stays on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", text).replace("://", ":\u200b//")


_WIDE = 500  # points
_CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1b1f24;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.9rem;border-top:1px solid #d9dde2}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p,li{max-width:46rem;overflow-wrap:anywhere}
ul{padding-left:1.2rem}
li{margin:.3rem 0}
figure{margin:1.4rem 0 1.8rem}
figure svg{display:block;width:100%;height:auto;max-width:48rem}
figcaption{color:#4a525c;font-size:.875rem;line-height:1.45;max-width:46rem;margin-top:.5rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid #0072b2}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.35rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e3e6ea}
thead th{border-bottom:2px solid #8a929b;vertical-align:bottom;font-weight:600}
th:first-child{text-align:left;padding-left:0}
tbody th{white-space:normal;min-width:9rem}
tbody th{font-weight:500}
@media (max-width:40rem){main{padding:1rem .9rem 3rem}h1{font-size:1.4rem}
.wide svg{min-width:34rem}}
@media print{main{max-width:none}h2{break-after:avoid}figure,table{break-inside:avoid}}
""".strip()


def page(document: Document, folder: Path) -> str:
    """One HTML page with everything in it: no script, nothing loaded from elsewhere.

    Args:
        folder: where the figures' SVG files lie.
    """
    body = "\n".join(_block(block, index, folder) for index, block in enumerate(document.blocks))
    title = html.escape(document.title)
    # Were a value ever to get through as markup, the policy keeps it from running or loading.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, index: int, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Subheading(text):
            return f"<h3>{html.escape(text)}</h3>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(texts):
            return "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in texts) + "</ul>"
        case Table(columns, rows, caption):
            return _table(columns, rows, caption)
        case Figure(name, caption):
            svg = inline_svg((folder / f"{name}.svg").read_text(), f"f{index}-")
            label = html.escape(caption)
            # Two panels are scrolled on a phone rather than shrunk until unreadable.
            wide = " wide" if _width(svg) > _WIDE else ""
            svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            shown = f'<div class="scroll{wide}">{svg}</div>'
            return f"<figure>{shown}<figcaption>{label}</figcaption></figure>"


def _width(svg: str) -> float:
    """In points, by the view box, `0 0 width height`."""
    box = re.search(r'viewBox="([^"]*)"', svg)
    return float(box[1].split()[2]) if box else 0.0


def _text(text: str) -> str:
    """Escaped; an interval, [low, high], stays on one line."""
    return re.sub(r"(\[[^\s\[\]]+,) (?=[^\s\[\]]+\])", "\\1\u00a0", html.escape(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    label = html.escape(caption)
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"<figcaption>{label}</figcaption></figure>"
    )


def inline_svg(svg: str, prefix: str) -> str:
    """matplotlib's SVG without XML prologue, comments and metadata, its ids made the page's own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid=")', rf"\1{prefix}", svg)
    svg = re.sub(r'((?:xlink:)?href="#)', rf"\1{prefix}", svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    return re.sub(
        r'(<svg[^>]*?)\swidth="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
