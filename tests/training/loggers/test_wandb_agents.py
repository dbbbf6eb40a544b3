"""Training runs of a W&B sweep with two agents, of which one is killed: what the server gets."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foundry_ext.records.record import read_record
from foundry_ext.training.loggers.metrics_file import read_metrics
from tests.sweeps.agents import Agents, kill
from tests.sweeps.kit import ROOT, enter, start_sweep, wait_for
from tests.system.test_sweep_killed import descendants
from tests.training import kit
from tests.training.callbacks.test_run_record import settings
from tests.training.loggers.wandb_server import serving
from tests.training.loggers.wandb_store import Store

SWEEP = """
program: train.py
method: grid
name: real
command: ["${interpreter}", "${program}", "${args_no_hyphens}"]
parameters:
  config: {value: run.yaml}
  seed: {values: [17, 18]}
"""
RUNS = [f"lora-seed_{seed}" for seed in (17, 18)]


def write(world, folder: Path) -> Path:
    """Write a sweep over two seeds of a run that takes some seconds; return its path."""
    given = settings(world, folder, max_duration="160ba", save_interval="20ba", autoresume=True)
    del given["callbacks"]["spy"]
    given["callbacks"]["run_record"]["path"] = "outputs/${run_name}/record.json"
    given["callbacks"]["forgetting"]["items"] = "outputs/${run_name}/items.jsonl"
    given |= {"eval_interval": "40ba", "save_folder": "outputs/${run_name}/checkpoints"}
    given["callbacks"]["exact_resume"] = {}
    given["loggers"] = {
        "wandb_metrics": {"project": "trials", "name": "${run_name}"},
        "metrics_file": {"path": "outputs/${run_name}/metrics.jsonl"},
    }
    OmegaConf.save(kit.run_config(world, folder, "lora", **given), folder / "run.yaml")
    (folder / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"))
    path = folder / "sweep.yaml"
    path.write_text(SWEEP)
    return path


def record_of(name: str):
    path = Path("outputs") / name / "record.json"
    return read_record(path) if path.exists() else None


@pytest.mark.slow
def test_a_killed_agent_s_run_is_finished_and_the_others_are_complete(world, tmp_path, monkeypatch):
    folder = enter(tmp_path, monkeypatch)
    path = write(world, folder)
    with serving(Store()) as server:
        wandb = Agents(folder, server)
        address = wandb.sweep(path)
        agents = [wandb.start(address) for _ in range(2)]
        wait_for(lambda: list(Path(f"outputs/{RUNS[0]}/checkpoints").glob("ep*")), seconds=240)
        record = record_of(RUNS[0])
        assert record is not None and record["status"] == "running"
        agents.sort(key=lambda agent: record["pid"] in descendants(agent.pid))
        other, killed = agents
        kill(killed)
        out, _ = other.communicate(timeout=400)
        assert other.returncode == 0, out
        for name in wandb.environment:
            monkeypatch.setenv(name, wandb.environment[name])
        again = start_sweep(folder, "--yes", "--launcher", "subprocess")
        said, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and "2 of 2 runs finished" in said, said
    for number, name in enumerate(RUNS):
        record = record_of(name)
        assert record is not None and record["status"] == "finished"
        expected = read_metrics(Path(f"outputs/{name}/metrics.jsonl"))["loss/train/total"]
        assert sorted(expected) == list(range(160))
        lines = Path(f"outputs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first = [line for line in lines if '"batch": 0,' in line and "loss/train/total" in line]
        assert len(first) == 1  # the killed run went on from a checkpoint
        run = server.runs[f"run{number}"]
        assert [run.config[key]["value"] for key in ("method", "seed")] == ["lora", 17 + number]
        logged = {
            row["_step"]: row["loss/train/total"]
            for row in run.history
            if "loss/train/total" in row
        }
        assert logged == pytest.approx({step: expected[step] for step in logged})
        assert len(logged) == 160 or number == 0
    (resumed,) = server.runs.keys() - {f"run{number}" for number in range(2)}
    assert server.runs[resumed].config["seed"]["value"] == 17
