"""Runs, records and sweeps that an earlier version left behind; see yesterday/README.md.

Users who upgrade have such files. This version must resume, compare and continue them, and it must
write the same names. Everything runs in this process, through train.py and `foundry-ext`.
"""

import json
import logging
import pkgutil
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foundry_ext.checkpoints.safe_load import load_checkpoint
from foundry_ext.config.run_name import SWEEP_VARIABLES
from foundry_ext.sweeps.launchers import Job, SubprocessLauncher
from tests.system.names import (
    NAMES,
    YESTERDAY,
    checkpoint_keys,
    gone,
    item_keys,
    metric_keys,
    record_keys,
    sweep_keys,
)

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
BATCHES = 24
# On the machine that wrote the files everything is equal to the last bit. Other processors and
# other versions of torch round differently: with the kernels of older processors, losses differ by
# 2e-7 of their value and weights by 4e-7. Dropout drawn from another random state moves losses by
# 5e-3.
LOSSES, WEIGHTS = 1e-4, 1e-3


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped, and the command that started it."""

    name: str
    arguments: tuple[str, ...]
    batch: int
    """Steps before its checkpoint."""
    checkpoint: str
    weights: str
    """The file in its export."""


FULL = Stopped(
    "stopped-full",
    (
        "full.yaml",
        "run_name=stopped-full",
        "optimizer.name=foreach_lionw",
        "variables.learning_rate=low",
    ),
    11,
    "ep2-ba11-rank0.pt",
    "model.safetensors",
)
LORA = Stopped(
    "stopped-lora",
    ("lora.yaml", "run_name=stopped-lora"),
    8,
    "ep1-ba8-rank0.pt",
    "adapter_model.safetensors",
)
RUNS = pytest.mark.parametrize("run", [FULL, LORA], ids=lambda run: run.name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy the files and make the copy the current folder, as that of a user who has upgraded."""
    handlers = list(logging.root.handlers)
    folder = tmp_path / "yesterday"
    shutil.copytree(YESTERDAY, folder, symlinks=True)
    shutil.copy(ROOT / "train.py", folder)
    monkeypatch.chdir(folder)
    for name in SWEEP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield folder
    logging.root.handlers[:] = handlers  # llm-foundry puts its own in their place


def train(*arguments: str) -> int:
    """Return the exit code of `python train.py ARGUMENTS`, run in this process."""
    return exit_code(lambda: runpy.run_path("train.py", run_name="__main__"), "train.py", arguments)


def foundry_ext(*arguments: str) -> int:
    """Return the exit code of `foundry-ext ARGUMENTS`, run in this process."""
    (command,) = entry_points(group="console_scripts", name="foundry-ext")
    return exit_code(lambda: sys.exit(command.load()()), "foundry-ext", arguments)


def exit_code(program: Callable[[], Any], name: str, arguments: tuple[str, ...]) -> int:
    """Return the code with which `program` exits when it is given the arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            program()
    return int(ended.value.code or 0)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Return the loss of every batch in the lines of a metrics file."""
    key = "loss/train/total"
    return {line["batch"]: line[key] for line in lines if key in line}


# --- runs ----------------------------------------------------------------------------------------


@RUNS
def test_a_stopped_run_goes_on(run: Stopped, folder: Path, capfd, recwarn):
    """It reaches the losses, measurements and weights of the run that was never stopped."""
    out, whole = folder / "outputs" / run.name, folder / "uninterrupted" / run.name
    before = read(out / "record.json")
    metrics, items = out / "metrics.jsonl", out / "items.jsonl"
    num_lines, num_items = len(read_lines(metrics)), len(read_lines(items))
    assert train(*run.arguments) == 0
    assert f"outputs/{run.name}/checkpoints/{run.checkpoint}" in capfd.readouterr().err
    anew = [str(one.message) for one in recwarn if "not in the state_dict" in str(one.message)]
    assert not anew, "a part of the run began anew"

    lines = read_lines(metrics)[num_lines:]
    resumed, expected = losses(lines), losses(read_lines(whole / "metrics.jsonl"))
    assert list(resumed) == list(range(run.batch, BATCHES)), "only the steps that were left"
    assert resumed == pytest.approx({batch: expected[batch] for batch in resumed}, rel=LOSSES)
    ours, theirs = load_file(out / "hf" / run.weights), load_file(whole / run.weights)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.linalg.norm(ours[name] - weight) <= WEIGHTS * torch.linalg.norm(weight), name

    record, expected_record = read(out / "record.json"), read(whole / "record.json")
    assert (record["status"], record["steps"]) == ("finished", BATCHES)
    assert record["started"] == before["started"]
    assert record["tokens"] == expected_record["tokens"]
    assert record["data"] == expected_record["data"]
    for one, other in zip(record["evaluations"], expected_record["evaluations"], strict=True):
        assert one["step"] == other["step"]
        for kind in ("metrics", "learning", "forgetting"):
            assert one[kind] == pytest.approx(other[kind], rel=1e-3, abs=LOSSES)

    assert gone("record", record_keys(record)) == set()
    assert gone("metrics", metric_keys(lines), run.name) == set()
    (checkpoint,) = (out / "checkpoints").glob(f"*-ba{BATCHES}-rank0.pt")
    assert gone("checkpoint", checkpoint_keys(checkpoint), run.name) == set()
    now = item_keys(read_lines(items)[num_items:])
    for name in NAMES["items"]:
        assert gone("items", now[name], name) == set()


