"""The page of `foundry-ext inspect`: one file, no script, nothing loaded from anywhere."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from foundry_ext.preflight.inspect.packs import DocumentView, Epoch, Inspection, PackView, TokenView

# (background, edge) of neighbouring documents; each keeps black text readable.
COLOURS = (
    ("#dbeafe", "#2563eb"),
    ("#fde9c8", "#c2760a"),
    ("#d9f2e0", "#15803d"),
    ("#f6dcee", "#b0338a"),
    ("#e6e1fa", "#6d4fc4"),
    ("#d5f1f1", "#0f7f86"),
)
_TICK = 64  # positions between two marks in the text

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; color: #1c2430; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; }
.quiet { color: #5a6472; }
.totals { display: grid; gap: .6rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 42%), 1fr)); }
.totals div { border: 1px solid #dde2e8; border-radius: .4rem; padding: .5rem .7rem; }
.totals b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.totals span { color: #5a6472; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e3e7ec;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: #5a6472; font-weight: 600; }
.lost { color: #a3341f; font-weight: 600; }
.strip { display: flex; height: 1.6rem; border: 1px solid #b9c1cb; border-radius: .25rem;
  overflow: hidden; margin: .5rem 0 .8rem; }
.strip a { display: block; height: 100%; border-right: 1px solid #fff; }
.empty { background: repeating-linear-gradient(45deg, #fff 0 4px, #d6dbe1 4px 6px); }
.document { border-left: 5px solid; padding: .3rem .8rem .6rem; margin: .7rem 0; }
.document header { font-size: .85rem; color: #3d4754; margin-bottom: .25rem; }
.text { font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text i, .text b { font-style: normal; border-radius: 2px; box-shadow: inset 1px 0 #8d98a559; }
.text i { color: #6b7480; font-weight: 400; }
.text b { font-weight: 400; color: #0c1219; }
.text sub { color: #7a8490; font-size: .68em; user-select: none; padding: 0 .15em; }
.text u { text-decoration: none; color: #8a94a0; }
.legend { border: 1px solid #dde2e8; border-radius: .4rem; padding: .5rem .8rem; margin: 1rem 0; }
.legend .text b { background: #dbeafe; }
.swatch { display: inline-block; width: 1.6rem; height: .9rem; border: 1px solid #b9c1cb;
  vertical-align: -1px; }
"""


