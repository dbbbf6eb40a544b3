"""Pages of the site from docs/from-scratch/*.py and docs/notebook.py, with their plots.

A page from scratch draws one plot when it runs. The plots are kept in build/from-scratch/ by a
digest of the pages and of the package, so that a second build takes no time.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "from-scratch"
KEPT = ROOT / "build" / "from-scratch"
RUN_ALL = "import runpy, sys; [runpy.run_path(page, run_name='__main__') for page in sys.argv[1:]]"
PLOT = "## Plot"


def sources() -> list[Path]:
    """Return the files that become pages."""
    return [*sorted(FOLDER.glob("*.py")), ROOT / "docs" / "notebook.py"]


def page(source: Path) -> str:
    """Return a source as Markdown: its text, its code, its plot, and the solution folded."""
    parts, wants_plot = [], False
    for cell in jupytext.read(source).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(### Solution)$", "", cell.source, flags=re.MULTILINE)
            parts.append(text)
            wants_plot = wants_plot or PLOT in text.splitlines()
            continue
        code = f"```python\n{cell.source}\n```"
        if "hide-cell" in cell.metadata.get("tags", []):
            code = '??? success "Solution"\n\n' + re.sub("^", "    ", code, flags=re.MULTILINE)
        parts.append(code)
        if wants_plot:
            parts.append(f"![plot]({source.stem}.png)")
            wants_plot = False
    parts.append(
        f"*This page is `{source.relative_to(ROOT).as_posix()}`: run it, or open it in Jupyter.*"
    )
    return "\n\n".join(parts) + "\n"


def plots() -> dict[str, Path]:
    """Return name -> picture of each page from scratch, after running those that have changed."""
    pages = sorted(FOLDER.glob("*.py"))
    folder = KEPT / _digest([*pages, *sorted((ROOT / "foundry_ext").rglob("*.py"))])
    pictures = {
        path.stem: folder / "outputs" / "from-scratch" / f"{path.stem}.png" for path in pages
    }
    if not all(picture.is_file() for picture in pictures.values()):
        shutil.rmtree(KEPT, ignore_errors=True)  # of earlier pages
        folder.mkdir(parents=True)
        environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", RUN_ALL, *map(str, pages)]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return pictures


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def addresses() -> Iterator[tuple[str, str]]:
    """Return (path in the repository, page of the site) of each source."""
    for source in sources():
        path = source.relative_to(ROOT).as_posix()
        yield path, path.removeprefix("docs/").removesuffix(".py") + ".md"
