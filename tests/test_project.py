"""Project files around the code: installation, locks and entry points."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import foundry_ext

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = [
    (group, name, target)
    for group, entries in PROJECT["entry-points"].items()
    for name, target in entries.items()
]
FILES = ("requirements.lock", "requirements-current.txt")
# Where packages come from is the reader's own pip's business; no machine's index is anyone else's.
INDEX = r"index[-_]url|find[-_]links|trusted[-_]host|/simple\b|/whl\b"


def locked(file: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pins = [re.split("===?", line) for line in lines if not line.startswith("#")]
    return {normal(name): pinned for name, pinned in pins}


def torch_family() -> re.Pattern[str]:
    """Return the pattern of lines that the Makefile removes from the lock for `WORLD=current`."""
    [pattern] = re.findall("^FAMILY := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return re.compile(pattern)


def this_world() -> dict[str, str]:
    """Return the pins of the environment that runs the tests: the lock's or the current world's."""
    pins, overrides = locked(), locked("requirements-current.txt")
    if version("torch") != overrides["torch"]:
        return pins
    kept = {name: pin for name, pin in pins.items() if not torch_family().match(f"{name}==")}
    return kept | overrides


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS)
def test_entry_points_resolve(group: str, name: str, target: str):
    found = entry_points(group=group, name=name)
    assert {point.value for point in found} == {target}, "installed otherwise; run `make install`"
    assert callable(next(iter(found)).load())


@pytest.mark.parametrize("file", FILES)
def test_a_lock_pins_every_line_and_names_no_address(file: str):
    text = (ROOT / file).read_text()
    assert not re.search(r"://|^-| @ |foundry[-_]ext==|\.whl", text, re.MULTILINE)
    for line in text.splitlines():
        pin = r"[A-Za-z0-9._-]+===?[A-Za-z0-9.!+]+"
        assert line.startswith("#") or re.fullmatch(pin, line), line


@pytest.mark.parametrize("line", ["pip install --find-links x", "a.b/simple/", "INDEX_URL"])
def test_an_index_is_recognised(line: str):
    assert re.search(INDEX, line, re.IGNORECASE)


def test_no_file_names_a_package_index():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in names.split("\0") if (ROOT / name).is_file()]
    files.remove(Path(__file__))  # its examples
    assert ROOT / "Makefile" in files
    texts = {path: path.read_text(errors="replace") for path in files}
    assert [path for path, text in texts.items() if re.search(INDEX, text, re.IGNORECASE)] == []


def test_the_current_world_names_what_it_overrides():
    """It has only torch, torchvision and torch's own dependencies, and it replaces every line of
    the lock that the Makefile leaves out."""
    pins, overrides, family = locked(), locked("requirements-current.txt"), torch_family()
    assert all(family.match(f"{name}==") for name in overrides)
    left_out = {name for name in pins if family.match(f"{name}==")}
    assert left_out - set(overrides) == {name for name in left_out if name.endswith("-cu12")}
    assert {"torch", "torchvision", "triton"} <= left_out & set(overrides)
    changed = [name for name in left_out & set(overrides) if pins[name] == overrides[name]]
    assert changed == [], "no override: the lock says the same"


def test_torch_gets_what_it_asks_for():
    """`--no-deps` does not check torch's requirements, so this test does, for both worlds."""
    pins = this_world()
    wanted = [Requirement(line) for line in requires("torch") or []]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(pins[normal(requirement.name)]), requirement


def test_the_lock_agrees_with_pyproject():
    pins = locked()
    assert int(pins["setuptools"].split(".")[0]) < 82
    assert f"llm-foundry[peft]=={pins['llm-foundry']}" in PROJECT["dependencies"]
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() == {"gpu", "dashboard", "lm-eval", "dev", "docs"}, "is a new one locked?"
    for requirement in [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]]:
        assert normal(re.split(r"[\[<>=]", requirement)[0]) in pins, requirement


def test_the_installed_packages_are_the_locked_ones():
    pins = this_world()
    names = ("llm-foundry", "mosaicml", "peft", "setuptools", "torch", "torchvision", "triton")
    for name in (*names, "transformers"):
        assert version(name) == pins[name], f"{name} is not as locked; run `make install`"


def test_one_version_everywhere():
    assert "version" not in PROJECT, "setuptools reads it from foundry_ext/__init__.py"
    assert foundry_ext.__version__ == version("foundry-ext")
    assert "llm-foundry[peft]==0.22.0" in (requires("foundry-ext") or [])


def test_one_lock_and_one_licence():
    assert not (ROOT / "uv.lock").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"


def test_a_wheel_holds_every_file_of_the_package_and_the_yamls(tmp_path: Path):
    """This includes templates, styles and configs, which need pyproject.toml's package-data."""
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("foundry_ext", "yamls"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"foundry_ext-{foundry_ext.__version__}-py3")
    archive = zipfile.ZipFile(wheel)
    held = {name: archive.read(name) for name in archive.namelist() if "dist-info" not in name}
    expected = {}
    for folder, place in (("foundry_ext", "foundry_ext"), ("yamls", "foundry_ext/yamls")):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file():
                name = path.relative_to(tmp_path / folder).as_posix()
                expected[f"{place}/{name}"] = path.read_bytes()
    assert held.keys() == expected.keys() and held == expected
    assert {"foundry_ext/utils/templates/base.html", "foundry_ext/yamls/smollm2_lora.yaml"} <= {
        *held
    }
    archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = "from foundry_ext.cli.main import main; raise SystemExit(main(['new', 'mine']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = partial(subprocess.run, cwd=tmp_path / "empty", env=environment, check=True)
    run([sys.executable, "-c", code], capture_output=True)
    assert (tmp_path / "empty/mine/yamls/smollm2_lora.yaml").is_file()


def test_every_file_of_text_is_opened_as_utf_8():
    """And not as the locale says. ruff's PLW1514 misses paths whose type it does not know."""
    found = 0
    for folder in ("foundry_ext", "experiments", "benchmarks", ".ci"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and opens_text(node):
                    found += 1
                    names = {keyword.arg for keyword in node.keywords}
                    assert names & {"encoding", None}, f"{path}:{node.lineno}: no encoding"
    assert found > 40


def opens_text(call: ast.Call) -> bool:
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name in ("read_text", "write_text"):
        return bool(owner)  # atomic.write_text is always UTF-8
    if owner == "subprocess":
        return any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    if name != "open" or owner in ("os", "gzip"):
        return False
    modes = [*call.args[not owner : 2], *(k.value for k in call.keywords if k.arg == "mode")]
    return not any("b" in mode.value for mode in modes if isinstance(mode, ast.Constant))
