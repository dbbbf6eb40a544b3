"""A folder for sweeps whose fork server imports nothing; test_runner.py has another one."""

from pathlib import Path

import pytest

from foundry_ext.sweeps.fork_launcher import ForkLauncher
from tests.sweeps.kit import LIGHT, enter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "preloaded.py").write_text(LIGHT)
    monkeypatch.setattr(ForkLauncher, "PRELOAD", "preloaded")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return enter(tmp_path, monkeypatch)
