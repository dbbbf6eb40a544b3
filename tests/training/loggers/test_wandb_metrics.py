"""An offline W&B run: its file is read back and holds every promised key."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
from composer.callbacks.memory_monitor import _MEMORY_KEYS
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal import datastore

from foundry_ext.comparison.dashboard import dashboard
from foundry_ext.comparison.wandb_runs import is_local, local_record
from foundry_ext.records.record import RECORD_NAME, read_items, read_record
from foundry_ext.training.logged_metrics import AGAINST_TOKENS, METRICS, TOKENS, metric_of
from foundry_ext.training.loggers.wandb_metrics import (
    PROMISED_CONFIG,
    PROMISED_KEYS,
)
from tests.comparison.shown import Shown, shown
from tests.training import kit
from tests.training.callbacks.forgetting_kit import make_sets
from tests.training.callbacks.test_run_record import settings
from tests.training.loggers.wandb_server import serving
from tests.training.loggers.wandb_store import Store


def read_back(folder: Path):
    """Return all records of an offline run's file, complete shortly after the run's end."""
    (file,) = folder.glob("run-*.wandb")
    for _ in range(300):
        records = read_records(file)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.2)
    raise AssertionError(f"{file} was not finished")


def read_records(file: Path):
    store = datastore.DataStore()
    records = []
    try:
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
    except AssertionError:  # the file ends inside a record
        pass
    return records


def offline_in(folder: Path) -> dict:
    """Return arguments to be offline; W&B reads WANDB_MODE and WANDB_DIR once per process."""
    return {"mode": "offline", "dir": str(folder)}


def values(items) -> dict:
    """Return key -> value of a record's items, with nested keys joined."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def every_kind_of_set(world, folder: Path) -> dict:
    """Return sets of every type, multiple choice and generation in both roles."""
    sets = make_sets(world, folder)
    sets["choice"]["logprob"] = True
    sets |= {
        "learned_choice": {**sets["choice"], "role": "learning"},
        "lost_problems": {**sets["problems"], "role": "forgetting"},
    }
    return sets


@pytest.fixture(scope="module")
def offline(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    given = settings(world, folder, seed=23, save_folder=None, eval_first=True)
    given["callbacks"]["forgetting"]["sets"] = every_kind_of_set(world, folder)
    given["callbacks"]["packed_throughput"] = {}
    given["callbacks"] |= {"lr_monitor": {}, "guard": {}}
    given["callbacks"]["text_samples"] = {"prompts": ["one bird"], "max_new_tokens": 4}
    init_kwargs = {**offline_in(folder), "config": {"service_password": "planted"}}
    logger = {"project": "trials", "name": "one", "init_kwargs": init_kwargs}
    given["loggers"] = {"inmemory": {}, "wandb_metrics": logger}
    given["variables"] = {"hub_token": "planted"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "variables.api_key=planted", "seed=1"])
        run = kit.run(kit.run_config(world, folder, "dora", **given))
    (wandb_folder,) = (folder / "wandb").glob("offline-run-*")
    return run, folder, wandb_folder, read_back(wandb_folder)


def logged_by(records) -> set[str]:
    """Return the keys of a run's history; a table has one."""
    logged = {key for record in records if record.HasField("history") for key in keys(record)}
    tables = {key.partition("/")[0] for key in logged if key.endswith("/_type")}
    return {key for key in logged if key.partition("/")[0] not in tables} | tables


def test_every_promised_key_is_in_the_file(offline):
    logged = logged_by(offline[-1])
    missing = [
        promise for promise in PROMISED_KEYS if not any(fnmatch(key, promise) for key in logged)
    ]
    assert not missing, sorted(logged)


def test_the_declaration_and_a_run_have_the_same_keys(offline):
    """But for those that need a GPU, chats, or a wrong step."""
    logged = {key for key in logged_by(offline[-1]) if not key.startswith("_")}
    assert [key for key in logged if metric_of(key) is None] == []
    missing = {
        metric.key for metric in METRICS if not any(fnmatch(key, metric.key) for key in logged)
    }
    memory = {f"memory/{name}" for name in _MEMORY_KEYS.values()}
    others = {"throughput/device/mfu", "guard/skipped", "data/responses_not_trained"}
    assert missing == memory | others
    assert all(metric.only for metric in METRICS if metric.key in missing)


def keys(record):
    return values(record.history.item)


def logged_in(records) -> dict[str, set[str]]:
    """Return the keys of an offline run by the place that a panel names."""
    summary, config = {}, {}
    for record in records:
        if record.HasField("summary"):
            summary |= values(record.summary.update)
        if record.HasField("config"):
            config |= values(record.config.update)
        if record.HasField("run"):
            config |= values(record.run.config.update)
    return {
        "history": logged_by(records),
        "summary": {key.removesuffix("/_type") for key in summary},
        "config": {*config, *(f"optimizer.{key}" for key in config["optimizer"])},
    }


