"""Fixture that ends a loader's worker processes with the test that started them."""

import pytest

from tests.data import kit


@pytest.fixture(autouse=True)
def _workers_end():
    """End workers; otherwise a loader that is collected with Composer's DataSpec hangs 10 s."""
    yield
    while kit.BUILT:
        kit.BUILT.pop().dataloader._iterator = None
