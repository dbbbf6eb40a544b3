"""Which settings decide a result, which values are equal, and what docs/what-decides.md lists."""

import re
from pathlib import Path

import pytest

from foundry_ext.records.result_settings import (
    _TABLE,
    Effect,
    Saved,
    digest_settings,
    effect_of,
    find_changes,
    result_settings,
)

LOADER = re.compile(r"(train_loader|eval_loader|callbacks\.forgetting\.sets\.\*\.loader)\.")
PAGE = Path(__file__).parents[2] / "docs/what-decides.md"


def changes(one, other, defaults=(None, None)) -> list[str]:
    """Return the changes between two YAMLs, each with the defaults of its version."""
    sides = (
        Saved(digest_settings(result_settings(config)), known or {})
        for config, known in zip((one, other), defaults, strict=True)
    )
    return [str(change) for change in find_changes(*sides)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"optimizer": {"weight_decay": 0.0}}, {"optimizer": {"weight_decay": 0}}),
        ({"optimizer": {"lr": 1e-3}}, {"optimizer": {"lr": 0.001}}),
        ({"optimizer": {"betas": (0.9, 0.95)}}, {"optimizer": {"betas": [0.9, 0.95]}}),
        ({"optimizer": {"betas": [1, 0]}}, {"optimizer": {"betas": [1.0, 0.0]}}),
        ({"optimizer": {"lr": 1, "eps": 2}}, {"optimizer": {"eps": 2, "lr": 1}}),
        ({"optimizer": {"x": [{"a": 1, "b": 2}]}}, {"optimizer": {"x": [{"b": 2.0, "a": 1.0}]}}),
        ({"tp_config": None}, {}),
        ({"algorithms": {}}, {}),
        ({"algorithms": None}, {}),
        ({"callbacks": {"x": None}}, {"callbacks": {"x": {}}}),
        ({"model": {"config_overrides": {}}}, {"model": {}}),
        ({"scheduler": {"t_warmup": "2ba"}}, {"scheduler": {"t_warmup": "2 BA"}}),
        ({"eval_interval": 1}, {"eval_interval": "1ep"}),
        ({"max_duration": "1e3ba"}, {"max_duration": "1000ba"}),
        ({"eval_loader": [{"label": "a", "n": 1}]}, {"eval_loaders": [{"label": "a", "n": 1}]}),
        (
            {"model": {"peft_config": {"target_modules": ["q_proj", "v_proj"]}}},
            {"model": {"peft_config": {"target_modules": ["v_proj", "q_proj"]}}},
        ),
    ],
)
def test_equal_values_are_equal(one, other):
    assert changes(one, other) == changes(other, one) == []


@pytest.mark.parametrize(
    ("one", "other", "key"),
    [
        ({"optimizer": {"x": 1}}, {"optimizer": {"x": True}}, "optimizer.x"),
        ({"optimizer": {"x": 0}}, {"optimizer": {"x": False}}, "optimizer.x"),
        ({"optimizer": {"x": "1"}}, {"optimizer": {"x": 1}}, "optimizer.x"),
        ({"optimizer": {"betas": [0.9, 0.95]}}, {"optimizer": {"betas": [0.95, 0.9]}}, "optimizer"),
        ({"seed": 2**60}, {"seed": 2**60 + 1}, "seed"),
        ({"algorithms": {"alibi": {}}}, {}, "algorithms.alibi"),
        ({"callbacks": {"x": {}}}, {"callbacks": {"y": {}}}, "callbacks.x"),
        ({"model": {"peft_config": {"r": 8}}}, {"model": {}}, "model.peft_config.r"),
        ({"scheduler": {"t_warmup": "2ba"}}, {"scheduler": {"t_warmup": "2ep"}}, "scheduler.t_wa"),
        ({"unheard_of": 1}, {}, "unheard_of"),
    ],
)
def test_other_values_differ(one, other, key):
    for found in (changes(one, other), changes(other, one)):
        assert found and found[0].startswith(key)


def test_an_absent_key_has_the_default_of_the_version_that_wrote_it():
    given, left_out = {"optimizer": {"eps": 1e-8}}, {"optimizer": {}}
    default, other = {"optimizer.eps": 1e-08}, {"optimizer.eps": 1e-6}
    assert changes(left_out, given, (default, default)) == []
    assert changes(given, left_out, (default, default)) == []
    assert changes(left_out, given, (other, default)) == ["optimizer.eps: None, now 1e-08"]
    # The version that wrote it did not know the key.
    assert changes(left_out, given, ({}, default)) == []
    # Nobody edited anything, but this version would train otherwise.
    assert changes(left_out, left_out, (default, other)) == ["optimizer.eps: 1e-08, now 1e-06"]


def test_a_checkpoint_of_the_first_format_knows_a_few_keys_only():
    before = Saved(digest_settings({"seed": 17, "optimizer.lr": 0.1}), None)
    now = {
        **{"seed": 17, "optimizer": {"lr": 0.2, "eps": 1e-8}, "train_loader": {"drop_last": True}},
        **{"callbacks": {"x": {"y": 1}}, "algorithms": {"z": {}}, "model": {"compile": "layers"}},
    }
    saved = Saved(digest_settings(result_settings(now)), {"optimizer.eps": 1e-8})
    assert list(map(str, find_changes(before, saved))) == ["optimizer.lr: 0.1, now 0.2"]


def test_an_optional_section_is_one_change():
    loader = {"name": "packed_text", "dataset": {"hf_name": "a.jsonl"}, "drop_last": False}
    assert changes({}, {"eval_loader": loader}) == ["eval_loader: None, now given"]
    two = [{**loader, "label": label} for label in ("a", "b")]
    (change,) = changes({"eval_loader": two}, {"eval_loader": two[:1]})
    assert change == "eval_loader[b]: given, now None"
    for key in ("eval_loader", "eval_loader[b]"):
        assert effect_of(key) is Effect.ANNOUNCED
    assert effect_of("eval_loader[b].drop_last") is Effect.DECIDES
    assert effect_of("eval_loader[b].dataset.hf_name") is Effect.CONTENT


def test_secrets_are_neither_stored_nor_compared():
    hidden = {"model": {"use_auth_token": "x"}, "loggers": {"wandb": {"api_key": "hunter2"}}}
    assert "x" not in str(digest_settings(result_settings(hidden)).values())
    assert changes(hidden, {**hidden, "loggers": {"wandb": {"api_key": "other"}}}) == []


def test_the_page_lists_what_may_change():
    """Its table has a row per effect, with the keys in backticks."""
    rows = dict(re.findall(r"^\| \*\*(.+?)\*\* \|.*?\|(.*)\|$", PAGE.read_text(), re.MULTILINE))
    for effect in (Effect.SAME_BITS, Effect.ROUNDING, Effect.ANNOUNCED):
        listed = re.findall(r"`([^`]+)`", rows[effect.value])
        keys = {LOADER.sub("LOADER.", key) for key in _TABLE[effect]}
        assert sorted(listed) == sorted(keys), effect
