"""Records that a sweep keeps in a folder, and takes as finished when the outputs are gone."""

import json
import shutil
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from foundry_ext.sweeps import run as sweep_run
from foundry_ext.sweeps.kept import keep
from foundry_ext.sweeps.runner import PlannedRun
from foundry_ext.utils.errors import UserError
from tests.sweeps.kit import enter, lines, run, write_sweep

SEEDS = {"seed": {"values": [17, 18]}}
RUNS = ["a-seed_17", "a-seed_18", "b-seed_17", "b-seed_18"]
KEPT = Path("results/runs")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_another_machine_continues_with_the_records_alone(folder: Path):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=2, parallel=2, results_folder=KEPT)
    assert sorted(kept.name for kept in KEPT.iterdir()) == RUNS[:2]
    for name in RUNS[:2]:
        assert (KEPT / name / "record.json").read_text() == record_of(name).read_text()
    shutil.rmtree("outputs")  # which the other machine does not have
    statuses, said = run(path, parallel=2, results_folder=KEPT)
    assert statuses == dict.fromkeys(RUNS, "finished")
    assert "2 to start, 2 finished already" in said[0]
    assert f"2 finished by their records in {KEPT}" in said
    assert [len(lines(folder, name, "starts")) for name in RUNS] == [0, 0, 1, 1]
    assert f"compare {KEPT}/a-seed_17 {KEPT}/a-seed_18 outputs/b-seed_17" in said[-1]
    assert sorted(kept.name for kept in KEPT.iterdir()) == RUNS


def test_the_choice_of_attention_is_not_that_of_an_earlier_version(folder: Path):
    """Kept runs were not started here, so the sweep asks this machine's CPU."""
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=2, parallel=2, results_folder=KEPT)
    shutil.rmtree("outputs")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sweep_run,
            "shared_attention",
            lambda *_, was_started, threads: asked.append(was_started) or {},
        )
        run(path, parallel=2, results_folder=KEPT)
    assert asked == [False]


def test_a_kept_run_of_other_settings_is_refused_with_the_reason(folder: Path):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=1, results_folder=KEPT)
    shutil.rmtree("outputs")
    yaml = folder / "a.yaml"
    yaml.write_text(yaml.read_text().replace("low: 1.0e-4", "low: 2.0e-4"))
    with pytest.raises(UserError) as refused:
        run(path, results_folder=KEPT)
    assert f"{KEPT}/a-seed_17/record.json" in str(refused.value)
    assert "optimizer.lr: 0.0001, not 0.0002" in str(refused.value)
    assert lines(folder, "a-seed_17", "starts") == []


def test_a_kept_run_of_other_settings_is_refused_beside_a_finished_one(folder: Path):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=1, results_folder=KEPT)
    kept = KEPT / "a-seed_17" / "record.json"
    kept.write_text(kept.read_text().replace('"max_seq_len": 32', '"max_seq_len": 64'))
    with pytest.raises(UserError, match="max_seq_len: 64, not 32; move it away"):
        run(path, num_runs=1, results_folder=KEPT)


def test_an_unfinished_kept_record_is_run_again(folder: Path):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=1, results_folder=KEPT)
    shutil.rmtree("outputs")
    kept = KEPT / "a-seed_17" / "record.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"status": "stopped"}))
    statuses, _ = run(path, num_runs=1, results_folder=KEPT)
    assert statuses == {"a-seed_17": "finished"}
    assert len(lines(folder, "a-seed_17", "starts")) == 1
    assert json.loads(kept.read_text())["status"] == "finished"


def test_runs_that_finished_before_are_kept_by_the_next_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=2, parallel=2)
    command = [
        "sweep",
        str(path),
        "--launcher",
        "subprocess",
        "--runs",
        "2",
        "--results",
        str(KEPT),
    ]
    assert main([*command, "--dry-run"]) == 0
    assert not KEPT.exists(), "a dry run writes nothing"
    assert main([*command, "--yes"]) == 0
    assert sorted(kept.name for kept in KEPT.iterdir()) == RUNS[:2]
    assert "by their records" not in capsys.readouterr().out


def test_a_full_disk_does_not_end_the_sweep(folder: Path):
    path = write_sweep(folder, SEEDS)
    KEPT.parent.mkdir()
    KEPT.write_text("not a folder")
    statuses, said = run(path, parallel=2, results_folder=KEPT)
    assert set(statuses.values()) == {"finished"}
    assert sum(f"is not kept in {KEPT}" in line for line in said) == 4


def test_items_are_kept_without_what_the_model_wrote(folder: Path):
    outputs = Path("outputs/a")
    outputs.mkdir(parents=True)
    (outputs / "record.json").write_text(json.dumps({"status": "finished", "items": "items.jsonl"}))
    item = {"step": 3, "set": "gsm8k", "item": "7", "strict_match": 1, "logprobs": [-1.5, -2.0]}
    (outputs / "items.jsonl").write_text(json.dumps(item | {"output": "She has 12 hens"}) + "\n")
    planned = PlannedRun(
        name="a",
        command=(),
        program="train.py",
        arguments=(),
        config={},
        record=outputs / "record.json",
        keys=(),
    )
    keep(planned, KEPT)
    assert json.loads((KEPT / "a/items.jsonl").read_text()) == item
    assert (KEPT / "a/record.json").exists()


def record_of(name: str) -> Path:
    return Path("outputs", name, "record.json")
