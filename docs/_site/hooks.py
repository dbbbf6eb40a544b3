"""Hooks of mkdocs: generated pages, and files of the repository that pages link to.

Pages are generated from the code and from the executable pages. A page of docs/ may link to any
file of the repository, as it must on a code host. In the site, Markdown files and pictures outside
docs/ are copied below `repository/`; a link to any other file becomes its text, because the site
does not hold the code.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import executable  # noqa: E402 # pyright: ignore[reportMissingImports] # beside this file
import reference  # noqa: E402 # pyright: ignore[reportMissingImports]

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
COPIED = (".md", ".png", ".svg")
EXECUTABLE = dict(executable.addresses())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and what pages link to outside docs/, directly or through others."""
    for name, text in reference.pages().items():
        files.append(File.generated(config, name, content=text))
    for source in executable.sources():
        uri = EXECUTABLE[source.relative_to(ROOT).as_posix()]
        files.append(File.generated(config, uri, content=executable.page(source)))
    for name, picture in executable.plots().items():
        uri = f"from-scratch/{name}.png"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    waiting = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        if not (ROOT / page).is_file():
            continue  # generated: has links within the site only
        for target in _targets(page):
            uri = _uri(target)
            if target.endswith(COPIED) and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places that files have in the site."""
    uri = page.file.src_uri
    source = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"

    def replaced(match: re.Match[str]) -> str:
        image, text, address, anchor = match.groups()
        target = _resolve(source, address)
        if target is None:
            return match[0]
        if files.get_file_from_path(_uri(target)) is None:
            return text if "`" in text else f"`{text}`"
        relative = posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return LINK.sub(replaced, markdown)


def _targets(page: str) -> Iterator[str]:
    if page.endswith(".md"):
        for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            target = _resolve(page, match[3])
            if target is not None:
                yield target


def _resolve(page: str, address: str) -> str | None:
    """Return the repository's path of a relative link; None if there is no such file."""
    if "://" in address or address.startswith("/"):
        return None
    target = os.path.normpath(posixpath.join(posixpath.dirname(page), address))
    if (ROOT / target / "README.md").is_file():
        target = posixpath.join(target, "README.md")
    inside = not target.startswith("..") and (ROOT / target).exists()
    return target if inside else None


def _uri(target: str) -> str:
    if target in EXECUTABLE:
        return EXECUTABLE[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
