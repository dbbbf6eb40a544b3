"""`make matrix`: the lock's packages, those without a wheel, and Pythons that are not here."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.pyproject import ROOT

# Stands in for uv: refuses the first package that has no wheel, else lists all.
UV = """#!{python}
import sys
lines = open(sys.argv[sys.argv.index("-r") + 1])
names = [line.partition("==")[0] for line in lines if "==" in line]
for name in ("wheelless", "sentence-pieces"):
    if name in names:
        sys.exit(f"cause: Because {{name}}==1.0 has no usable\\n  wheels and you require {{name}}")
if "nowhere" in names:
    sys.exit("cause: nowhere==1.0 was not found")
print("".join(f" + {{name}}==1.0\\n" for name in names), file=sys.stderr)
"""


@pytest.fixture
def matrix(tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.UV = tmp_path / "uv"  # type: ignore[attr-defined]
    module.UV.write_text(UV.format(python=sys.executable), encoding="utf-8")
    module.UV.chmod(0o755)
    return module


def write_lock(folder: Path, *names: str) -> Path:
    entries = "".join(f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64}\n" for name in names)
    lock = folder / "requirements.lock"
    lock.write_text(f"# A comment with a package==2.0\n{entries}", encoding="utf-8")
    return lock


def test_every_package_of_the_lock_is_asked_for_with_its_hashes(matrix: ModuleType):
    entries = list(matrix.entries(matrix.LOCK))
    text = matrix.LOCK.read_text(encoding="utf-8")
    assert len(entries) == len(re.findall(r"^[a-z].*==", text, re.MULTILINE)) > 250
    assert sum(entry.count("--hash=sha256:") for entry in entries) == text.count("--hash=sha256:")


def test_packages_without_a_wheel_are_named_and_counted(matrix: ModuleType, tmp_path: Path):
    lock = write_lock(tmp_path, "first", "wheelless", "last", "sentence-pieces")
    found = matrix.resolve("3.13", "aarch64-apple-darwin", lock)
    assert found.compiled == ["wheelless", "sentence-pieces"]
    assert set(found.packages) == {"first", "last", "wheelless", "sentence-pieces"}
    assert matrix.describe(found) == "4 packages; a compiler for wheelless, sentence-pieces"


def test_a_package_that_is_nowhere_is_an_error(matrix: ModuleType, tmp_path: Path):
    lock = write_lock(tmp_path, "first", "nowhere")
    with pytest.raises(SystemExit, match=r"Python 3\.12 on x cannot install .*nowhere==1\.0"):
        matrix.resolve("3.12", "x", lock)


def test_a_shim_without_its_python_is_passed_over(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shim = tmp_path / "shims" / "python3.99"
    real = tmp_path / "pyenv" / "versions" / "3.99.1" / "bin" / "python"
    for path in (shim, real):
        path.parent.mkdir(parents=True)
    shim.write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert matrix.find_python("3.99") is None
    real.symlink_to(sys.executable)
    assert matrix.find_python("3.99") == str(real)
