"""The page of `foundry-ext inspect`: one file that loads nothing from elsewhere."""

import re

from foundry_ext.preflight.inspect.layouts import MOST_LINES
from foundry_ext.preflight.inspect.packs import Inspection
from foundry_ext.utils.pages import render_page

_LINE_BREAK_OR_TAB = re.compile(r"([\n\t])")


def format_inspection(inspection: Inspection) -> str:
    """Return the complete page. Nothing from the data, the YAML or the tokenizer becomes markup."""
    counts = [source["counts"] for source in inspection.sources]
    names = dict.fromkeys(name for one in counts for name in one)
    return render_page(
        "foundry_ext.preflight.inspect",
        "inspection.html",
        title=f"{inspection.name}: {inspection.loader}_loader",
        inspection=inspection,
        limit=MOST_LINES,
        # Outcomes that never occurred get no column.
        outcomes=[name for name in names if name == "kept" or any(c.get(name) for c in counts)],
        pieces=_LINE_BREAK_OR_TAB.split,
    )
