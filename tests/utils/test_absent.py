"""Settings that do not apply are left out; settings of users stay."""

import copy

import pytest

from foundry_ext.utils.absent import dataset_settings, present_sets, run_settings, without_nulls

DATASET = {"hf_name": "a/b", "hf_kwargs": {"name": None}, "holdout": {"part": "eval", "by": None}}
URL = {"part": "train", "by": "url", "fraction": 0.1}
SETS = {
    "target": {"type": "documents", "loader": {"name": "packed_text", "dataset": DATASET}},
    "streams": {"type": "documents", "loader": {"dataset": {"streams": {"a": {}}}}},
    "mixed": {"type": "documents", "loader": {"dataset": {"hf_name": None, "datasets": [1]}}},
    "gone": {"type": "documents", "loader": {"dataset": {"hf_name": None}}},
    "task": {"type": "multiple_choice", "path": "task.jsonl"},
    "no task": {"type": "multiple_choice", "path": None, "max_items": 3},
    "unset": None,
    "wrong": 3,
    "of no loader": {"type": "documents", "loader": None},
}


def test_nulls_are_left_out_and_empty_mappings_that_were_given_stay():
    given = {"a": None, "b": {"c": None}, "d": {}, "e": [None, {"f": None}], "g": 0, "h": False}
    assert without_nulls(given) == {"d": {}, "e": [None, {}], "g": 0, "h": False}


@pytest.mark.parametrize(
    ("holdout", "kept"),
    [
        ({"part": "train", "by": None, "fraction": None}, {}),
        (URL, {"holdout": URL}),
        # Two mistakes, which the loader names.
        (
            {"part": "train", "by": None, "fraction": 0.1},
            {"holdout": {"part": "train", "fraction": 0.1}},
        ),
        ({"part": "train"}, {"holdout": {"part": "train"}}),
        ({}, {"holdout": {}}),
        (None, {}),
    ],
)
def test_a_holdout_by_no_column_is_none(holdout, kept):
    found = dataset_settings({"hf_name": "a/b", "holdout": holdout})
    assert found == {"hf_name": "a/b", **kept}


def test_a_set_with_nothing_to_read_is_left_out():
    found = present_sets(SETS)
    assert list(found) == ["target", "streams", "mixed", "task", "wrong", "of no loader"]
    assert found["target"]["loader"] == {"name": "packed_text", "dataset": {"hf_name": "a/b"}}


def test_a_run_keeps_its_variables_and_what_it_was_given():
    config = {
        "variables": {"train_path": None},
        "model": {"name": "smollm2_packed", "activation_checkpointing": None},
        "train_loader": {"name": "packed_text", "dataset": DATASET},
        "eval_loader": [{"label": "a", "dataset": DATASET}],
        "callbacks": {"forgetting": {"sets": SETS}, "lr_monitor": None},
        "load_path": None,
    }
    before = copy.deepcopy(config)
    found = run_settings(config)
    assert config == before
    assert found["variables"] == {"train_path": None} and found["load_path"] is None
    assert found["model"] == {"name": "smollm2_packed"}
    assert found["train_loader"]["dataset"] == found["eval_loader"][0]["dataset"]
    assert found["train_loader"]["dataset"] == {"hf_name": "a/b"}
    assert "no task" not in found["callbacks"]["forgetting"]["sets"]
    assert found["callbacks"]["lr_monitor"] is None
    assert run_settings(found) == found
    assert run_settings({"callbacks": None, "train_loader": None, "model": 3}) == {
        "callbacks": None,
        "train_loader": None,
        "model": 3,
    }