def missing_from(logged: dict[str, set[str]], specification) -> set[Shown]:
    """Return what the dashboard's panels show and the run lacks, but for what needs a GPU."""
    return {
        one
        for one in shown(specification)
        if not any(re.fullmatch(one.key, key) for key in logged[one.place])
        and not getattr(metric_of(one.key), "only", "")
    }


KEYS = {
    "learning": ["target_loss", "problems_strict_match"],
    "forgetting": ["source_loss", "source_kl", "mean_accuracy"],
}


def test_the_dashboard_shows_what_the_run_has(offline):
    logged = logged_in(offline[-1])
    assert missing_from(logged, dashboard("me", "trials", **KEYS)) == set()
    other = dashboard("me", "trials", learning=["other_loss"])
    key = "learning/other_loss"
    assert missing_from(logged, other) == {Shown("history", key), Shown("summary", key)}


@pytest.mark.more
def test_an_offline_run_that_is_synced_later_is_in_the_same_panels(offline, tmp_path):
    """With its configuration, which `wandb sync` takes from the run's own entry in the file."""
    shutil.copytree(offline[2], tmp_path / offline[2].name)
    with serving(Store()) as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-m", "wandb", "sync", offline[2].name]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert missing_from(run.logged, dashboard("me", "trials", **KEYS)) == set()
    assert run.config["optimizer"]["value"]["lr"] == 0.01
    record = read_record(offline[1] / "record.json")
    assert run.summary["learning/target_loss"] == pytest.approx(
        record["evaluations"][-1]["learning"]["target_loss"]
    )
    curve = {
        row["_step"]: row["time/token"] for row in run.history if "learning/target_loss" in row
    }
    assert curve == {entry["step"]: entry["real_tokens"] for entry in record["evaluations"]}


def test_values_stand_beside_real_tokens(offline):
    """Every row with a value has the tokens; steps are the trainer's."""
    *_, records = offline
    rows = [keys(record) for record in records if record.HasField("history")]
    shown = [
        row for row in rows if any(fnmatch(key, name) for key in row for name in AGAINST_TOKENS)
    ]
    assert len(shown) >= 8 and all(TOKENS in row for row in shown)
    learning = {
        row[TOKENS]: row["learning/target_loss"] for row in rows if "learning/target_loss" in row
    }
    record = read_record(offline[1] / "record.json")
    expected = {e["real_tokens"]: e["learning"]["target_loss"] for e in record["evaluations"]}
    assert learning == pytest.approx(expected) and len(learning) == 4
    steps = [row["_step"] for row in shown if "learning/target_loss" in row]
    assert steps == [0, 3, 6, 8]


def test_metrics_are_defined_against_tokens(offline):
    *_, records = offline
    defined = [record.metric for record in records if record.HasField("metric")]
    names = [metric.name for metric in defined if metric.name]
    assert TOKENS in names
    index = names.index(TOKENS) + 1  # W&B counts from 1 where a metric names its axis
    axes = {m.glob_name: m.step_metric or m.step_metric_index for m in defined}
    for name in AGAINST_TOKENS:
        assert axes[name] in (TOKENS, index), axes


def test_runs_are_grouped(offline):
    *_, records = offline
    started, *again = [record.run for record in records if record.HasField("run")]
    for entry in (started, *again):
        assert (entry.run_group, entry.job_type) == ("trial", "dora")
    assert (started.project, started.display_name) == ("trials", "one")
    config = values(started.config.update)
    for record in records:
        if record.HasField("config"):
            config |= values(record.config.update)
    assert [config[key] for key in PROMISED_CONFIG] == ["trial", "dora", 23]
    assert config["optimizer"]["lr"] == 0.01
    assert config["variables"] == {"hub_token": "[redacted]"}


def test_no_secret_is_in_any_file(offline):
    """Of the YAML, the logger's own configuration or the command line."""
    assert not any("planted" in str(record) for record in offline[-1])
    files = [path for path in offline[1].rglob("*") if path.is_file()]
    assert {"wandb-metadata.json", "debug.log"} <= {path.name for path in files}
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    metadata = json.loads((offline[2] / "files" / "wandb-metadata.json").read_text())
    assert metadata["args"] == ["variables.api_key=[redacted]", "seed=1"]
    assert "git" not in metadata


def test_record_and_items_are_the_run_s_files(offline):
    _, folder, wandb_folder, _ = offline
    assert is_local(wandb_folder)
    path = local_record(wandb_folder)
    assert path == wandb_folder / "files" / RECORD_NAME and not path.is_symlink()
    record = read_record(path)
    assert record == read_record(folder / "record.json") and record["status"] == "finished"
    assert read_items(path.parent / record["items"]) == read_items(folder / "items.jsonl")
