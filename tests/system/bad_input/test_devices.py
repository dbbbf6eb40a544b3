"""flash-attn missing, or built for another torch.

The tests call the same function as a run on a GPU, and pretend that there is one.
"""

import importlib
import sys

import pytest
import torch

from foundry_ext.models import attention

ON_A_GPU = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def fresh_choice():
    for cached in (attention._best_backend, attention._why_not):
        cached.cache_clear()
    yield
    for cached in (attention._best_backend, attention._why_not):
        cached.cache_clear()


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Make a flash-attn that is installed but cannot be loaded."""
    (tmp_path / "flash_attn").mkdir()
    text = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error')\n"
    (tmp_path / "flash_attn" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_absent():
    with pytest.raises(ValueError, match="'flash_attn' is not installed; use 'torch_varlen'"):
        attention.resolve_backend("flash_attn", **ON_A_GPU)
    assert attention.resolve_backend("auto", **ON_A_GPU) == "torch_varlen"


def test_built_for_another_torch(broken):
    with pytest.raises(ValueError) as raised:
        attention.resolve_backend("flash_attn", **ON_A_GPU)
    message = str(raised.value)
    assert f"'flash_attn' was not built for torch {torch.__version__}" in message
    assert "undefined symbol" in message
    assert "pip install --no-deps" in message and "or use 'torch_varlen'" in message


def test_auto_says_why_it_takes_another(broken, caplog):
    assert attention.resolve_backend("auto", **ON_A_GPU) == "torch_varlen"
    assert "'flash_attn' was not built for torch" in caplog.text
