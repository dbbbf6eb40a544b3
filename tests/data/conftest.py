"""For the tests of loaders: their worker processes end with the test that started them."""

import pytest

from tests.data import kit


@pytest.fixture(autouse=True)
def _workers_end():
    """Composer's DataSpec is a cycle of references, and a loader collected with it hangs 10 s."""
    yield
    while kit.BUILT:
        kit.BUILT.pop().dataloader._iterator = None
