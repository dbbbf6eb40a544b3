"""Pytest plugin for the tests marked `gpu`: each one's values are emulated on the null GPU.

python -m tests.nullgpu.kit "RTX 3090" python -m pytest -m gpu -p tests.nullgpu.gpu_tests ...
"""

import pytest

from tests.nullgpu.emulate import Emulate


@pytest.fixture(autouse=True)
def emulated():
    with Emulate():
        yield
