"""The files around the code: what is installed, locked and registered."""

import re
import tomllib
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import foundry_ext

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = [
    (group, name, target)
    for group, entries in PROJECT["entry-points"].items()
    for name, target in entries.items()
]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    return {normal(name): pinned for name, _, pinned in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS)
def test_entry_points_resolve(group: str, name: str, target: str):
    found = entry_points(group=group, name=name)
    assert {point.value for point in found} == {target}, "installed otherwise; run `make install`"
    assert callable(next(iter(found)).load())


def test_the_lock_pins_every_line_and_names_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^-| @ |foundry[-_]ext==|\.whl", text, re.MULTILINE)
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line


def test_the_lock_agrees_with_pyproject():
    pins = locked()
    assert int(pins["setuptools"].split(".")[0]) < 82
    assert f"llm-foundry[peft]=={pins['llm-foundry']}" in PROJECT["dependencies"]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in wanted:
        assert normal(re.split(r"[\[<>=]", requirement)[0]) in pins, requirement


def test_the_installed_packages_are_the_locked_ones():
    pins = locked()
    for name in ("llm-foundry", "mosaicml", "peft", "setuptools", "torch", "transformers"):
        assert version(name) == pins[name], f"{name} is not as locked; run `make install`"


def test_one_version_everywhere():
    assert PROJECT["version"] == foundry_ext.__version__ == version("foundry-ext")
    assert "llm-foundry[peft]==0.22.0" in (requires("foundry-ext") or [])


def test_one_lock_and_one_licence():
    assert not (ROOT / "uv.lock").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
