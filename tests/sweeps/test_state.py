"""Locks, the state file, and how a restart treats a run."""

import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foundry_ext.sweeps.plan import _measured_cost
from foundry_ext.sweeps.state import (
    RunState,
    claim,
    is_free,
    is_started_again,
    read_state,
    status_at_end,
    status_now,
    wall_seconds,
    write_state,
)
from foundry_ext.sweeps.text import target_loss


def test_a_lock_lives_as_long_as_a_child_that_inherited_it(tmp_path: Path):
    lock = claim(tmp_path / "lock")
    assert lock is not None and claim(tmp_path / "lock") is None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    os.close(lock)
    assert not is_free(tmp_path / "lock")
    os.write(write, b"x")
    os.waitpid(child, 0)
    assert is_free(tmp_path / "lock")


@pytest.mark.parametrize(
    ("status", "record", "expected"),
    [
        ("running", "finished", "finished"),  # ended after the sweep was killed
        ("running", "running", "killed"),
        ("running", "failed", "failed"),
        ("running", None, "killed"),
        ("failed", "failed", "failed"),
        ("failed", None, "failed"),
        ("stopped", "failed", "stopped"),  # by Ctrl-C, which its record calls a failure
        ("waiting", "failed", "failed"),  # started by hand
        ("waiting", "stopped", "stopped"),
        ("waiting", None, "waiting"),
        ("finished", None, "waiting"),  # its folder was removed
        ("finished", "running", "killed"),
    ],
)
def test_what_a_restart_makes_of_a_run(status: str, record: str | None, expected: str):
    assert status_now(RunState(status=status), record) == expected


def test_what_is_started_again():
    again = {s: is_started_again(s, retry_failed=False) for s in ("killed", "stopped", "failed")}
    assert again == {"killed": True, "stopped": True, "failed": False}
    assert is_started_again("failed", retry_failed=True)
    assert not is_started_again("finished", retry_failed=True)


def test_how_a_run_ended():
    assert status_at_end(0, "finished", was_stopped=False) == "finished"
    assert status_at_end(-9, "running", was_stopped=False) == "killed"
    assert status_at_end(0, "stopped", was_stopped=False) == "stopped"
    assert status_at_end(1, "failed", was_stopped=True) == "stopped"
    assert status_at_end(None, "running", was_stopped=False) == "killed"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_a_state_that_is_none_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a sweep"):
        read_state(path)
    write_state(path, "x", {"a": RunState(status="killed", attempts=2)})
    assert read_state(path) == {"a": RunState(status="killed", attempts=2)}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400), "2026-01-01", "finished"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below),
    max_leaves=4,
)
YESTERDAY = Path(__file__).parents[1] / "system/yesterday/outputs/sweeps/methods/state.json"
RUN_KEYS = [field.name for field in fields(RunState)]


@settings(max_examples=150, deadline=None)
@example("runs", {"\n": None})
@given(st.sampled_from(["schema_version", "sweep", "updated", "runs", *RUN_KEYS]), VALUES)
def test_an_edited_state_is_read_or_refused_by_file_and_key(key: str, value: object):
    content = json.loads(YESTERDAY.read_text())
    name = next(iter(content["runs"]))
    (content["runs"][name] if key in RUN_KEYS else content)[key] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.json")
        path.write_text(json.dumps(content))
        try:
            runs = read_state(path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and "\n" not in message and key in message
            return
        write_state(path, "x", runs)
        assert read_state(path) == runs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pid", 10**400),
        ("pid", -1),
        ("pid", 0),
        ("attempts", "two"),
        ("attempts", -1),
        ("seconds", float("nan")),
        ("seconds", None),
        ("exit_code", 10**400),
        ("status", ["finished"]),
        ("started", 5),
        ("error", {}),
        ("misspelt", 1),
    ],
)
def test_a_wrong_value_of_a_run_is_named(tmp_path: Path, key: str, value: object):
    content = json.loads(YESTERDAY.read_text())
    name = next(iter(content["runs"]))
    content["runs"][name][key] = value
    path = tmp_path / "state.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
        read_state(path)
    assert f"{path}: " in str(raised.value) and f"runs.{name}.{key}" in str(raised.value)
    assert "move it away" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time", {"wall_seconds": 10**400}),
        ("time", {"wall_seconds": "x"}),
        ("time", []),
        ("tokens", {"real": 10**400}),
        ("tokens", {"real": {}}),
        ("evaluations", [3]),
        ("evaluations", [{"metrics": []}]),
        ("evaluations", [{"metrics": {"target/loss": "x"}}]),
        ("evaluations", [{"metrics": {"target/loss": 10**400}}]),
        ("evaluations", 7),
        ("config", {"callbacks": {"forgetting": {"sets": [1]}}}),
        ("config", {"model": {"peft_config": 3}}),
        ("config", 3),
    ],
)
def test_a_sweep_reads_edited_records_of_its_runs(key: str, value: object):
    """They give no time and no loss."""
    record = {
        "status": "finished",
        "time": {"wall_seconds": 2.0},
        "tokens": {"real": 10},
        "evaluations": [{"metrics": {"target/loss": 1.0}}],
        "config": {"callbacks": {"forgetting": {"sets": {"target": {"role": "learning"}}}}},
        key: value,
    }
    assert wall_seconds(record) >= 0
    loss = target_loss(record)
    assert loss is None or loss == 1.0
    cost = _measured_cost(record)
    assert cost is None or (cost[1] >= 0 and cost[2] >= 0)
