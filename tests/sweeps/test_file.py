"""W&B's sweep format: refused files, and the runs of a file in W&B's order and spelling."""

import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from foundry_ext.sweeps.file import DEFAULT_COMMAND, command_line, expand, read_sweep
from foundry_ext.sweeps.parameters import DISTRIBUTIONS, REFUSED, keys_of, parameter


def write(folder: Path, content: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return path


def make(folder: Path, parameters: dict[str, Any], **more: Any):
    content = {"program": "train.py", "method": "grid", "parameters": parameters, **more}
    return read_sweep(write(folder, content))


def test_a_grid_goes_by_name_and_the_last_varies_fastest(tmp_path: Path):
    # The order of wandb's own grid search (`sweeps` 0.2.0), which sorts the names at every level.
    sweep = make(
        tmp_path,
        {
            "seed": {"values": [18, 17, 18]},
            "config": {"values": ["b.yaml", "a.yaml"]},
            "optimizer": {"parameters": {"z": {"value": 3}, "lr": {"min": 1, "max": 2}}},
        },
    )
    assert expand(sweep) == [
        {"config": config, "optimizer": {"lr": lr, "z": 3}, "seed": seed}
        for config in ("b.yaml", "a.yaml")
        for lr in (1, 2)
        for seed in (18, 17)
    ]
    assert len(expand(sweep, num_runs=3)) == 3
    assert len(expand(make(tmp_path, {"a": {"min": 1, "max": 9}}, run_cap=4))) == 4


@pytest.mark.parametrize("target", [0.5, 0, "low"])
def test_a_target_is_refused_and_the_rest_of_the_metric_is_not(tmp_path: Path, target):
    parameters, metric = {"a": {"values": [1, 2]}}, {"name": "loss", "goal": "minimize"}
    assert len(expand(make(tmp_path, parameters, metric=metric))) == 2
    assert len(expand(make(tmp_path, parameters, metric={**metric, "target": None}))) == 2
    with pytest.raises(ValueError, match=rf"metric.target, {target!r}: .*`wandb sweep`, or remove"):
        make(tmp_path, parameters, metric={**metric, "target": target})


def test_steps_of_a_grid_are_those_of_arange(tmp_path: Path):
    entry = {"distribution": "q_uniform", "min": 0, "max": 10, "q": 3}
    assert [run["a"] for run in expand(make(tmp_path, {"a": entry}))] == [0, 3, 6, 9]


@pytest.mark.parametrize("macro", ["args", "args_no_hyphens", "args_no_boolean_flags", "args_json"])
def test_arguments_are_spelt_as_by_wandb_agent(tmp_path: Path, macro: str):
    values = {
        "flag": True,
        "lr": 1e-05,
        "model": {"peft_config": {"r": 16, "names": ["q", "it's"]}},
        "no": False,
        "text": "a b; rm $HOME",
    }
    parameters = {name: {"value": value} for name, value in values.items()}
    sweep = make(tmp_path, parameters, command=["${program}", f"${{{macro}}}"])
    theirs = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    assert command_line(sweep, expand(sweep)[0]) == ["train.py", *theirs[macro]]


def test_the_default_command_is_that_of_wandb_agent(tmp_path: Path):
    from wandb.sdk.launch.sweeps.utils import DEFAULT_SWEEP_COMMAND

    assert list(DEFAULT_COMMAND) == DEFAULT_SWEEP_COMMAND
    sweep = make(tmp_path, {"a": {"value": 1}})
    command = command_line(sweep, {"a": 1}, interpreter="python3")
    assert command == ["/usr/bin/env", "python3", "train.py", "--a=1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, "needs W&B's server"),
        ({"method": "best"}, "'best', is neither grid nor random"),
        ({"parameter": {}}, "unknown key, 'parameter'; known: command"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate needs W&B's server"),
        ({"program": "../train.py"}, "program, '../train.py', is outside this folder"),
        ({"program": "/bin/sh"}, "program, '/bin/sh', is outside this folder"),
        ({"run_cap": 0}, "run_cap, 0, is not"),
        ({"name": "../.."}, "name, '../..', has no letter"),
        ({"command": "python train.py"}, "is not a list"),
        ({"command": ["${program}", "${envvar:HOME}"]}, "is no macro known here"),
        ({"command": ["${program}", "x${args}"]}, "is no macro known here"),
        ({"command": ["python", "${args}"]}, "does not hold ${program}"),
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": {"a": {"parameters": {}}}}, "parameter a: parameters is empty"),
        ({"parameters": {"a": 3}}, "parameter a: no value"),
        ({"parameters": {"a": {}}}, "parameter a: no value"),
        (
            {"parameters": {"a": {"values": []}}},
            "parameter a: values, [], must be a list of values",
        ),
        ({"parameters": {"a": {"values": 3}}}, "parameter a: values, 3, must be a list of values"),
        ({"parameters": {"a": {"valeus": [1]}}}, "parameter a: unknown key, 'valeus'"),
        ({"parameters": {"a": {"value": None}}}, "null reaches a run as the text None"),
        ({"parameters": {"a": {"values": [{"b": None}]}}}, "null reaches a run as the text None"),
        ({"parameters": {"a": {"value": 1, "min": 2}}}, "constant does not take min"),
        ({"parameters": {"a": {"min": 1}}}, "uniform needs max"),
        ({"parameters": {"a": {"min": 1, "max": 0.5}}}, "min, 1, is not below max"),
        ({"parameters": {"a": {"min": 1.0, "max": 2}}}, "uniform has no countable values"),
        ({"parameters": {"a": {"distribution": "zipf"}}}, "unknown distribution, 'zipf'"),
        ({"parameters": {"a": {"distribution": REFUSED[0]}}}, "only to W&B's server"),
        ({"parameters": {"a b": {"value": 1}}}, "'a b' is not a name"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}, "value": 2}}}, "stands alone"),
        (
            {"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
            "are not 2 numbers that sum to 1",
        ),
    ],
)
def test_mistakes_are_one_line_with_file_and_place(tmp_path: Path, changes: Any, message: str):
    content = {"program": "train.py", "method": "grid", "parameters": {"seed": {"value": 1}}}
    path = write(tmp_path, {**content, **changes})
    with pytest.raises(ValueError) as raised:
        read_sweep(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_text_for_a_number_is_explained():
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1, which W&B's own reader follows
    with pytest.raises(ValueError, match=r"min, '1e-4', is not a number; .* write 1.0e-4"):
        parameter(("lr",), {"min": "1e-4", "max": 1.0})


@pytest.mark.parametrize("text", ["", "- a\n", "a: [1,\n", "3\n"])
def test_files_that_are_no_sweep_are_refused(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match=r"sweep\.yaml: not "):
        read_sweep(write(tmp_path, text))


def test_a_missing_file_and_a_missing_key_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such sweep file"):
        read_sweep(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="program is missing"):
        read_sweep(write(tmp_path, {"method": "grid", "parameters": {"a": {"value": 1}}}))


def test_a_sweep_is_named_after_its_file_unless_it_says_so(tmp_path: Path):
    folder = tmp_path / "learning-rates"
    folder.mkdir()
    assert make(folder, {"a": {"value": 1}}).name == "learning-rates"
    assert make(folder, {"a": {"value": 1}}, name="My sweep/1").name == "My-sweep-1"


def test_a_random_sweep_is_the_same_for_a_seed_and_never_repeats_a_run(tmp_path: Path):
    parameters = {"lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}}
    sweep = make(tmp_path, {**parameters, "a": {"values": [1, 2]}}, method="random", run_cap=5)
    assert expand(sweep) == expand(sweep, seed=17)
    assert expand(sweep) != expand(sweep, seed=18)
    assert expand(sweep)[:3] == expand(sweep, num_runs=3)
    few = make(tmp_path, {"a": {"values": [1, 2, 3]}}, method="random")
    assert sorted(run["a"] for run in expand(few, num_runs=3)) == [1, 2, 3]
    with pytest.raises(ValueError, match="4 runs asked for, but 3 different ones"):
        expand(few, num_runs=4)
    with pytest.raises(ValueError, match="no end; set run_cap or give --runs"):
        expand(few)


def drawn(entry: dict[str, Any], count: int = 4000) -> list[Any]:
    rng = random.Random(0)
    one = parameter(("a",), entry)
    return [one.draw(rng) for _ in range(count)]


def test_draws_have_the_distribution_they_are_named_after():
    log = [
        math.log10(x) for x in drawn({"distribution": "log_uniform_values", "min": 1e-4, "max": 1})
    ]
    assert min(log) >= -4 and max(log) <= 0
    assert statistics.mean(log) == pytest.approx(-2, abs=0.1)  # not that of the values, .11
    normal = drawn({"distribution": "normal", "mu": 3, "sigma": 2})
    assert statistics.mean(normal) == pytest.approx(3, abs=0.15)
    assert statistics.stdev(normal) == pytest.approx(2, abs=0.15)
    whole = Counter(drawn({"min": 1, "max": 4}))
    assert set(whole) == {1, 2, 3, 4} and min(whole.values()) > 800
    weighted = Counter(drawn({"values": ["a", "b"], "probabilities": [0.9, 0.1]}))
    assert weighted["a"] / 4000 == pytest.approx(0.9, abs=0.03)
    steps = drawn({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25})
    assert set(steps) == {0, 0.25, 0.5, 0.75, 1}
    halves = statistics.mean(drawn({"min": 0.0, "max": 1.0}))
    assert halves == pytest.approx(0.5, abs=0.03)
    logged = [math.log(x) for x in drawn({"distribution": "log_normal", "mu": 1, "sigma": 0.5})]
    assert statistics.mean(logged) == pytest.approx(1, abs=0.05)
    exponents = [math.log(x) for x in drawn({"distribution": "log_uniform", "min": -3, "max": -1})]
    assert statistics.mean(exponents) == pytest.approx(-2, abs=0.05)  # min and max are exponents


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_draws_something_json_can_hold(name: str):
    example = {"min": 1, "max": 5, "value": 3, "values": [1, 2], "probabilities": [0.5, 0.5]}
    keys = keys_of(name)
    entry = {key: example[key] if default is ... else default for key, default in keys.items()}
    json.dumps(drawn({"distribution": name, **entry}, 10))
