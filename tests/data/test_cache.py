"""What is tokenised is kept on disk, under all that decides it; a fingerprint knows it again."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from llmfoundry.data.finetuning.tasks import dataset_constructor

from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.data.sources import load_rows
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows

FORMATTING = """
calls = 0

def helper(text):
    return text

def formatting(row):
    global calls
    calls += 1
    return {"prompt": helper(row["prompt"]), "response": row["response"]}
"""


class Counted:
    """Tokenises a file's rows, and says how many rows were formatted to do so."""

    def __init__(self, path: Path, module_file: Path):
        self.path, self.module_file = path, module_file
        self.module = importlib.import_module(module_file.stem)

    def __call__(self, tokenizer, function="formatting", **settings) -> tuple[Documents, int]:
        settings = TokenizeSettings(**{"max_seq_len": 64, **settings})
        before = self.module.calls
        rows = load_rows(str(self.path), "train")
        preprocess = getattr(self.module, function)
        documents = tokenize_rows(rows, tokenizer, settings, preprocess=preprocess)
        return documents, self.module.calls - before

    def edit(self, old: str, new: str):
        text = self.module_file.read_text()
        assert old in text
        self.module_file.write_text(text.replace(old, new))
        calls = self.module.calls
        importlib.invalidate_caches()
        sys.modules.pop(self.module.__name__)
        shutil.rmtree(self.module_file.parent / "__pycache__", ignore_errors=True)
        self.module = importlib.import_module(self.module_file.stem)
        self.module.calls = calls


@pytest.fixture
def counted(tmp_path, monkeypatch, make_rows, write_jsonl) -> Counted:
    module_file = tmp_path / f"formatting_{tmp_path.name}.py"
    module_file.write_text(FORMATTING)
    monkeypatch.syspath_prepend(tmp_path)
    return Counted(write_jsonl(make_rows(20)), module_file)


def contents(documents: Documents) -> list[list[int]]:
    return [documents[i].input_ids.tolist() for i in range(len(documents))]


def test_the_second_time_nothing_is_tokenised(counted: Counted, tokenizer):
    first, calls = counted(tokenizer)
    assert calls == 20
    tokenizer("a use of it, which changes what pickling it gives", padding=True, truncation=True)
    second, calls = counted(tokenizer)
    assert calls == 0
    assert contents(second) == contents(first)
    assert second.counts == first.counts
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"max_seq_len": 65},
        {"overlong": "drop"},
        {"target_prompts": "all"},
        {"target_responses": "all"},
    ],
)
def test_another_setting_misses_the_cache(counted: Counted, tokenizer, changed):
    assert counted(tokenizer)[1] == 20
    assert counted(tokenizer, **changed)[1] == 20
    assert counted(tokenizer)[1] == counted(tokenizer, **changed)[1] == 0


def test_another_tokenizer_misses_the_cache(counted: Counted, tokenizer):
    assert counted(tokenizer)[1] == 20
    tokenizer.add_tokens(["bird"])
    assert counted(tokenizer)[1] == 20
    tokenizer.eos_token = "<|im_end|>"
    documents, calls = counted(tokenizer)
    assert calls == 20
    assert documents[0].input_ids[-1] == 2


def test_another_chat_template_misses_the_cache(counted: Counted, tokenizer):
    assert counted(tokenizer)[1] == 20
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    assert counted(tokenizer)[1] == 20
    assert counted(tokenizer)[1] == 0


def test_an_edited_preprocessing_function_misses_the_cache(counted: Counted, tokenizer):
    """Pickled, an importable function is no more than its name: an edit would go unseen."""
    first, calls = counted(tokenizer)
    assert calls == 20
    counted.edit('row["response"]}', '"yes " + row["response"]}')
    second, calls = counted(tokenizer)
    assert calls == 20
    assert contents(second) != contents(first)
    counted.edit("return text", 'return text + "?"')
    third, calls = counted(tokenizer)
    assert calls == 20
    assert contents(third) != contents(second)


def test_another_mapping_of_columns_misses_the_cache(tokenizer, make_rows, write_jsonl):
    rows = load_rows(str(write_jsonl(make_rows(5))), "train")
    settings = TokenizeSettings(max_seq_len=64)
    one, other = (
        tokenize_rows(rows, tokenizer, settings, preprocess=preprocess)
        for preprocess in map(
            dataset_constructor.get_preprocessing_fn_from_dict,
            (
                {"prompt": "prompt", "response": "response"},
                {"prompt": "response", "response": "prompt"},
            ),
        )
    )
    assert contents(one) != contents(other)


def test_other_rows_in_the_same_file_miss_the_cache(counted: Counted, tokenizer, make_rows):
    assert counted(tokenizer)[1] == 20
    rows = make_rows(21, seed=9)
    counted.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, calls = counted(tokenizer)
    assert calls == len(documents) == 21


def fingerprint_of(path: Path, tokenizer, **settings) -> str:
    settings = TokenizeSettings(**{"max_seq_len": 64, **settings})
    return tokenize_rows(load_rows(str(path), "train"), tokenizer, settings).fingerprint


def test_the_fingerprint_is_the_datas_not_the_files(tokenizer, make_rows, write_jsonl):
    """Else a run could not be resumed on another machine, or after its file was written again."""
    path = write_jsonl(make_rows(20))
    first = fingerprint_of(path, tokenizer)
    copy = path.parent / "elsewhere" / "data.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert fingerprint_of(copy, tokenizer) == first
    os.utime(path, (1, 1))
    assert fingerprint_of(path, tokenizer) == first


def test_the_fingerprint_sees_tokens_flags_and_lengths(tokenizer):
    def fingerprint(ids, flags) -> str:
        zeros = [0] * len(ids)
        columns = {"input_ids": ids, "has_loss": flags, "outcome": zeros, "num_cut": zeros}
        return Documents(datasets.Dataset.from_dict(columns, features=FEATURES)).fingerprint

    ids, flags = [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]]
    first = fingerprint(ids, flags)
    assert fingerprint(ids, flags) == first
    assert fingerprint([[1, 2, 9], [4, 5]], flags) != first
    assert fingerprint(ids, [[0, 0, 1], [0, 1]]) != first
    assert fingerprint([[1, 2], [3, 4, 5]], [[0, 1], [1, 0, 1]]) != first
    assert fingerprint(ids[::-1], flags[::-1]) != first


def test_several_processes_make_the_same_table(tokenizer, make_rows, write_jsonl, monkeypatch):
    rows = load_rows(str(write_jsonl(make_rows(2100, longest=6))), "train")
    settings = TokenizeSettings(max_seq_len=16)
    alone = tokenize_rows(rows, tokenizer, settings, num_proc=1)
    monkeypatch.setattr("foundry_ext.data.tokenize._FORMAT_VERSION", -1)  # past the cache
    several = tokenize_rows(rows, tokenizer, settings, num_proc=2)
    assert len(several._chunks) > len(alone._chunks)
    np.testing.assert_array_equal(several.lengths, alone.lengths)
    assert several.counts == alone.counts
    assert several.fingerprint == alone.fingerprint
