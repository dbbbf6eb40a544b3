"""Runs that the quickstart repeats or skips, and learning rates that get more seeds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.quickstart import story
from tests.comparison.records import write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a quickstart with placeholder inputs, for commands that do not run."""
    monkeypatch.chdir(tmp_path)
    for path in (story.BASE_YAML, story.SWEEP_YAML):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for name in ("data/problems_train.jsonl", "tokenizer/tokenizer.json"):
        path = story.FOLDER / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return story.FOLDER


def test_a_base_model_is_trained_once_and_anew_when_its_data_change(folder: Path, monkeypatch):
    commands = []

    def run(command, _):
        commands.append(command)
        return 0

    monkeypatch.setattr(story, "run_to_its_end", run)
    story.train_base()
    (folder / "runs/lora").mkdir(parents=True)
    story.train_base()
    assert len(commands) == 1 and (folder / "runs/lora").is_dir()
    (folder / "data/problems_train.jsonl").write_text("{} ")
    story.train_base()
    assert len(commands) == 2
    assert not (folder / "runs").exists(), "runs on other data would count as finished"


def test_a_base_model_that_failed_is_not_taken_for_one(folder: Path, monkeypatch):
    checkpoint = folder / "base/checkpoints/latest-rank0.pt"

    def run(*_):
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        return 1

    monkeypatch.setattr(story, "run_to_its_end", run)
    for _ in range(2):
        with pytest.raises(ValueError, match="exit code 1, for the reason above"):
            story.train_base()
        assert checkpoint.is_file(), "where it goes on"


def test_a_base_model_of_other_data_does_not_go_on(folder: Path, monkeypatch):
    checkpoint = folder / "base/checkpoints/latest-rank0.pt"
    seen = []

    def run(*_):
        seen.append(checkpoint.is_file())
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        return 1

    monkeypatch.setattr(story, "run_to_its_end", run)
    for content in ("{}", "{}", "{} "):
        (folder / "data/problems_train.jsonl").write_text(content)
        with pytest.raises(ValueError, match="exit code 1, for the reason above"):
            story.train_base()
    assert seen == [False, True, False]


# What a user has, in short: a command that saves for two seconds after Ctrl-C.
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(2)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("trains", flush=True)
time.sleep(60)
"""
WAITS = """
import os, sys
from experiments.quickstart.story import run_to_its_end
try:
    run_to_its_end([sys.executable, "-c", sys.argv[1]], dict(os.environ))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c_waits_until_training_has_saved():
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, SAVES],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as quickstart:
        assert quickstart.stdout is not None
        assert quickstart.stdout.readline() == "trains\n"
        os.killpg(quickstart.pid, signal.SIGINT)
        assert quickstart.stdout.read() == "saved\nstopped\n"


def test_the_best_rate_of_each_method_is_named_by_its_own_grid(tmp_path: Path):
    grids = {"full": {"low": 1e-3, "high": 4e-3}, "lora": {"low": 4e-3, "high": 1e-2}}
    learned = {("full", 1e-3): 2.0, ("full", 4e-3): 3.0, ("lora", 4e-3): 2.5, ("lora", 1e-2): 1.0}
    configs, records = [], []
    for method, grid in grids.items():
        configs.append(tmp_path / f"{method}.yaml")
        configs[-1].write_text(yaml.safe_dump({"variables": {"learning_rates": grid}}))
    for (method, rate), value in learned.items():
        path = write_run(tmp_path / f"{method}-{rate}", method, rate, 17) / "record.json"
        record = json.loads(path.read_text())
        record["evaluations"][-1]["learning"] = {"problems_loss": value}
        path.write_text(json.dumps(record))
        records.append(path)
    best = story.best_rates(records, [str(config) for config in configs])
    assert {Path(config).stem: rate for config, rate in best.items()} == {
        "full": "high",
        "lora": "low",
    }
