"""Every shipped sweep: its files, keys and commands, and its README's number of runs."""

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from foundry_ext.adapters.methods import method_of_config
from foundry_ext.comparison.fairness import differences
from foundry_ext.config.run_name import SWEEP_VARIABLES
from foundry_ext.sweeps.file import expand, read_sweep
from foundry_ext.sweeps.plan import PlannedRun, plan
from foundry_ext.utils.nested import get

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "experiments").glob("*/*.yaml"))
# What a YAML does not have and a run may be given all the same.
NEW_KEYS = {"model.config_overrides.attention_dropout"}
NAMES = [str(path.relative_to("experiments")) for path in SWEEPS]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in SWEEP_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@cache
def planned(path: Path) -> list[PlannedRun]:
    """Return all runs of the sweep; ValueError if a file, key or name in it does not exist."""
    sweep = read_sweep(path)
    return plan(sweep, expand(sweep))


def test_the_questions_are_there():
    folders = {path.parts[1] for path in SWEEPS}
    assert folders >= {
        *("quickstart", "paper", "ranks", "learning-rates", "data-size", "replay", "regularisers")
    }
    assert len({read_sweep(path).name for path in SWEEPS}) == len(SWEEPS)


@pytest.mark.parametrize("path", SWEEPS, ids=NAMES)
def test_a_sweep_is_what_its_readme_says(path: Path):
    runs = planned(path)
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        assert run.command[:2] == ("composer", "train.py")
        assert run.command[2].startswith("config=yamls/")
        assert all(re.fullmatch(r"[a-z_.]+=.+", argument) for argument in run.command[2:])
        if run.config["model"].get("peft_config"):
            assert method_of_config(run.config["model"]["peft_config"]).effective_scale
    check_fair(runs)
    readme = path.with_name("README.md")
    if readme.exists() and path.parts[1] != "quickstart":
        (line,) = [one for one in readme.read_text().splitlines() if f"ext sweep {path}" in one]
        assert f"{len(runs)} runs" in line


def check_fair(runs: list[PlannedRun]) -> None:
    """Check that runs with the same data and settings differ only by method."""

    def what(run: PlannedRun) -> str:
        experiment = run.config["callbacks"]["run_record"]["experiment"]
        rate = {"variables.learning_rate"}
        settings = sorted((k, str(get(run.config, k))) for k in run.keys if k not in rate)
        return str((experiment, settings))

    for _, group in itertools.groupby(sorted(runs, key=what), key=what):
        configs = {run.name: run.config for run in group}
        assert differences(configs) == []


@pytest.mark.parametrize("path", SWEEPS, ids=NAMES)
def test_every_key_is_one_that_its_yamls_have(path: Path):
    parameters = yaml.safe_load(path.read_text())["parameters"]
    for file in parameters["config"]["values"]:
        config = OmegaConf.load(file)
        for key in parameters.keys() - {"config"} - NEW_KEYS:
            node: Any = OmegaConf.to_container(config)
            for part in key.split("."):
                assert part in node, f"{file} has no {key}"
                node = node[part]


def test_ranks_have_the_scales_of_the_readme():
    found: dict[tuple[str, int], set[float]] = {}
    for name in ("sweep", "rslora-fixed-alpha"):
        for run in planned(Path("experiments/ranks", f"{name}.yaml")):
            method = method_of_config(run.config["model"]["peft_config"])
            assert method.rank and method.effective_scale
            label = "fixed" if name != "sweep" else method.name
            found.setdefault((label, method.rank), set()).add(method.effective_scale)
    for label, scales in {
        "lora": (2, 2, 2),
        "dora": (2, 2, 2),
        "rslora": (8, 16, 32),
        "fixed": (32, 16, 8),
    }.items():
        assert [found[label, rank] for rank in (16, 64, 256)] == [{scale} for scale in scales]
