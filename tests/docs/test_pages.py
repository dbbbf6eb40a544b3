"""README and docs: their links, their commands, and the site that `make docs` builds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from foundry_ext.cli.main import COMMANDS, build_parser
from foundry_ext.config.loading import load_config
from tests.browser import foreign_references

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PROGRAMS = ("foundry-ext", "composer", "make", "python", "llmfoundry")
# Files that the reader has, or that an earlier command writes.
READERS = re.compile(r"outputs/|data/|dist/|train\.jsonl|eval\.jsonl|FILE|MODEL|mine")


class Command(NamedTuple):
    words: list[str]
    needs: str
    """GPUs or hub, if a comment beside it or above it says so."""


def commands(page: Path) -> list[Command]:
    """Return the commands of the page's blocks without a language."""
    found = []
    for block in re.findall(r"^ *```\n(.*?)^ *```$", page.read_text("utf-8"), re.M | re.S):
        above = ""
        for line in block.replace("\\\n", " ").splitlines():
            code, _, comment = line.strip().partition("#")
            above = comment if comment and not code else above
            needed = re.search("GPUs|hub", comment) or re.search("GPUs|hub", above)
            found += [
                Command(shlex.split(part), needed[0] if needed else "")
                for part in re.split(r";\s*(?:do\s)?", code)
                if part.startswith(PROGRAMS)
            ]
    return found


def problem(words: list[str]) -> str | None:
    """Return what is wrong with a command; None if nothing is."""
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        missing = [word for word in arguments if "=" not in word and word not in targets]
        return f"no target {missing[0]}" if missing else None
    for word in arguments:
        path = word.split("=")[-1]
        known = not path.endswith((".py", ".yaml")) or READERS.search(path)
        if not known and not list(Path().glob(path)):
            return f"no file {path}"
    if program == "foundry-ext" and arguments[0] != "--version":
        if arguments[0] not in COMMANDS:
            return f"no command {arguments[0]}"
        parser, _ = build_parser(arguments[0])
        parser.parse_args(arguments)  # exits with 2 if an option does not exist
    if program == "composer" and arguments[0] == "train.py":
        files = [word for word in arguments[1:] if word.endswith(".yaml") and "=" not in word]
        overrides = [word for word in arguments[1:] if "=" in word]
        for file in files:
            for path in Path().glob(file):
                load_config(str(path), overrides)
    return None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the project's files and those that the commands expect."""
    for name in ("benchmarks", "docs", "experiments", "tests", "train.py", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs/quickstart/base/hf").mkdir(parents=True)
    (tmp_path / "outputs/quickstart/data").mkdir()
    for name in ("train.jsonl", "eval.jsonl", "outputs/quickstart/data/library_eval.jsonl"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@every_page
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)
    for address in re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", text):
        generated = "reference/" in address  # _site/reference.py writes these
        assert "://" in address or generated or (page.parent / address).exists(), address


@every_page
def test_commands_exist(page: Path, folder: None):
    for words, _ in commands(page):
        try:
            wrong = problem(words)
        except (SystemExit, ValueError) as error:
            wrong = str(error)
        assert wrong is None, f"{shlex.join(words)}: {wrong}"


def test_most_commands_are_found_and_wrong_ones_noticed(folder: None):
    assert sum(len(commands(page)) for page in PAGES) >= 25
    assert problem(["make", "quickstrat"]) == "no target quickstrat"
    assert problem(["foundry-ext", "plan", "yamls/none.yaml"]) == "no file yamls/none.yaml"
    with pytest.raises(SystemExit):
        problem(["foundry-ext", "plan", "yamls/smollm2_lora.yaml", "--no-such-option"])
    with pytest.raises(ValueError, match="sise"):
        problem(["composer", "train.py", "yamls/smollm2_lora.yaml", "variables.sise=360m"])


@pytest.mark.more
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = foreign_references(page.read_text("utf-8"))
        assert not [address for address in loaded if "//" in address], page
        # Without these two the search waits forever in a page that is opened from the folder.
        assert any(address.endswith("_site/iframe-worker.js") for address in loaded), page
    assert (tmp_path / "search/search_index.js").is_file()
    written = (tmp_path / "reference/cli.html").read_text("utf-8")
    for name in COMMANDS:
        assert f"usage: foundry-ext {name}" in written
