"""W&B runs of other settings: groups, empty keys, tokens beside each value, a crashed run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from composer.loggers import WandBLogger
from omegaconf import OmegaConf

from foundry_ext.comparison.wandb_runs import local_record
from foundry_ext.records.record import read_items, read_record
from foundry_ext.training.logged_metrics import TOKENS
from foundry_ext.training.loggers import wandb_metrics
from foundry_ext.training.loggers.wandb_metrics import WandBMetrics
from tests.training import kit
from tests.training.callbacks.test_run_record import settings
from tests.training.loggers.test_wandb_metrics import offline_in, read_back


def test_tokens_are_in_every_call(monkeypatch):
    """Not only in the row, which Composer completes only with a next batch."""
    seen = []
    monkeypatch.setattr(WandBLogger, "log_metrics", lambda *call: seen.append(call[1:]))
    logger = WandBMetrics(project="p")
    logger.state = SimpleNamespace(timestamp=SimpleNamespace(token=SimpleNamespace(value=7)))
    logger.log_metrics({"loss/x": 1.0}, 3)
    assert seen == [({TOKENS: 7, "loss/x": 1.0}, 3)]


def test_what_the_yaml_says_of_group_and_job_type_wins(world, tmp_path):
    init_kwargs = {"job_type": "my job", **offline_in(tmp_path)}
    logger = {"project": "p", "group": "mine", "init_kwargs": init_kwargs}
    given = {"loggers": {"inmemory": {}, "wandb_metrics": logger}, "save_folder": None}
    kit.run(kit.run_config(world, tmp_path, max_duration="1ba", **given))
    (wandb_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    started, *_ = [record.run for record in read_back(wandb_folder) if record.HasField("run")]
    assert (started.run_group, started.job_type) == ("mine", "my job")
    with pytest.raises(FileNotFoundError, match=r"has no record.json"):
        local_record(wandb_folder)


def test_empty_keys_of_init_kwargs_are_no_error(monkeypatch):
    monkeypatch.setattr(wandb_metrics, "method_of", lambda _: SimpleNamespace(name="lora"))
    monkeypatch.setattr(WandBMetrics, "connect", lambda *_: None)
    logger = WandBMetrics(project="p", init_kwargs={"settings": None, "config": None})
    logger.init(SimpleNamespace(callbacks=[], rank_zero_seed=7), SimpleNamespace())
    assert logger._init_kwargs["settings"]["console"] == "off"
    assert logger._init_kwargs["config"] == {"method": "lora", "seed": 7}


CRASHING = """
import json, sys
from foundry_ext.records.record import mark_failed
from omegaconf import OmegaConf
from tests.training import kit

try:
    kit.run(OmegaConf.load(sys.argv[1]))
except kit.Crash as error:  # as launch.py does
    mark_failed(sys.argv[2], error)
    raise
"""


@pytest.mark.more
def test_a_crashed_run_s_record_is_among_its_files_too(world, tmp_path):
    """W&B's exit hook runs before Composer's."""
    given = settings(world, tmp_path, save_folder=None)
    given["callbacks"]["spy"] = {"crash_after": 4}
    logger = {"project": "trials", "init_kwargs": offline_in(tmp_path)}
    given["loggers"] = {"inmemory": {}, "wandb_metrics": logger}
    OmegaConf.save(kit.run_config(world, tmp_path, **given), tmp_path / "run.yaml")
    arguments = [str(tmp_path / "run.yaml"), str(tmp_path / "record.json")]
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Crash" in done.stderr, done.stderr[-3000:]
    (wandb_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    record = read_record(local_record(wandb_folder))
    assert (record["status"], record["error"]) == ("failed", "Crash: ")
    assert [entry["step"] for entry in record["evaluations"]] == [0, 3]
    assert read_items(wandb_folder / "files" / "items.jsonl")
