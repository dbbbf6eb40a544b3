"""A finished run that is started again says so at once, unless anything may have changed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundry_ext.launch.finished import describe_finished, newest_input
from tests.launch.test_console import ROOT, trained, world  # noqa: F401 - fixtures


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):  # noqa: F811
    """Return a bench of its own with a finished run, which a test may change."""
    bench, _ = trained
    monkeypatch.chdir(bench.folder.parent)
    copies = [Path(shutil.copytree(bench.folder, tmp_path / "before", symlinks=True))]
    config = json.loads(json.dumps(bench.config))
    yield bench
    shutil.rmtree(bench.folder)
    shutil.move(copies[0], bench.folder)
    bench.config = config


def test_it_says_so_and_trains_nothing(finished):
    before = finished.written()
    ended = finished.train("seed=18")
    assert ended.code == 0 and ended.err == ""
    (line,) = ended.out.splitlines()
    for part in (str(finished.folder / "record.json"), "2 steps", "max_duration, 2ba", "run_name"):
        assert part in line
    assert finished.written() == before


def test_it_says_so_before_anything_slow_is_imported(finished):
    path = finished.folder / "run.yaml"
    path.write_text(yaml.safe_dump(finished.config))
    code = (
        "import sys; from foundry_ext.launch.train import main;"
        f"code = main('train.py', [{str(path)!r}, 'seed=18']);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr


def _change(**values: Any) -> Callable[[Any], Any]:
    return lambda bench: bench.change(**values)


def _in_record(**values: Any) -> Callable[[Any], Any]:
    def change(bench: Any) -> None:
        path = bench.folder / "record.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


STARTS: dict[str, Callable[[Any], Any]] = {
    "a longer run": _change(max_duration="3ba"),
    "another learning rate": _change(optimizer__lr=0.02),
    "a callback more": _change(callbacks__lr_monitor={}),
    "another precision": _change(precision="amp_bf16"),
    "a default by its name, changed": _change(optimizer__eps=1e-6),
    "no autoresume": _change(autoresume=False),
    "what is there may be replaced": _change(save_overwrite=True),
    "only an export": _change(only_hf_checkpoint=True),
    "another name": _change(run_name="other"),
    "rows that are newer": _in_record(started="2026-01-01T00:00:00.000+00:00"),
    "a record that says running": _in_record(status="running"),
    "a record that says failed": _in_record(status="failed"),
    "a record of an earlier version": _in_record(defaults={}),
    "a record that is none": lambda bench: (bench.folder / "record.json").unlink(),
    "no export": lambda bench: shutil.rmtree(bench.folder / "hf"),
    "no checkpoint": lambda bench: (
        [x.unlink() for x in (bench.folder / "checkpoints").iterdir()] and None
    ),
    "no metrics": lambda bench: (bench.folder / "metrics.jsonl").unlink(),
}


def described(bench: Any) -> str | None:
    return describe_finished({**bench.config, "seed": 18})


@pytest.mark.parametrize("case", STARTS)
def test_any_change_starts_it_as_before(finished, case):
    assert described(finished)
    STARTS[case](finished)
    assert described(finished) is None


def test_what_is_read_is_found_wherever_it_is_named(tmp_path):
    """Rows written again count as new, even with their old time of modification."""
    folder = tmp_path / "rows"
    (folder / "below").mkdir(parents=True)
    rows, others = folder / "below/a.jsonl", tmp_path / "b.jsonl"
    for path in (rows, others):
        path.write_text("{}\n")
        os.utime(path, (1e9, 1e9))
    (folder / "broken").symlink_to("nowhere")
    sources = [{"hf_name": f"{tmp_path}/*.jsonl", "split": "train"}, {"hf_name": "of/the hub"}]
    for config in (
        {"train_loader": {"dataset": {"hf_name": str(folder)}}},
        {"eval_loader": [{"dataset": {"datasets": sources}}]},
    ):
        assert newest_input(config) > time.time() - 60
    assert newest_input({"train_loader": {"dataset": {"hf_name": "of/the hub"}}}) == 0.0


def test_a_sweep_and_several_nodes_start_it_as_before(finished, monkeypatch):
    assert describe_finished(finished.config | {"seed": 18})
    with monkeypatch.context() as changed:
        changed.setenv("WANDB_SWEEP_ID", "x1")
        assert described(finished) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert described(finished) is None


@pytest.mark.parametrize("change", [_change(model__compile="auto"), _change(max_duration="2 ba")])
def test_another_spelling_is_no_change(finished, change):
    change(finished)
    assert described(finished)
