"""The page for users of `hf_causal_lm` has every key, and those it calls refused are refused."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from llmfoundry.data.finetuning import dataloader as stock
from llmfoundry.models.hf.hf_causal_lm import ComposerHFCausalLM

from foundry_ext.data.config import check_keys
from foundry_ext.data.dataloader import build_packed_finetuning_dataloader
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.utils.errors import UserError

PAGE = Path(__file__).parents[2] / "docs/how-to/from-hf-causal-lm.md"


def table(title: str) -> dict[str, str]:
    """Return key -> what the page says, of the table whose first column has the title."""
    found = re.search(
        rf"^\| {re.escape(title)} \| here \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE.read_text(), re.M
    )
    assert found is not None, title
    said = {}
    for row in found[1].splitlines():
        names, here = row.strip("| ").split(" | ", 1)
        said |= dict.fromkeys(re.findall(r"`(\w+)`", names), here)
    return said


def names(function: Any) -> set[str]:
    return {*inspect.signature(function).parameters} - {"self", "kwargs"}


def test_every_key_of_the_model_is_listed():
    said, ours = table("`model` of `hf_causal_lm`"), names(ComposerSmolLM2.__init__)
    assert said.keys() == names(ComposerHFCausalLM.__init__) - {"tokenizer"}
    gone = {key for key in said if key not in ours}
    assert gone == {key for key, here in said.items() if "refused; `attention_backend`" in here}
    theirs = inspect.signature(ComposerHFCausalLM.__init__).parameters
    for key, here in said.items():
        if here.startswith("kept") and key in ours:
            own = inspect.signature(ComposerSmolLM2.__init__).parameters[key]
            assert own.default == theirs[key].default, key


@pytest.mark.parametrize("key", ["use_train_metrics", "load_in_8bit", "additional_train_metrics"])
def test_what_the_page_calls_refused_is_refused(key: str):
    assert "refused" in table("`model` of `hf_causal_lm`")[key]
    value = ["LanguagePerplexity"] if key.startswith("additional") else True
    with pytest.raises(UserError, match=r"use_train_metrics|load_in_8bit"):
        ComposerSmolLM2(None, "smollm2-135m", pretrained=False, **{key: value})  # pyright: ignore


def test_every_key_of_the_dataset_is_listed_and_treated_so():
    said = table("`dataset` of `finetuning`")
    stock_keys = names(stock._validate_config) - {"allowed_dataset_keys"}
    assert said.keys() == stock_keys | stock._ALLOWED_DATASET_KEYS | {"split", "shuffle_seed"}
    for key, here in said.items():
        section = {"max_seq_len": 8, key: {"max_seq_len": 8, "shuffle_seed": 1}.get(key, True)}
        if here.startswith("kept"):
            check_keys(section, "packed_finetuning")
        else:
            with pytest.raises(UserError, match=key):
                check_keys(section, "packed_finetuning")


def test_every_key_of_the_loader_is_listed():
    keys = names(stock.build_finetuning_dataloader) - {"tokenizer", "device_batch_size", "dataset"}
    assert table("the loader").keys() == keys
    assert keys <= names(build_packed_finetuning_dataloader)
