"""A record with any JSON value at any key is compared, or refused in a line that names its file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.report.report import caveats
from foundry_ext.comparison.runs import load_runs
from foundry_ext.records.record import read_items, read_record
from tests.comparison.records import write_run

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400), 2**99, "2026-01-01", "../a", 1e308]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "full", 1e-3, 17, num_items=2)
    write_run(folder, "lora", 1e-2, 17, num_items=2)
    return folder


def edited(data: st.DataObject, node: Any) -> Any:
    """Return a copy with another value at a key, chosen level by level."""
    node = copy.deepcopy(node)
    at = node
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            at[key] = data.draw(VALUES)
            return node
        at = at[key]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_at_any_key(runs: Path, data: st.DataObject):
    (path,) = runs.glob("lora*/record.json")
    original = path.read_text()
    try:
        path.write_text(json.dumps(edited(data, json.loads(original))))
        try:
            caveats(compare_runs(load_runs([str(runs)])))
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 3000
            try:
                read_record(path)
            except ValueError as refused:
                assert str(refused) == message and message.startswith(f"{path}: ")
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 10**400),
        ("steps", -1),
        ("seed", -3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", -1e-4),
        ("learning_rate", 10**400),
        ("started", "2026-11-26T10:00:00"),
        ("ended", "yesterday"),
        ("updated", ""),
        ("time.wall_seconds", float("nan")),
        ("time.train_seconds", -0.5),
        ("tokens.real", 10**400),
        ("model.parameters", -1),
        ("data.train.counts.kept", 10**400),
        ("evaluations.0.step", 10**400),
        ("environment.world_size", 10**400),
        ("config.seed", 10**400),
        ("peak_memory_bytes", 10**400),
    ],
)
def test_values_out_of_range_are_named(runs: Path, tmp_path: Path, key: str, value: Any):
    (path,) = runs.glob("lora*/record.json")
    record = json.loads(path.read_text())
    *above, last = key.split(".")
    node = record
    for name in above:
        node = node[int(name)] if name.isdigit() else node[name]
    node[last] = value
    edited = tmp_path / "record.json"
    edited.write_text(json.dumps(record))
    with pytest.raises(ValueError) as raised:
        read_record(edited)
    message = str(raised.value)
    assert message.startswith(f"{edited}: {key.split('.')[0]}") and "\n" not in message
    assert last in message and len(message) < 1000


@pytest.mark.parametrize(
    ("key", "value"), [("loss", 10**400), ("step", 10**400), ("step", 0.5), ("step", True)]
)
def test_items_out_of_range_are_named(tmp_path: Path, key: str, value: Any):
    path = tmp_path / "items.jsonl"
    item = {"step": 0, "set": "target", "item": "0", "loss": 1.0}
    path.write_text(json.dumps(item) + "\n" + json.dumps({**item, key: value}) + "\n")
    with pytest.raises(ValueError, match=rf"items\.jsonl, line 2: .*{key}"):
        read_items(path)