def test_other_settings_are_still_told_from_those_of_the_checkpoint(folder: Path, capfd):
    assert train(*LORA.arguments, "optimizer.lr=0.5", "seed=18") != 0
    said = capfd.readouterr().err
    assert re.search("seed.*17.*18", said) and re.search(r"optimizer\.lr.*0\.004.*0\.5", said)
    assert not re.search("betas|foundry_ext.data.prompts", said), "only what was changed"


@RUNS
def test_a_checkpoint_holds_no_class_of_this_package(run: Stopped, folder: Path):
    """Modules may move, because checkpoints hold no class; export would refuse one."""
    path = folder / "outputs" / run.name / "checkpoints" / run.checkpoint
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    assert classes and not [name for name in classes if name.startswith("foundry_ext")]
    assert foundry_ext("export", str(path), "export") == 0
    exported = load_file(folder / "export" / run.weights)
    whole = load_file(folder / "uninterrupted" / run.name / run.weights)
    assert {name: x.shape for name, x in exported.items()} == {
        name: x.shape for name, x in whole.items()
    }
    # Composer's own export imports the class that this names.
    kind = load_checkpoint(path)["state"]["integrations"]["huggingface"]["model"]["config"]["class"]
    assert kind in NAMES["classes"]
    assert isinstance(pkgutil.resolve_name(kind), type)


# --- records -------------------------------------------------------------------------------------


def test_records_compare_as_they_did(folder: Path):
    runs = sorted(str(path.parent) for path in Path("outputs").glob("*-seed_*/record.json"))
    assert len(runs) == 8
    assert foundry_ext("compare", *runs, "--out", "new") == 0
    now, before = (read(folder / name / "comparison.json") for name in ("new", "report"))
    check_figures(now, before)


def check_figures(now: Any, before: Any, place: str = "comparison") -> None:
    """Compare the old figures, but not sentences, whose wording may change; keys may be added."""
    if isinstance(before, dict):
        assert before.keys() <= now.keys(), place
        for key in before.keys() - {"sentence"}:
            check_figures(now[key], before[key], f"{place}.{key}")
    elif isinstance(before, list):
        assert len(now) == len(before), place
        for index, (one, other) in enumerate(zip(now, before, strict=True)):
            check_figures(one, other, f"{place}.{index}")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=1e-6, abs=1e-12), place
    else:
        assert now == before, place


# --- sweeps --------------------------------------------------------------------------------------


class InThisProcess:
    """A run of a sweep that trains in this process instead of a separate one."""

    pid: int | None = None

    def __init__(self, job: Job):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in job.environment.items():
                patch.setenv(name, value)
            self.code = train(*job.arguments)

    def poll(self) -> int | None:
        return self.code


def sweep(file: str) -> list[str]:
    """Run the sweep to its end in this process and return the YAMLs and overrides of its runs."""
    started: list[str] = []

    def start(_: SubprocessLauncher, job: Job) -> InThisProcess:
        started.append(" ".join(job.arguments))
        return InThisProcess(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubprocessLauncher, "start", start)
        assert foundry_ext("sweep", file, "--yes", "--launcher", "subprocess") == 0
    return started


def test_a_killed_sweep_goes_on(folder: Path, capfd):
    low, middle, high = (f"rslora-learning_rate_{name}" for name in ("low", "middle", "high"))
    records = {name: folder / "outputs" / name / "record.json" for name in (low, middle, high)}
    finished = records[low].read_bytes()
    assert sweep("rates.yaml") == [
        f"config=rslora.yaml variables.learning_rate={name}" for name in ("middle", "high")
    ]
    assert records[low].read_bytes() == finished
    assert f"outputs/{middle}/checkpoints/ep1-ba8-rank0.pt" in capfd.readouterr().err
    for name in (middle, high):
        record = read(records[name])
        assert (record["status"], record["steps"]) == ("finished", BATCHES)
    state = read(folder / "outputs/sweeps/rates/state.json")
    assert {name: (run["status"], run["attempts"]) for name, run in state["runs"].items()} == {
        low: ("finished", 1),
        middle: ("finished", 2),
        high: ("finished", 1),
    }
    assert gone("sweep_state", sweep_keys(state)) == set()


def test_a_finished_sweep_is_finished(folder: Path):
    """The records of all four methods have the names and settings that their YAMLs give."""
    assert sweep("methods.yaml") == []
