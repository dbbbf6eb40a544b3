"""The experiment's modules, whose folder cannot be a package because of its dashes."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[3] / "experiments/smollm2-135m-gsm8k"
MODULES = ("chat", "data", "match", "prepare", "run", "weights")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Return {name: module} of the experiment."""
    monkeypatch.syspath_prepend(str(HERE))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
