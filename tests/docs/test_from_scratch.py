"""The pages of docs/from-scratch have their parts, run, and end with a check that can fail."""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import one_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/from-scratch"
PAGES = sorted(FOLDER.glob("*.py"))
SECTIONS = ["## Build", "## Compare", "## Plot", "## Exercise", "### Solution"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def cells(page: Path) -> list[tuple[str, str]]:
    """Return (marker, text) of each cell."""
    parts = re.split(r"^# %%(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert parts[0] == "", "text before the first cell"
    return list(zip(map(str.strip, parts[1::2]), parts[2::2], strict=True))


def code(page: Path) -> ast.Module:
    return ast.parse(page.read_text(encoding="utf-8"))


def test_there_are_eight_pages_and_the_readme_lists_them_in_order():
    linked = re.findall(r"^\d\. \[(.+)\]\((.+\.py)\): ", (FOLDER / "README.md").read_text(), re.M)
    assert [name for _, name in linked] == [page.name for page in PAGES]
    assert len(PAGES) == 8
    for number, (title, name) in enumerate(linked, start=1):
        assert cells(FOLDER / name)[0][1].startswith(f"# # {number}. {title}\n")


@every_page
def test_a_page_has_its_parts(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^# (#{2,} .*)$", text, re.MULTILINE) == SECTIONS
    assert 80 <= sum(map(bool, text.split("\n"))) <= 155, "lines that are not blank"
    *before, (marker, solution) = cells(page)
    assert "hide-cell" in marker and "source_hidden" in marker
    assert re.search(r"^check\(\w+\)\n\Z", solution, re.MULTILINE)
    (check,) = [n for n in code(page).body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    assert any("def check(" in cell for marker, cell in before if not marker)
    assert any(word in ast.unparse(check) for word in ("assert ", "assert_close"))
    for marker, cell in before:
        assert marker in ("", "[markdown]")
        assert marker == "" or all(line[:2].strip() in ("#", "") for line in cell.split("\n"))


@every_page
def test_a_page_compares_with_both_and_needs_no_jupytext(page: Path):
    imported = {
        name.partition(".")[0]
        for node in ast.walk(code(page))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    allowed = {"torch", "transformers", "peft", "numpy", "matplotlib", "foundry_ext"}
    assert imported <= allowed | sys.stdlib_module_names
    assert {"foundry_ext", "matplotlib", "torch"} <= imported and imported & {
        "transformers",
        "peft",
    }


@every_page
def test_a_page_is_a_notebook_and_markdown(page: Path):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(page)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown" if m == "[markdown]" else "code" for m, _ in cells(page)]
    assert notebook.cells[-1].metadata["jupyter"] == {"source_hidden": True}
    assert notebook.cells[-1].metadata["tags"] == ["hide-cell"]
    markdown = jupytext.writes(notebook, fmt="md")
    assert f"\n{SECTIONS[0]}\n" in markdown and "```python" in markdown


def rms_norm_without_the_second_term(page: dict[str, Any]) -> Callable[..., Any]:
    def gradient(x, weight, dy):
        r = (x.square().mean(-1, keepdim=True) + page["EPS"]).rsqrt()
        return r * weight * dy, (dy * x * r).sum(0)

    return gradient


# A plausible wrong solution of each exercise, made from the page's names.
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "01_rmsnorm": rms_norm_without_the_second_term,
    "02_rotary": lambda page: lambda weight: weight,
    "03_grouped_query_attention": lambda page: lambda w, H, K: w[: K * page["N"]],
    "04_attention_kernels": lambda page: lambda a, log_a, b, log_b: (a + b) / 2,
    "05_block_and_model": lambda page: (
        lambda right, wrong, ids: [
            index
            for index, (x, y) in enumerate(
                zip(page["model"](right, ids)[1:-1], page["model"](wrong, ids)[1:-1], strict=True)
            )
            if not x.equal(y)
        ]
    ),
    "06_kv_cache": lambda page: lambda heads, dim, window: page["Cache"](heads, dim),
    "07_packing": lambda page: page["next_fit"],
    "08_adapters": lambda page: lambda W, A, B, scale, m: W + scale * B @ A,
}


@pytest.mark.parametrize("page", one_of(PAGES, FOLDER / "07_packing.py"), ids=lambda p: p.stem)
def test_a_page_runs_and_its_exercise_can_be_failed(page: Path, tmp_path: Path, monkeypatch):
    import matplotlib.pyplot as plt
    import torch

    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    plt.close("all")
    with torch.random.fork_rng(devices=[]):
        names = runpy.run_path(str(page), run_name="__main__")
        picture = tmp_path / f"outputs/from-scratch/{page.stem}.png"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [picture]
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with pytest.raises(AssertionError):
            names["check"](WRONG[page.stem](names))
    (figure,) = map(plt.figure, plt.get_fignums())
    assert all(axes.get_title() and axes.get_xlabel() for axes in figure.axes)
    rows: dict[int, list[str]] = {}  # panels in a row may share the quantity of the first
    for axes in figure.axes:
        rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes.get_ylabel())
    assert all(labels[0] for labels in rows.values())
    plt.close("all")


@pytest.mark.more
def test_a_page_runs_as_a_plain_script(tmp_path: Path):
    command = [sys.executable, str(PAGES[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"outputs/from-scratch/{PAGES[0].stem}.png").is_file()
