"""Project files around the code: installation, locks and entry points."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import foundry_ext
from tests.pyproject import PYPROJECT

ROOT = Path(__file__).parents[1]
PROJECT = PYPROJECT["project"]
ENTRY_POINTS = [
    (group, name, target)
    for group, entries in PROJECT["entry-points"].items()
    for name, target in entries.items()
]
FILES = ("requirements.lock", "requirements-current.txt")
# Where packages come from is the reader's own pip's business; no machine's index is anyone else's.
INDEX = r"index[-_]url|find[-_]links|trusted[-_]host|/simple\b|/whl\b"


def entries(file: str) -> list[Requirement]:
    """Return all lines of a lock, of every Python and platform, without their hashes."""
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line.rstrip("\\ ")) for line in lines if re.match(r"[A-Za-z0-9]", line)]


def locked(file: str = "requirements.lock") -> dict[str, str]:
    """Return the versions that a lock has for this Python and platform."""
    chosen = [one for one in entries(file) if one.marker is None or one.marker.evaluate()]
    return {normal(one.name): str(one.specifier).removeprefix("==") for one in chosen}


def this_world() -> dict[str, str]:
    """Return the pins of the environment that runs the tests: the lock's or the current world's."""
    pins, current = locked(), locked("requirements-current.txt")
    return current if version("torch") == current["torch"] else pins


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS)
def test_entry_points_resolve(group: str, name: str, target: str):
    found = entry_points(group=group, name=name)
    assert {point.value for point in found} == {target}, "installed otherwise; run `make install`"
    assert callable(next(iter(found)).load())


@pytest.mark.parametrize("file", FILES)
def test_a_lock_pins_and_hashes_every_package_and_names_no_address(file: str):
    text = (ROOT / file).read_text()
    assert not re.search(r"://|^-| @ |foundry[-_]ext==|\.whl", text, re.MULTILINE)
    content = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    entry = r"[a-z0-9.-]+==[A-Za-z0-9.!+]+(?: ; [^\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(f"(?:{entry})+", content)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("file", FILES)
def test_each_python_and_platform_gets_one_version_of_each_package(file: str, python: str):
    """macOS gets neither CUDA nor Triton. `make matrix` shows what of this has wheels."""
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")):
        here = {"python_version": python, "python_full_version": f"{python}.9"}
        here |= {"sys_platform": system, "platform_machine": machine}
        here |= {"platform_system": {"linux": "Linux", "darwin": "Darwin"}[system]}
        chosen = [e for e in entries(file) if e.marker is None or e.marker.evaluate(here)]
        names = {normal(one.name) for one in chosen}
        assert len(names) == len(chosen)
        assert {"torch", "llm-foundry", "mosaicml", "peft", "wandb"} <= names
        gpu = {name for name in names if re.match("nvidia-|cuda-|triton$", name)}
        assert not gpu or system == "linux", gpu
        assert gpu or machine != "x86_64"


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


def test_the_current_world_differs_in_torch_alone():
    """Torch, torchvision and torch's own dependencies; `make lock` moves nothing else."""
    pinned, current = ({str(one) for one in entries(file)} for file in FILES)
    names = {normal(Requirement(line).name) for line in pinned ^ current}
    assert {"torch", "torchvision", "triton"} <= names
    family = r"torch|torchvision|triton|(cuda|nvidia)-[a-z0-9-]+"
    assert [name for name in names if not re.fullmatch(family, name)] == []
    overrides = re.search("^OVERRIDES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert overrides is not None and set(overrides[1].split()) <= current - pinned


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
    names = {normal(one.name) for one in entries("requirements.lock")}
    for requirement in [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]]:
        assert normal(Requirement(requirement).name) in names, requirement


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
    code = "import foundry_ext; print(foundry_ext.__file__);"
    code += "from foundry_ext.cli.main import main; raise SystemExit(main(['new', 'mine']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = partial(subprocess.run, cwd=tmp_path / "empty", env=environment, check=True)
    printed = run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.startswith(str(tmp_path / "site"))
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


def test_no_pattern_needs_python_3_11():
    """Possessive quantifiers and atomic groups of `re`, which 3.10 fails to compile on import."""
    newer = re.compile(r"(?<!\\)(?:[*+?}]\+|\(\?>)")
    assert newer.search(r"[\w.]++") and newer.search("(?>a)") and not newer.search(r"\++ c")
    for path in (ROOT / "foundry_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not newer.search(node.value), f"{path}:{node.lineno}"


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
