"""Durations and the scheduler's times, which Composer compares late or not at all."""

import math
import re

import pytest

from foundry_ext.config import times
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


TIMES = [
    *("3ep", "100ba", "1_000tok", "3e4tok", "9sp", "0.1dur", "2dur", "10iter", "45sec", "1SEC"),
    *(" 5ba", "5 ba", "1.0ba", "1h", "1h30m", "30m", "45s", "1h1s", "23h59m59s", "0h", "007m"),
    *("90s", "90m", "24h", "1H", "1s1h", "1h 30m", "-1h", "1d", "0.5ep", "1e400ba", "infba"),
    *("-1ba", "0x10ba", "ba", "", "long", "1xx", "60s", "2m90s", "1e3s", 3, 0, 2.0, True, [1]),
]


@pytest.mark.parametrize("value", TIMES, ids=repr)
def test_a_time_is_what_composer_takes(value):
    """Text without a unit is an exception: Composer reads "5" as 50 seconds and "" as none."""
    from composer.core import Time, TimeUnit

    ours = times.parse(value)
    try:
        theirs = Time.from_input(value, TimeUnit.EPOCH)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        theirs = None
    if value in ("", True) or theirs is None:
        assert ours is None
    else:
        assert ours == times.Time(theirs.value, theirs.unit.value)


def test_other_numbers_are_no_times():
    for value in ("5", "nandur", "infdur", None, math.nan):
        assert times.parse(value) is None


@pytest.mark.parametrize("value", ["1h", "1h30m", "45s", "90sec", "3ep", "0.5dur", 3])
@pytest.mark.parametrize("key", ["save_interval", "eval_interval", "callbacks.hf_checkpointer"])
def test_intervals_may_be_of_the_clock(key, value):
    config = {key: value}
    if key.startswith("callbacks"):
        config = {"callbacks": {"hf_checkpointer": {"save_interval": value}}}
    assert find_fault(config) is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"max_duration": "30m"}, "max_duration, '30m', is a time of the clock"),
        (
            {"max_duration": "90s"},
            "max_duration, '90s', is a time of the clock",
        ),
        ({"save_interval": "90m"}, "save_interval, '90m', .* write 5400sec"),
        ({"save_interval": "24h"}, "write 86400sec"),
        ({"max_duration": "45sec"}, "is a time of the clock.* such as 100ba"),
        ({"max_duration": "0.5dur"}, "max_duration, '0.5dur', is a part of itself"),
        ({"max_duration": "9iter"}, "would never end"),
        ({"scheduler": {"t_warmup": "1h"}}, "scheduler.t_warmup, '1h', is a time of the clock"),
        ({"scheduler": {"t_max": "9sec"}}, "scheduler.t_max, '9sec', is a time of the clock"),
        ({"scheduler": {"t_warmup": 100}}, "t_warmup, 100, has no unit; write 100ba"),
        ({"console_log_interval": "x"}, "console_log_interval, 'x', must be a time"),
        ({"callbacks": {"generate_callback": {"interval": "1xx"}}}, "generate_callback.interval"),
        ({"eval_interval": "0h", "save_interval": "0m", "save_folder": "x"}, "saves nothing"),
        ({"scheduler": {"alpha_f": math.nan}}, "scheduler.alpha_f, nan, must be finite"),
        ({"scheduler": {"alpha_f": -0.1}}, "scheduler.alpha_f, -0.1, must be a number from 0 on"),
        ({"callbacks": {"guard": {"spike_factor": math.inf}}}, "callbacks.guard.spike_factor, inf"),
        ({"variables": {"rates": [0.1, math.nan]}}, r"variables.rates\[1\], nan"),
        *(
            ({"algorithms": {"gradient_clipping": {"clipping_threshold": value}}}, "number above 0")
            for value in (-1, 0, 0.0, True, "1")
        ),
        *(
            ({"optimizer": {"param_groups": [{"lr": 0.1}, group]}}, rf"param_groups\[1\]\.{key}")
            for key, group in {
                "lr": {"lr": -1},
                "weight_decay": {"weight_decay": -0.1},
                "eps": {"eps": "x"},
                r"betas\[0\]": {"betas": [1.5, 0.9]},
            }.items()
        ),
        ({"optimizer": {"weight_decay": -1.0}}, "optimizer.weight_decay, -1.0, must be a number"),
        ({"optimizer": {"betas": [0.9, -0.1]}}, r"optimizer.betas\[1\], -0.1"),
    ],
    ids=repr,
)
def test_what_cannot_train_is_refused(config, says):
    fault = find_fault(config)
    assert fault is not None and re.search(says, fault), fault


def test_what_can_train_is_not_refused():
    optimizer = {"lr": 0, "weight_decay": 0.0, "betas": [0, 0.99], "eps": 1e-8}
    groups = [{"param_str_match": "lora_B", "lr": 1e-3}]
    config = {
        "optimizer": {**optimizer, "param_groups": groups},
        "scheduler": {"alpha_f": 0, "alpha_i": 2.0, "t_warmup": "0ba"},
        "algorithms": {"gradient_clipping": {"clipping_threshold": 1}},
        "max_duration": "9iter",
        "callbacks": {"curriculum_learning": {}},
    }
    assert find_fault(config) is None


def test_an_interval_in_iterations_is_a_warning():
    warning = find_warning({"save_interval": "2iter", "max_duration": "9ba"})
    assert warning is not None and warning.startswith("save_interval, '2iter', comes only at")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            {"streams": {"my": {"local": "x", "split": "train"}}},
            "streams my, is .* eval_interval: 0",
        ),
        ({"local": "x", "split": "train"}, "'x', is what .* eval_interval: 0"),
        ({"hf_name": "x", "split": "train"}, "'x', is what .* holdout"),
    ],
)
def test_evaluation_on_the_training_data_is_refused_with_a_way_out_that_works(source, says):
    loader = {"name": "packed_finetuning", "dataset": source}
    config = {"train_loader": loader, "eval_loader": loader}
    fault = find_fault({**config, "eval_interval": "500ba"})
    assert fault is not None and re.search(says, fault), fault
    assert ("holdout" in fault) == ("hf_name" in source)
    for interval in (0, "0ba"):
        assert find_fault({**config, "eval_interval": interval}) is None
        assert find_fault({**config, "eval_interval": interval, "eval_first": True}) is not None
