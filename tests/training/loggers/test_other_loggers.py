"""TensorBoard and MLflow, through Composer's loggers: their files are read back."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training import kit
from tests.training.callbacks.test_run_record import settings

Scalars = dict[str, list[tuple[int, float]]]  # key -> (step, value), in their order


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loggers")
    given = settings(world, folder, save_folder=None, eval_first=True)
    given["callbacks"] |= {"packed_throughput": {}, "lr_monitor": {}, "guard": {}}
    given["callbacks"]["text_samples"] = {"prompts": ["one bird"], "max_new_tokens": 4}
    given["loggers"] = {
        "inmemory": {},
        "metrics_file": {"path": f"{folder}/metrics.jsonl"},
        "tensorboard": {"log_dir": f"{folder}/tensorboard"},
        "mlflow": {
            "experiment_name": "trials",
            "tracking_uri": f"{folder}/mlruns",
            "log_system_metrics": False,
        },
    }
    kit.run(kit.run_config(world, folder, "lora", **given))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Scalars:
    """Return the scalars of metrics.jsonl."""
    found: Scalars = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        step = entry.pop("batch")
        del entry["token"]
        for key, value in entry.items():
            found.setdefault(key, []).append((step, value))
    assert len(found) > 30 and len(found["loss/train/total"]) == 8
    return found


def test_tensorboard_has_the_scalars_of_metrics_file(folder: Path, expected: Scalars):
    events = EventAccumulator(str(folder / "tensorboard" / "lora"), size_guidance={"scalars": 0})
    events.Reload()
    logged = {  # sorted: Composer begins many files, which are read in the order of their names
        key: sorted((event.step, event.value) for event in events.Scalars(key))
        for key in events.Tags()["scalars"]
    }
    check(logged, expected)


def test_mlflow_has_the_scalars_of_metrics_file(folder: Path, expected: Scalars):
    client = MlflowClient(f"{folder}/mlruns")
    (experiment,) = client.search_experiments(filter_string="name LIKE '%trials'")
    (run,) = client.search_runs([experiment.experiment_id])
    logged = {  # sorted: its threads write in any order
        key: sorted(
            (one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)
        )
        for key in run.data.metrics
    }
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"text_samples.json"}
    check(logged, {key: without_repeats(values) for key, values in expected.items()})


def without_repeats(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the values that differ from the one before: Composer logs no others for 100 steps."""
    before = [None, *(value for _, value in values)]
    return [entry for entry, last in zip(values, before, strict=False) if entry[1] != last]


def check(logged: Scalars, expected: Scalars) -> None:
    assert expected.keys() <= logged.keys()
    for key, values in expected.items():
        assert [step for step, _ in logged[key]] == [step for step, _ in values], key
        assert [x for _, x in logged[key]] == pytest.approx([x for _, x in values]), key
