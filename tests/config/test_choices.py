"""Choices from tables in YAMLs that are not ours."""

from pathlib import Path

import pytest

from foundry_ext.config.loading import load_config
from foundry_ext.utils.errors import UserError

BASE = """
max_seq_len: 32
model:
  name: smollm2_packed
  pretrained_model_name_or_path: ${variables.sizes[${variables.size}].model}
tokenizer: {name: tok}
train_loader:
  name: packed_text
  dataset: {hf_name: "${variables.data[${variables.size}][${variables.part}]}"}
callbacks: {lr_monitor: null, guard: {}}
optimizer: {name: decoupled_adamw, lr: 1e-3}
scheduler: {name: constant}
max_duration: 1ep
global_train_batch_size: 4
device_train_microbatch_size: 1
variables:
  size: small
  part: a
  sizes: {small: {model: x}, large: {model: y}, 1.7b: {model: z}}
  data: {small: {a: 1.jsonl, b: 2.jsonl}, large: 3.jsonl, 1.7b: {c: 4.jsonl}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_a_choice_is_looked_up(path: Path):
    config = load_config(path, ["variables.size=1.7b", "variables.part=c"])
    assert config.model.pretrained_model_name_or_path == "z"
    assert config.train_loader.dataset.hf_name == "4.jsonl"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["variables.size=larg"], "variables.size, 'larg', is not in variables.sizes; known: "),
        (["variables.part=c"], "variables.part, 'c', is not in variables.data; known: a, b"),
        (["variables.size=1.7b"], "variables.part, 'a', is not in variables.data; known: c"),
        (["variables.size=null"], "variables.size, 'None', is not in variables.sizes"),
        (["variables.size=large"], "train_loader.dataset.hf_name"),  # not a table there
    ],
)
def test_a_wrong_choice_names_those_there_are(path: Path, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message) as error:
        load_config(path, overrides)
    assert str(error.value).startswith(f"{path}: ")


def test_a_value_of_one_s_own_is_offered_for_numbers_only():
    file = Path("yamls/smollm2_lora.yaml").absolute()
    for value, offered in (("3e-4", True), ("hihg", False)):
        with pytest.raises(UserError, match=r"is not in variables\.learning_rates") as error:
            load_config(file, [f"variables.learning_rate={value}"])
        assert ("for a value of your own" in str(error.value)) == offered


def test_null_in_a_file_is_a_callback_with_its_defaults_and_by_an_override_none(path: Path):
    assert dict(load_config(path, []).callbacks) == {"lr_monitor": None, "guard": {}}
    assert dict(load_config(path, ["callbacks.guard=null"]).callbacks) == {"lr_monitor": None}
    both = load_config(path, ["callbacks.guard=null", "callbacks.lr_monitor=null"])
    assert dict(both.callbacks) == {}
    again = load_config(path, ["callbacks.guard=null", "callbacks.guard.skip=true"])
    assert dict(again.callbacks.guard) == {"skip": True}


def test_a_file_is_read_again_when_it_has_changed(path: Path):
    load_config(path, []).optimizer.lr = 3
    assert load_config(path, []).optimizer.lr == 1e-3
    path.write_text(BASE.replace("1e-3", "2e-3"))
    assert load_config(path, []).optimizer.lr == 2e-3
