"""Sweeps of stand-in programs: runs started, skipped, retried, refused and reported."""

import json
import os
import re
from pathlib import Path

import pytest

from foundry_ext.sweeps.plan import PlannedRun, finished_otherwise
from foundry_ext.utils.errors import UserError
from tests.sweeps.kit import enter, lines, names, run, start_sweep, write_sweep

SEEDS = {"seed": {"values": [17, 18]}}
RUNS = ["a-seed_17", "a-seed_18", "b-seed_17", "b-seed_18"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_every_run_once_then_nothing_is_left_to_do(folder: Path):
    path = write_sweep(folder, SEEDS)
    statuses, said = run(path, parallel=2)
    assert statuses == dict.fromkeys(RUNS, "finished")
    assert said[0].startswith("sweep stand-in: 4 runs, 4 to start, 0 finished already; 2 at once")
    assert said[1].startswith("tokens: at most 10,240; time: unknown")  # 4 x 10ba x 4 packs x 64
    assert any(line.startswith("[4/4] ") and "target loss 1.25" in line for line in said)
    assert any("to go, about" in line for line in said)
    assert said[-1] == "compare: foundry-ext compare " + " ".join(
        [*(f"outputs/{name}" for name in RUNS), "--out outputs/sweeps/stand-in/report"]
    )
    statuses, said = run(path, parallel=2)
    assert statuses == dict.fromkeys(RUNS, "finished")
    assert "0 to start, 4 finished already" in said[0]
    assert [len(lines(folder, name, "starts")) for name in RUNS] == [1] * 4
    log = (folder / "outputs/sweeps/stand-in/logs/a-seed_17.log").read_text()
    assert "the log of a-seed_17" in log


def test_the_state_may_be_lost_and_the_records_still_speak(folder: Path):
    path = write_sweep(folder, SEEDS)
    run(path, num_runs=2)
    (folder / "outputs/sweeps/stand-in/state.json").unlink()
    _, said = run(path)
    assert "2 to start, 2 finished already" in said[0]
    assert "time: about 4 s" in said[1]  # from the two records, which say 2 s
    assert [len(lines(folder, name, "starts")) for name in RUNS] == [1] * 4


def test_a_failed_run_is_reported_and_retried_on_demand_alone(folder: Path):
    path = write_sweep(folder, {**SEEDS, "variables.behaviour": {"values": ["fail", "good"]}})
    statuses, said = run(path, parallel=4)
    failed = [name for name, status in statuses.items() if status == "failed"]
    assert len(failed) == 4 and all("fail" in name for name in failed)
    assert any("failed in" in line and "ValueError: planted; see" in line for line in said)
    statuses, said = run(path)
    assert "4 failed before (--retry-failed starts them again)" in said[0]
    assert [len(lines(folder, name, "starts")) for name in failed] == [1] * 4
    (folder / "mended").touch()
    statuses, _ = run(path, retry_failed=True, parallel=4)
    assert set(statuses.values()) == {"finished"}
    assert [len(lines(folder, name, "starts")) for name in failed] == [2] * 4


def test_what_a_refused_run_says_is_shown(folder: Path):
    path = write_sweep(folder, {"variables.behaviour": {"value": "refused"}})
    _, said = run(path)
    assert any("failed in" in line and "unknown key, optimizer.lrr; see" in line for line in said)


def test_exit_code_0_without_a_record_is_a_failure(folder: Path):
    path = write_sweep(folder, {"variables.behaviour": {"value": "silent"}})
    statuses, said = run(path)
    assert set(statuses.values()) == {"failed"}
    assert any("exit code 0, but its record is not finished" in line for line in said)


def test_the_command_says_by_its_exit_code_whether_all_finished(folder: Path):
    write_sweep(folder, {"variables.behaviour": {"values": ["fail", "good"]}})
    sweep = start_sweep(folder, "--yes", "--parallel", "4", "--launcher", "subprocess")
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert "2 of 4 runs finished" in out


def test_devices_and_threads_are_shared_out(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "3")
    path = write_sweep(folder, {**SEEDS, "variables.seconds": {"value": 0.5}})
    run(path, gpus=["4,5", "6,7"])
    seen = [
        json.loads(lines(folder, name, "starts")[0].partition(" ")[2]) for name in names(folder)
    ]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["4,5", "4,5", "6,7", "6,7"]
    assert not any("RANK" in one for one in seen)
    path = write_sweep(folder, {"seed": {"value": 19}})
    run(path, parallel=2)
    (one,) = lines(folder, "a-seed_19", "starts")
    cores = len(os.sched_getaffinity(0))
    assert json.loads(one.partition(" ")[2]) == {"OMP_NUM_THREADS": str(max(1, cores // 2))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": ["0", "0"]}, "named twice"),
        ({"gpus": ["0", "1"], "parallel": 3}, "leave parallel out"),
        ({"parallel": 0}, "not above 0"),
        (
            {"yes": False},
            "an unknown time, the limit is 1 h, and nobody is there to ask; add --yes",
        ),
        ({"yes": False, "tokens_per_second": 0.1}, "takes about 28 h"),
    ],
)
def test_what_cannot_start_says_why(folder: Path, settings, message: str):
    path = write_sweep(folder, SEEDS)
    with pytest.raises(UserError, match=message):
        run(path, **settings)
    assert names(folder) == []


@pytest.mark.parametrize(
    ("parameters", "more", "message"),
    [
        ({"sed": {"value": 3}}, {}, "unknown top-level key, 'sed', did you mean 'seed'"),
        ({"config": {"value": "c.yaml"}}, {}, "c.yaml: no such file"),
        ({"config": {"value": "../a.yaml"}}, {}, "config, '../a.yaml', is outside this folder"),
        (
            {"variables.learning_rate": {"value": "hihg"}},
            {},
            "known: low, high, did you mean 'high'",
        ),
        (
            {"callbacks": {"value": {"run_record": {"path": ""}}}},
            {},
            "no run_record under callbacks",
        ),
        ({"run_name": {"value": "x"}}, {}, "two runs are named x; do not sweep run_name"),
        ({"variables.folder": {"value": "outputs/x"}}, {}, "share outputs/x"),
        (
            {"loggers": {"value": {"metrics_file": {"path": "outputs/m.jsonl"}}}},
            {},
            "share outputs/m.jsonl, as loggers.metrics_file.path",
        ),
        ({}, {"command": ["python", "${program}", "${args}"]}, "arguments with hyphens"),
        ({}, {"program": "train2.py"}, "train2.py: no such file"),
    ],
)
def test_mistakes_are_found_before_anything_starts(folder: Path, parameters, more, message: str):
    path = write_sweep(folder, parameters, **more)
    with pytest.raises(ValueError) as raised:
        run(path)
    assert message in str(raised.value)
    assert not (folder / "outputs").exists()


def test_a_finished_record_of_other_settings_is_not_taken_for_this_run(folder: Path):
    path = write_sweep(folder, {"seed": {"value": 17}})
    run(path)
    record = folder / "outputs/a-seed_17/record.json"
    content = json.loads(record.read_text())
    content["config"]["seed"] = 18
    record.write_text(json.dumps(content))
    with pytest.raises(UserError, match="finished run with seed: 18, not 17; move it away"):
        run(path)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("max_duration: 10ba", "max_duration: 20ba", "max_duration: '10ba', not '20ba'"),
        ("low: 1.0e-4", "low: 2.0e-4", "optimizer.lr: 0.0001, not 0.0002"),
        ("pack_tokens: 64", "pack_tokens: 32", "train_loader.dataset.pack_tokens: 64, not 32"),
        ("seconds: 0.1", "seconds: 0.2", None),
    ],
)
def test_a_yaml_edited_since_is_not_passed_over(folder: Path, before: str, after: str, named):
    path = write_sweep(folder, {"seed": {"value": 17}})
    run(path)
    yaml_file = folder / "b.yaml"
    text = yaml_file.read_text()
    assert before in text
    yaml_file.write_text(text.replace(before, after))
    if named is None:  # no part of what a result depends on
        assert "2 finished already" in run(path)[1][0]
        return
    with pytest.raises(UserError, match=re.escape(named)):
        run(path)


