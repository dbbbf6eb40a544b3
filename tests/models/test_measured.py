"""The choice of attention on a CPU by measurement: remembered, repeatable, without side effects."""

import json
import time

import pytest
import torch

from foundry_ext.models import attention, measured
from foundry_ext.utils.constants import CPU_ATTENTION

FP32 = torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Measure, in an empty cache folder."""
    monkeypatch.delenv(CPU_ATTENTION)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LENGTHS", ((2, 3),))
    return tmp_path / "foundry_ext"


def slow(q, k, v, cu_seqlens, max_seqlen):
    time.sleep(0.01)
    return fast(q, k, v, cu_seqlens, max_seqlen)


def fast(q, k, v, cu_seqlens, max_seqlen):
    return q * k.sum() * v.sum()


def never(*_):
    raise AssertionError("measured again")


def test_the_fastest_is_chosen_and_remembered(cache):
    assert measured.fastest({"slow": slow, "fast": fast}, FP32) == "fast"
    [file] = cache.iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["fastest"], content["threads"]) == ("fast", torch.get_num_threads())
    assert content["seconds"]["slow"] > content["seconds"]["fast"] > 0
    assert measured.fastest({"slow": never, "fast": never}, FP32) == "fast"


def test_a_dtype_a_number_of_threads_and_a_torch_have_choices_of_their_own(cache, monkeypatch):
    measured.fastest({"fast": fast}, FP32)
    measured.fastest({"fast": fast}, torch.bfloat16)
    monkeypatch.setattr(measured.torch, "get_num_threads", lambda: 77)
    measured.fastest({"fast": fast}, FP32)
    monkeypatch.setattr(measured.torch, "__version__", "9.9")
    measured.fastest({"fast": fast}, FP32)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"fastest": 1}', b'{"fastest": "x"}', b"\xff"]
)
def test_a_broken_file_is_measured_and_written_again(cache, content):
    measured.fastest({"fast": fast}, FP32)
    [file] = cache.iterdir()
    file.write_bytes(content)
    assert measured.fastest({"fast": fast, "slow": slow}, FP32) == "fast"
    assert json.loads(file.read_text(encoding="utf-8"))["fastest"] == "fast"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured.fastest({"fast": fast}, FP32) == "fast"


def test_the_first_of_two_processes_decides_for_both(cache):
    def meanwhile(*inputs):
        measured._write(measured._file(measured._machine(FP32)), {"fastest": "slow"})
        return fast(*inputs)

    assert measured.fastest({"slow": slow, "fast": meanwhile}, FP32) == "slow"


def test_the_variable_decides(monkeypatch):
    monkeypatch.setenv(CPU_ATTENTION, "b")
    assert measured.fastest({"a": never, "b": never}, FP32) == "b"
    monkeypatch.setenv(CPU_ATTENTION, "c")
    with pytest.raises(ValueError, match=rf"{CPU_ATTENTION}: 'c' is unknown; .* a, b,"):
        measured.fastest({"a": never, "b": never}, FP32)


def test_auto_measures_wherever_it_is_first_used():
    """In an evaluation, under autocast; and it draws none of the caller's random numbers."""
    attention._best_backend.cache_clear()
    before = torch.get_rng_state()
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            chosen = attention.resolve_backend("auto", device="cpu", dtype=FP32)
    finally:
        attention._best_backend.cache_clear()
    assert chosen in attention.CPU_BACKENDS
    assert torch.equal(torch.get_rng_state(), before)
