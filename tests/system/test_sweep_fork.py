"""Forked runs of the real trainer: the same losses as `composer train.py`, and kill -9."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foundry_ext.records.record import read_record
from foundry_ext.sweeps.run import run_sweep
from foundry_ext.training.loggers.metrics_file import read_metrics
from tests.sweeps.kit import ROOT, enter, names, start_sweep, write_sweep

pytestmark = pytest.mark.more


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path, make_rows, monkeypatch) -> Path:
    """Return a folder with train.py and two YAMLs of tiny runs, one of them LoRA with dropout."""
    from tests.training import kit

    world = kit.make_world(tmp_path, tokenizer_folder, make_rows)
    write_sweep(
        tmp_path,
        {"seed": {"values": [17, 18]}},
        command=["composer", "${program}", "${args_no_hyphens}"],
    )
    shutil.copy(ROOT / "train.py", tmp_path / "train.py")
    for name, method in (("a", "full"), ("b", "lora")):
        settings = {
            "run_name": name,
            "variables": {"folder": "outputs/${run_name}"},
            "callbacks": {
                "run_record": {"path": "${variables.folder}/record.json", "experiment": "fork"},
                "packed_throughput": {},
            },
            "loggers": {"metrics_file": {"path": "${variables.folder}/metrics.jsonl"}},
            "train_loader": kit.loader_config(world.rows, shuffle=True, shuffle_seed="${seed}"),
            "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
            "eval_interval": "3ba",
            "eval_first": True,
            "log_config": True,
            "save_folder": "${variables.folder}/checkpoints",
            "save_interval": "2ba",
            "autoresume": True,
        }
        config = kit.run_config(world, tmp_path, method, **settings)
        OmegaConf.save(config, tmp_path / f"{name}.yaml")
    return enter(tmp_path, monkeypatch)


def losses(run: str) -> dict[str, dict[int, float]]:
    found = read_metrics(Path("outputs", run, "metrics.jsonl"))
    return {k: v for k, v in found.items() if k.startswith(("loss/", "metrics/"))}


def test_a_forked_run_has_the_losses_of_composer_bit_for_bit(folder: Path, monkeypatch):
    # Two threads: a pool that its parent had started before the fork would hang here.
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    outcomes = run_sweep("sweep.yaml", launcher="fork", parallel=2)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    forked = {run: losses(run) for run in names(folder)}
    records = [read_record(outcome.record) for outcome in outcomes]
    assert len({record["pid"] for record in records}) == 4
    shutil.rmtree("outputs")
    outcomes = run_sweep("sweep.yaml", launcher="subprocess", parallel=2)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    assert {run: losses(run) for run in names(folder)} == forked
    assert len(forked) == 4
    assert all(len(found["loss/train/total"]) > 5 for found in forked.values())
    one, *others = [found["loss/train/total"] for found in forked.values()]
    assert one not in others  # the equality above could not hold for runs mixed up


def test_forked_runs_survive_the_death_of_their_sweep_or_are_taken_up_again(folder: Path):
    sweep = start_sweep(folder, "--yes", "--parallel", "2", "--launcher", "fork")
    deadline = time.monotonic() + 200
    while not list(folder.glob("outputs/*/record.json")):
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.02)
    os.kill(sweep.pid, signal.SIGKILL)  # the server sees it and leaves, its children go on
    one = next(folder.glob("outputs/*/record.json"))
    victim = json.loads(one.read_text())["pid"]
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.kill(victim, signal.SIGKILL)
    sweep.communicate()
    again = start_sweep(folder, "--yes", "--parallel", "2", "--launcher", "fork")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert "4 of 4 runs finished" in out
    steps = {name: losses(name)["loss/train/total"] for name in names(folder)}
    assert len(steps) == 4
    expected = read_record(folder / "outputs" / "a-seed_17" / "record.json")["steps"]
    assert all(sorted(found) == list(range(expected)) for found in steps.values())
