"""A pair of equal models for every test."""

import pytest

from tests.preflight.parity.kit import random_pair


@pytest.fixture
def pair():
    return random_pair()
