"""Every value of a sweep file arrives in the run's configuration as it is, by either way."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.sdk.lib.config_util import save_config_file_from_dict

from foundry_ext.config.loading import load_config, split_arguments
from foundry_ext.config.spelling import EXPONENT
from foundry_ext.sweeps.file import command_line, expand, read_sweep
from tests.sweeps.kit import RUN_YAML

# What a YAML file can hold; text with ${ is a reference, as everywhere in a run's YAML.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda text: "${" not in text and not EXPONENT.fullmatch(text)  # 1e4 without quotes is a number
)
PLAIN = TEXTS | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.text("ab c:#'\"1", min_size=1, max_size=4)
VALUES = st.recursive(
    PLAIN,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=5,
)
AWKWARD = [
    *("#b", "a: b", "a\nb", "", " ", "null", "~", "True", "no", "17", "1.5", "1_0", "0x1f", "1e5x"),
    *(
        "'",
        '"',
        "\\",
        "\\n",
        "a, b",
        "[a",
        "{a",
        "- a",
        "? a",
        "! a",
        "& a",
        "* a",
        "a #b",
        "=",
        "=",
    ),
    *(
        "2024-01-01",
        "12:30:45",
        "\u2028",
        "\x7f",
        "\0",
        "\U0001f600",
        "\t",
        "%",
        "`a`",
        "@a",
        ".inf",
    ),
]
CASES = [*AWKWARD, ["x y"], ["a\nb", "#"], {"a b": "#c", "x": [1, {"y": "no"}]}, ["1"], {}, []]


@contextlib.contextmanager
def world() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        text = RUN_YAML.replace("NAME", "run").replace("behaviour: good", "value: 0")
        Path(folder, "a.yaml").write_text(text)
        yield Path(folder)


def run_of(folder: Path, content: Any) -> tuple[Any, dict[str, Any]]:
    path = folder / "sweep.yaml"
    parameters = {"config": {"value": f"{folder}/a.yaml"}, "variables.value": content}
    sweep = {"program": "train.py", "method": "grid", "parameters": parameters}
    command = ["${program}", "${args_no_hyphens}"]
    path.write_text(yaml.safe_dump({**sweep, "command": command}, sort_keys=False))
    read = read_sweep(path)
    return read, expand(read)[0]


def arrives(arguments: list[str]) -> Any:
    files, overrides = split_arguments(arguments)
    config: Any = OmegaConf.to_container(load_config(files[0], overrides), resolve=False)
    return config["variables"]["value"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_a_value_arrives_as_it_is(value: Any):
    with world() as folder:
        sweep, run = run_of(folder, {"value": value})
        arguments = command_line(sweep, run)[1:]
        assert repr(arrives(arguments)) == repr(value)


@pytest.mark.parametrize("value", CASES, ids=repr)
def test_an_awkward_value_arrives_by_w_and_b_s_agent_too(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The agent's command line has lost the quotes; its file of the run's values has not."""
    with world() as folder:
        sweep, run = run_of(folder, {"values": [value]})
        assert repr(arrives(command_line(sweep, run)[1:])) == repr(value)
        sent = json.loads(json.dumps({name: {"value": one} for name, one in run.items()}))
        file = tmp_path / "config-one.yaml"
        save_config_file_from_dict(str(file), sent)
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", os.fspath(file))
        arguments = create_sweep_command_args({"args": sent})["args_no_hyphens"]
        assert repr(arrives(arguments)) == repr(value)


def test_a_reference_stays_one(tmp_path: Path):
    with world() as folder:
        sweep, run = run_of(folder, {"value": "${seed}"})
        files, overrides = split_arguments(command_line(sweep, run)[1:])
        assert load_config(files[0], overrides).variables.value == 17


@pytest.mark.parametrize("written", ["1e-3", "0.001"])
def test_a_number_is_one_as_in_a_run_s_yaml(written: str, tmp_path: Path, monkeypatch):
    with world() as folder:
        sweep, _run = run_of(folder, {"value": 0})
        path = folder / "sweep.yaml"
        path.write_text(path.read_text().replace("value: 0", f"value: {written}"))
        sweep = read_sweep(path)
        assert arrives(command_line(sweep, expand(sweep)[0])[1:]) == 0.001
        file = tmp_path / "config-one.yaml"  # for W&B, 1e-3 is a text
        save_config_file_from_dict(str(file), {"variables.value": {"value": written}})
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", os.fspath(file))
        assert arrives([f"{folder}/a.yaml", f"variables.value={written}"]) in (0.001, "0.001")


@pytest.mark.parametrize(
    ("first", "second"), [("0.001", "1e-3"), ("1", "1.0"), ("10", "1_0"), ("0.5", ".5")]
)
def test_a_number_in_two_spellings_is_named(tmp_path: Path, first: str, second: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "program: train.py\nmethod: grid\nparameters:\n  optimizer:\n    parameters:\n"
        f"      lr: {{values: [{first}, 7, {second}]}}\n"
    )
    with pytest.raises(ValueError) as raised:
        read_sweep(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: parameter optimizer.lr") and "\n" not in message
    assert first in message and second in message


def test_a_number_and_its_text_are_two_values(tmp_path: Path):
    with world() as folder:
        sweep, _ = run_of(folder, {"values": [1, "1", 1]})
        assert [run["variables.value"] for run in expand(sweep)] == [1, "1"]


@pytest.mark.parametrize("value", ["!!binary aGk=", "!!set {a, b}", "[!!binary aGk=]"])
def test_other_kinds_are_refused(tmp_path: Path, value: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"program: train.py\nmethod: grid\nparameters:\n  seed:\n    value: {value}\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml: parameter seed: .*neither a text"):
        read_sweep(path)
