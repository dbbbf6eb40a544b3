"""Durations and the scheduler's times, which Composer compares late or not at all."""

import pytest

from foundry_ext.config.values import find_fault, find_warning

INVERSE_ROOT = {
    "name": "inv_sqrt_with_warmup",
    "t_warmup": "250_000tok",
    "t_scale": "250_000tok",
    "t_cooldown": "2_500_000tok",
}


@pytest.mark.parametrize(
    ("duration", "changes", "key"),
    [
        ("25_000_000tok", {}, None),
        ("4ba", {}, "scheduler.t_warmup"),
        ("3ep", {}, "scheduler.t_warmup"),
        (3, {"t_warmup": "1ep", "t_scale": "1ep", "t_cooldown": 1}, None),
        ("4ba", {"t_warmup": "1ba", "t_scale": "1ba"}, "scheduler.t_cooldown"),
        ("4ba", {"name": "cosine_with_warmup"}, None),
    ],
)
def test_a_scheduler_that_needs_one_unit_is_told_before_the_imports(duration, changes, key):
    fault = find_fault({"max_duration": duration, "scheduler": {**INVERSE_ROOT, **changes}})
    if key is None:
        assert fault is None
    else:
        value = (INVERSE_ROOT | changes)[key.removeprefix("scheduler.")]
        assert fault and fault.startswith(f"{key}, {value!r}, must have the unit of max_duration")


def test_a_loss_that_is_not_weighed_by_tokens_is_refused():
    """It would depend on the microbatches (trap 5)."""
    key = "accumulate_train_batch_on_tokens"
    for loader in ("packed_finetuning", "packed_text", "text"):
        config = {"train_loader": {"name": loader, "dataset": {"hf_name": "a.jsonl"}}}
        faults = [find_fault({**config, key: value}) for value in (False, None, True)]
        refused = [fault is not None and fault.startswith(f"{key}, ") for fault in faults]
        assert refused == ([False] * 3 if loader == "text" else [True, True, False])
        assert find_fault(config) is None


@pytest.mark.parametrize(
    ("warmup", "duration", "warns"),
    [
        ("250_000tok", "20_000tok", True),
        ("10ba", "10ba", True),
        ("9ba", "10ba", False),
        ("2ep", 2, True),
        ("0.1dur", "4ba", False),
        ("10ba", "1ep", False),  # the data decides
        (None, "1ep", False),
    ],
)
def test_a_warm_up_that_outlasts_the_run_is_a_warning(warmup, duration, warns):
    warning = find_warning({"max_duration": duration, "scheduler": {"t_warmup": warmup}})
    assert (warning is not None) == warns
    assert not warns or (str(warmup) in warning and str(duration) in warning)
