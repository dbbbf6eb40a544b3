"""Plain text in Markdown files."""

import html
import re

from foundry_ext.utils.output import printable


def escape_markdown(text: str) -> str:
    """Return the text on one line, escaped for a Markdown that allows HTML.

    No name, prompt or path becomes markup or a link, and none ends a table's cell.
    """
    text = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", text).replace("://", ":\u200b//")
