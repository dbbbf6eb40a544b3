"""A sweep of four methods to compare, generated once."""

from pathlib import Path

import pytest

from foundry_ext.comparison.comparison import Comparison, compare_runs
from foundry_ext.comparison.runs import load_runs
from tests.comparison import records


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep of four methods with three learning rates each, the best with three seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    records.write_sweep(folder)
    return folder


@pytest.fixture(scope="session")
def comparison(sweep: Path) -> Comparison:
    return compare_runs(load_runs([str(sweep)]))
