"""The environment of a run, as its record describes it."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from foundry_ext.utils.environment import (
    describe_environment,
    device_name,
    git_state,
    package_versions,
    peak_memory,
)


@pytest.fixture
def repository(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "foundry_ext").mkdir()
    (tmp_path / "foundry_ext" / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path, git("rev-parse", "HEAD").strip()


def test_commit_and_whether_the_code_is_that_commit_s(repository):
    root, commit = repository
    assert git_state(root) == (commit, False)
    (root / "notes.txt").touch()  # not code
    assert git_state(root) == (commit, False)
    (root / "foundry_ext" / "b.py").touch()
    assert git_state(root) == (commit, True)
    (root / "foundry_ext" / "b.py").unlink()
    (root / "foundry_ext" / "a.py").write_text("a = 2\n")
    assert git_state(root) == (commit, True)


def test_an_installed_copy_claims_no_commit(repository):
    """Even inside another repository, as a virtual environment may be."""
    root, _ = repository
    assert git_state(root / "foundry_ext") == (None, None)


def test_the_description():
    found = describe_environment(device_kind="cpu", world_size=2)
    assert found["packages"]["torch"] == version("torch") and found["world_size"] == 2
    assert set(found["packages"]) == set(package_versions())
    assert found["device"] == device_name("cpu") != ""
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_peak_memory_is_in_bytes():
    block = b"x" * (64 << 20)
    assert len(block) < peak_memory("cpu") < 1e12


def test_no_torch_is_needed_on_a_cpu():
    code = (
        "import sys, foundry_ext.utils.environment as e; e.describe_environment(device_kind='cpu',"
    )
    code += " world_size=1); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