def render(inspection: Inspection) -> str:
    """The whole page. All text from the data, the YAML or the tokenizer is escaped."""
    title = f"{inspection.name}: {inspection.loader}_loader"
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="quiet">The first packs of the first epoch, from the loader, sampler and collator'
        f" that training uses; tokenizer {escape(inspection.tokenizer)}.</p>",
        _totals(inspection.epoch),
        _sources(inspection.sources),
        _legend(),
        *(_pack(pack, number) for number, pack in enumerate(inspection.packs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{_colour_styles()}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _colour_styles() -> str:
    return "".join(
        f".c{i} {{ border-color: {edge}; }} .c{i} b, a.c{i} {{ background: {fill}; }}\n"
        f"a.c{i} {{ border-bottom: 4px solid {edge}; }}\n"
        for i, (fill, edge) in enumerate(COLOURS)
    )


def _totals(epoch: Epoch) -> str:
    batches = f"batches of {epoch.batch_packs} pack{'s' if epoch.batch_packs > 1 else ''}"
    if epoch.num_empty_packs:
        batches += f", the last with {epoch.num_empty_packs} empty"
    values = [
        (f"{epoch.num_documents:,}", "documents in use an epoch"),
        (f"{epoch.num_tokens:,}", "tokens"),
        (f"{100 * epoch.num_loss_tokens / epoch.num_tokens:.1f} %", "of tokens carry loss"),
        (f"{epoch.num_packs:,}", f"packs of at most {epoch.capacity:,} tokens"),
        (f"{100 * epoch.packing_efficiency:.2f} %", "of the packs is filled"),
        (f"{epoch.num_batches:,}", batches),
        (f"{epoch.num_documents / epoch.num_packs:.1f}", "documents a pack"),
        (f"{epoch.longest:,}", f"tokens in the longest document, of {epoch.max_seq_len:,} allowed"),
    ]
    cells = (f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in values)
    return f'<div class="totals">{"".join(cells)}</div>'


def _sources(sources: Sequence[dict[str, Any]]) -> str:
    """What became of each source's rows; only outcomes that occur have a column."""
    kinds = [
        kind
        for kind in sources[0]["counts"]
        if kind == "kept" or any(source["counts"][kind] for source in sources)
    ]
    total = sum(source["tokens"] for source in sources)
    head = ["source", "split", "revision", "documents", "tokens", "share", *kinds]
    rows = []
    for source in sources:
        revision = source["revision"]
        cells = [
            escape(str(source["name"])),
            escape(str(source["split"] or "")),
            escape(str(revision)[:12]) if revision else "–",
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{100 * source['tokens'] / max(total, 1):.2f} %",
        ]
        lost = [
            f'<span class="lost">{source["counts"][kind]:,}</span>'
            if kind not in ("kept", "split") and source["counts"][kind]
            else f"{source['counts'][kind]:,}"
            for kind in kinds
        ]
        rows.append(_row("td", [*cells, *lost]))
    header = _row("th", [escape(name.replace("_", " ")) for name in head])
    return (
        "<h2>Where the documents come from, and what became of them</h2>"
        f'<div class="scroll"><table>{header}{"".join(rows)}</table></div>'
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _legend() -> str:
    return (
        '<div class="legend">Each colour is a document, which sees no other. '
        '<span class="text"><b>coloured tokens</b></span> carry loss: the model learns to predict'
        " them from those before them in their document. "
        '<span class="text"><i>grey tokens</i></span> are read, not learned. '
        f'<span class="text"><sub>{_TICK}</sub></span> is a position, which starts at 0 in every'
        ' document; <span class="text"><u>↵</u></span> a line break that is part of a token. '
        '<span class="swatch empty"></span> is unused. Pointing at a token tells its position and'
        " id.</div>"
    )


def _pack(pack: PackView, number: int) -> str:
    loss = pack.num_loss_tokens / max(pack.num_tokens, 1)
    filling = pack.num_computed_tokens - pack.num_tokens
    facts = [
        f"batch {pack.batch}, place {pack.place}",
        f"{len(pack.documents)} documents",
        f"{pack.num_tokens:,} of {pack.capacity:,} tokens,"
        f" {100 * pack.packing_efficiency:.1f} % full",
        f"{pack.num_loss_tokens:,} carry loss, {100 * loss:.1f} %",
        *([f"{filling:,} filled slots, in no count"] if filling else []),
    ]
    if not pack.documents:
        facts.append("empty: it completes the last global batch and weighs nothing")
    body = "".join(
        _document(document, f"p{number}d{place}", place)
        for place, document in enumerate(pack.documents)
    )
    return (
        f'<section><h2>Pack {number}</h2><p class="quiet">{escape(" · ".join(facts))}</p>'
        f"{_strip(pack, number)}{body}</section>"
    )


def _strip(pack: PackView, number: int) -> str:
    """The pack to scale, a link a document."""
    pieces = []
    for place, document in enumerate(pack.documents):
        share = 100 * len(document.tokens) / pack.capacity
        hint = f"document {document.index}: {len(document.tokens)} tokens"
        pieces.append(
            f'<a class="c{place % len(COLOURS)}" href="#p{number}d{place}"'
            f' style="width:{share:.3f}%" title="{escape(hint)}"></a>'
        )
    pieces.append('<span class="empty" style="flex:1"></span>')
    return f'<div class="strip">{"".join(pieces)}</div>'


def _document(document: DocumentView, anchor: str, place: int) -> str:
    facts = [
        f"document {document.index} of {document.source}",
        f"{len(document.tokens):,} tokens, {document.num_loss_tokens:,} carry loss",
        f"positions 0 to {len(document.tokens) - 1:,}",
    ]
    if document.outcome == "split":
        facts.append("a piece of a longer row")
    lost = (
        f' · <span class="lost">{document.num_truncated_tokens:,} tokens cut from its end</span>'
        if document.num_truncated_tokens
        else ""
    )
    return (
        f'<div class="document c{place % len(COLOURS)}" id="{anchor}">'
        f"<header>{escape(' · '.join(facts))}{lost}</header>"
        f'<div class="text">{"".join(_tokens(document.tokens))}</div></div>'
    )


def _tokens(tokens: Sequence[TokenView]) -> Iterator[str]:
    for token in tokens:
        if token.position % _TICK == 0 and token.position:
            yield f"<sub>{token.position}</sub>"
        tag = "b" if token.has_loss else "i"
        text = escape(token.text).replace("\n", "<u>↵</u>\n").replace("\t", "<u>→</u>\t")
        yield f'<{tag} title="{token.position}, id {token.id}">{text}</{tag}>'
