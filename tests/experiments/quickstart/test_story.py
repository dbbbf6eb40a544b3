"""Runs that the quickstart repeats or skips, and rates at which all methods learn the same."""

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


LEARNED = {"full": (0.8, 1.2, 1.5, 1.0), "lora": (0.6, 1.0, 1.4, 1.2)}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def write_grid(folder: Path, seed: int) -> list[Path]:
    """Write the runs of a grid of two methods; return their records."""
    paths = []
    for method, learned in LEARNED.items():
        for rate, value in zip(RATES, learned, strict=True):
            paths.append(write_run(folder, method, rate, seed) / "record.json")
            record = json.loads(paths[-1].read_text())
            record["evaluations"][-1]["learning"] = {"problems_loss": value}
            paths[-1].write_text(json.dumps(record))
    return paths


def write_yamls(folder: Path) -> None:
    for method in LEARNED:
        path = Path(f"yamls/quickstart/{method}.yaml")
        content = {"variables": {"learning_rate": "low"}, "run_name": method}
        path.write_text(yaml.safe_dump(content))
    configs = [f"yamls/quickstart/{method}.yaml" for method in LEARNED]
    story.SWEEP_YAML.write_text(yaml.safe_dump({"parameters": {"config": {"values": configs}}}))


def test_matched_runs_have_the_rates_of_equal_learning(folder: Path, monkeypatch):
    swept = []

    def sweep(content, *_):
        swept.append(content["parameters"])
        return []

    write_yamls(folder)
    monkeypatch.setattr(story, "run_sweep_file", sweep)
    story.run_matched(write_grid(folder / "runs", 17), [17, 18, 19], folder)
    (parameters,) = swept
    assert parameters["seed"]["values"] == [17, 18, 19]
    # 0.97 of 1.4 lies between the second and the third rate of both.
    level = 0.97 * 1.4
    for path, (low, high) in zip(
        parameters["config"]["values"], ((1.2, 1.5), (1.0, 1.4)), strict=True
    ):
        config = yaml.safe_load(Path(path).read_text())
        rate = config["variables"]["learning_rates"][config["variables"]["learning_rate"]]
        assert rate == pytest.approx(2e-3 * 2 ** ((level - low) / (high - low)), rel=5e-3)
        assert f"{rate:g}" in config["run_name"], "runs of other rates would count as finished"


def test_a_method_that_diverged_everywhere_is_named(folder: Path):
    write_yamls(folder)
    records = write_grid(folder / "runs", 17)
    for path in records[4:]:
        text = path.read_text()
        record = json.loads(text)
        record["evaluations"][-1]["learning"] = {"problems_loss": float("nan")}
        path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="lora"):
        story.run_matched(records, [17], folder)


def test_yesterdays_quickstart_is_made_anew(folder: Path, monkeypatch, capsys):
    for name in ("base", "runs/lora-seed_17-learning_rate_low", "sweeps", "report"):
        (folder / name).mkdir(parents=True)
    (folder / "base/made_from").write_text("of yesterday")
    monkeypatch.setattr(story, "run_to_its_end", lambda *_: 0)
    story.train_base()
    assert "made anew" in capsys.readouterr().out
    assert not any((folder / name).exists() for name in ("runs", "sweeps", "report"))