def test_the_record_of_an_earlier_attempt_says_nothing_about_this_one(folder: Path):
    """An attempt that ends before its first step leaves the record as it was."""
    path = write_sweep(folder, {"variables.behaviour": {"value": "silent"}})
    for name in ("a", "b"):
        record = folder / f"outputs/{name}-behaviour_silent/record.json"
        record.parent.mkdir(parents=True)
        old = {"status": "stopped", "error": "long ago", "updated": "2000-01-01T00:00:00+00:00"}
        record.write_text(json.dumps(old))
    statuses, said = run(path)
    assert set(statuses.values()) == {"failed"}
    assert not any("long ago" in line for line in said)


ADDED = {
    "optimizer: {name: decoupled_adamw, ": {
        "weight_decay: 0.1, ": "optimizer.weight_decay: None, not 0.1",
        "weight_decay: 1.0e-5, ": None,  # the default
        "weight_decay: 0.00001, ": None,
    },
    "model: {name: smollm2_packed, ": {
        "peft_config: {peft_type: LORA}, ": "model.peft_config.peft_type: None, not 'LORA'",
        "peft_config: null, ": None,
        "loss: compiled, ": None,  # equal to rounding
    },
    "seed: 17\n": {
        "algorithms: {gated_linear_units: {}}\n": "algorithms.gated_linear_units: None, not 'pres",
        "eval_subset_num_batches: 3\n": "eval_subset_num_batches: None, not 3",
        "metadata: {team: red}\nprogress_bar: true\n": None,
    },
    "train_loader: {": {
        "drop_last: true, ": "train_loader.drop_last: None, not True",
        "num_workers: 2, ": None,
    },
}


