"""The way out that is named when a GPU runs out of memory."""

import re

import pytest

from foundry_ext.launch import failures


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("tokens", "longest", "packs", "fits", "expected"),
    [
        (8192, 1024, 1, None, "8192; try 4096, and global_train_batch_size 8 "),
        (8192, 1024, 1, 2100, "8192; try 2048, and global_train_batch_size 16 "),
        (8192, 1024, 1, 9000, "8192; try 4096, and global_train_batch_size 8 "),
        (8192, 1024, 1, 900, "up to max_seq_len 1024; .* pack_tokens and max_seq_len to 512;"),
        (4096, 2048, 1, 1500, "up to max_seq_len 2048; .* pack_tokens and max_seq_len to 1024;"),
        (2048, 2048, 1, 0, "up to max_seq_len 2048; .* pack_tokens and max_seq_len to 2;"),
        (
            8192,
            1024,
            4,
            None,
            "set device_train_microbatch_size to 1 and, if .*pack_tokens to 4096",
        ),
        (
            8192,
            1024,
            4,
            8192,
            "set device_train_microbatch_size to 1 and, if .*pack_tokens to 4096",
        ),
        (8192, 1024, 4, 5000, "device_train_microbatch_size to 1 and train.*pack_tokens to 4096, "),
        (8192, 1024, 4, 900, "pack_tokens and max_seq_len to 512;"),
    ],
)
def test_the_way_out(monkeypatch, tokens, longest, packs, fits, expected):
    monkeypatch.setattr(failures, "_most_that_fit", lambda _config: fits)
    dataset = {"pack_tokens": tokens, "max_seq_len": longest}
    config = {
        "max_seq_len": longest,
        "train_loader": {"dataset": dataset},
        "device_train_microbatch_size": packs,
        "global_train_batch_size": 4,
    }
    said = failures.explain(OutOfMemoryError("CUDA out of memory"), config)
    assert said and re.search(expected, said), said


def test_a_sharded_model_has_no_estimate():
    assert failures._most_that_fit({"fsdp_config": {"sharding_strategy": "FULL_SHARD"}}) is None