@pytest.mark.parametrize(
    ("place", "text", "named"),
    [(place, text, named) for place, texts in ADDED.items() for text, named in texts.items()],
)
def test_a_key_added_since_is_a_difference(folder: Path, place: str, text: str, named):
    """So is one that was left out since; a default is none."""
    path = write_sweep(folder, {"seed": {"value": 17}})
    yaml_file = folder / "b.yaml"
    shorter = yaml_file.read_text()
    assert place in shorter
    longer = shorter.replace(place, place + text)
    for before, after in ((shorter, longer), (longer, shorter)):
        yaml_file.write_text(before)
        (folder / "outputs/b-seed_17/record.json").unlink(missing_ok=True)
        run(path)
        yaml_file.write_text(after)
        if named is None:
            assert "2 finished already" in run(path)[1][0]
            continue
        key = named.partition(":")[0]
        with pytest.raises(UserError, match=re.escape(named if after == longer else f"{key}: ")):
            run(path)


@pytest.mark.parametrize(
    ("planned", "found"),
    [("auto", ""), (None, ""), ("layers", "model.compile: 'none', not 'layers'")],
)
def test_a_value_left_to_the_machine_is_no_difference(tmp_path: Path, planned, found):
    """A record holds what the machine chose."""

    def config(scope):
        return {"seed": 1, "model": {"name": "smollm2_packed", "compile": scope}}

    run = PlannedRun(
        name="a",
        command=(),
        program="train.py",
        arguments=(),
        config=config(planned),
        record=tmp_path / "record.json",
        keys=("model.compile",),
    )
    record = {"config": config("none"), "defaults": {"seed": 17}}
    assert finished_otherwise(run, record) == found


@pytest.mark.more  # imports a trainer
def test_a_record_of_an_earlier_version_has_the_defaults_of_this_one(folder: Path):
    path = write_sweep(folder, {"seed": {"value": 17}, "variables.behaviour": {"value": "old"}})
    run(path)
    yaml_file = folder / "b.yaml"
    text = yaml_file.read_text()
    yaml_file.write_text(text.replace("decoupled_adamw, ", "decoupled_adamw, eps: 1.0e-8, "))
    assert "2 finished already" in run(path)[1][0]
    yaml_file.write_text(text.replace("decoupled_adamw, ", "decoupled_adamw, eps: 1.0e-6, "))
    with pytest.raises(UserError, match=r"optimizer\.eps: None, not 1e-06; move it away"):
        run(path)


def test_a_run_name_leads_to_no_other_folder(folder: Path):
    path = write_sweep(folder, {})
    for name in ("a", "b"):
        text = (folder / f"{name}.yaml").read_text()
        text = text.replace(f"run_name: {name}\n", f"run_name: ../../../../{name}\n")
        (folder / f"{name}.yaml").write_text(text.replace("outputs/${run_name}", f"outputs/{name}"))
    with pytest.raises(UserError, match=r"run_name, '\.\./\.\./\.\./\.\./a', is no file's name"):
        run(path)
    assert not (folder / "outputs").exists()
