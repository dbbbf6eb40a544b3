"""Builders of loaders: keys, errors, and batches that hold every document exactly once."""

import json
import logging
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from llmfoundry import registry
from llmfoundry.data.dataloader import build_dataloader
from torch.utils.data import DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from foundry_ext.data.dataloader import (
    build_packed_finetuning_dataloader,
    build_packed_text_dataloader,
)
from foundry_ext.packing.algorithm import most_documents
from foundry_ext.packing.batch import join_packs, split_batch
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.data.kit import (
    assert_batches_equal,
    assert_packs_equal,
    build,
    random_packs,
    split_documents,
    walk,
)

SHARED_ROWS = Path(__file__).parents[3] / "shared/data/train/gsm8k_train.jsonl"
BUILDERS = {
    "packed_finetuning": build_packed_finetuning_dataloader,
    "packed_text": build_packed_text_dataloader,
}


@pytest.fixture
def dataset(make_rows, write_jsonl, tmp_path, monkeypatch) -> dict:
    """Return the `dataset` section for some rows, none of which is dropped or cut."""
    monkeypatch.chdir(tmp_path)  # where ranks signal one another
    path = write_jsonl(make_rows(120))
    return {"hf_name": str(path), "split": "train", "max_seq_len": 128, "pack_tokens": 256}


@pytest.fixture
def texts(write_jsonl, make_rows, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["prompt"] + row["response"]} for row in make_rows(120)]
    return {"hf_name": str(write_jsonl(rows)), "split": "train", "max_seq_len": 32}


def documents_in(batches) -> Counter:
    """Count the documents, with their labels, in batches."""
    return Counter(
        (tuple(ids), tuple(labels))
        for batch in batches
        for pack in batch
        for ids, labels in zip(split_documents(pack), split_documents(pack, "labels"), strict=True)
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_the_registry_finds_the_builders(name: str):
    assert name in registry.dataloaders
    assert registry.dataloaders.get(name) is BUILDERS[name]


def test_built_as_llm_foundry_builds_it(tokenizer, dataset):
    section = {"name": "packed_finetuning", "dataset": dataset, "num_workers": 0}
    spec = build_dataloader(section, tokenizer, 2)
    assert_batches_equal(walk(spec), walk(build(tokenizer, dataset)))


def test_composers_own_split_would_cut_the_offsets():
    """Trap 1: Composer's default split of a joined batch is wrong and raises no error."""
    from composer.core.data_spec import default_split_batch

    whole = join_packs(random_packs(4, seed=5))
    first = default_split_batch(whole, 1)[0]
    assert first["cu_seqlens"][-1] != first["input_ids"].shape[1]
    (kept,) = split_batch(whole, 1)
    assert_packs_equal(kept, whole)


def test_what_composer_reads(tokenizer, dataset):
    """Composer gets counts of documents and real tokens, a length and a distributed sampler."""
    spec = build(tokenizer, dataset, size=3)
    loader = spec.dataloader
    batches = walk(spec)
    assert len(loader) == len(batches) > 1
    assert spec.num_samples == len(loader.dataset) == 120
    assert isinstance(loader.batch_sampler, DistributedSampler)
    assert loader.batch_sampler.total_size == len(loader.dataset)
    assert loader.drop_last is False
    documents = [ids for batch in batches for pack in batch for ids in split_documents(pack)]
    labels = torch.cat([pack["labels"][0] for batch in batches for pack in batch])
    assert sum(map(spec.get_num_samples_in_batch, batches)) == len(documents) == 120
    assert sum(map(spec.get_num_tokens_in_batch, batches)) == sum(map(len, documents))
    loss_tokens = [spec.get_num_tokens_in_batch(batch, "loss_generating") for batch in batches]
    assert sum(loss_tokens) == int((labels != IGNORE_INDEX).sum())
    for batch in batches:
        for microbatch in spec.split_batch(batch, 2):
            assert type(spec.get_num_samples_in_batch(microbatch)) is int
            assert type(spec.get_num_tokens_in_batch(microbatch)) is int


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_no_token_is_lost_on_the_way(tokenizer, texts, overlong: str, make_rows, write_jsonl):
    rows = [{"text": row["response"] * 3} for row in make_rows(1500, seed=3)]
    path = str(write_jsonl(rows, "many.jsonl"))
    texts = {**texts, "hf_name": path, "overlong": overlong, "pack_tokens": 100, "shuffle": True}
    spec = build(tokenizer, texts, name="packed_text")
    documents = spec.dataloader.dataset.documents
    given = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)
    assert documents.lengths.sum() + documents.counts["tokens_cut"] == given
    for epoch in range(2):
        batches = walk(spec, epoch)
        assert sum(map(spec.get_num_tokens_in_batch, batches)) == documents.lengths.sum()
        assert max(pack["num_tokens"] for batch in batches for pack in batch) <= 100


STOCK = """
name: finetuning
dataset:
  hf_name: {folder}
  split: train
  hf_kwargs: {{}}
  preprocessing_fn:
    prompt: prompt
    response: response
  max_seq_len: 64
  allow_pad_trimming: false
  decoder_only_format: true
  target_prompts: none
  target_responses: last
  packing_ratio: null
  shuffle: true
drop_last: false
num_workers: 0
pin_memory: false
prefetch_factor: null
persistent_workers: false
timeout: 0
"""


@pytest.mark.filterwarnings("ignore")
def test_a_stock_yaml_works_with_its_name_changed(tokenizer, dataset):
    """The documents and labels are those of llm-foundry's own loader."""
    from omegaconf import OmegaConf

    folder = Path(dataset["hf_name"]).parent
    stock = OmegaConf.to_container(OmegaConf.create(STOCK.format(folder=folder)))
    padded = build_dataloader(json.loads(json.dumps(stock)), tokenizer, 4).dataloader
    theirs = Counter()
    for batch in padded:
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        ):
            row = labels[mask].tolist()
            theirs[tuple(ids[mask].tolist()), (IGNORE_INDEX, *row[1:])] += 1
    packed = {**stock, "name": "packed_finetuning"}
    packed["dataset"] |= {"pack_tokens": 256}
    assert documents_in(walk(build_dataloader(packed, tokenizer, 4))) == theirs
    assert theirs.total() == 120


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_give_the_same_batches(tokenizer, dataset, shuffle: bool):
    dataset = {**dataset, "shuffle": shuffle}
    alone = build(tokenizer, dataset)
    helped = build(tokenizer, dataset, num_workers=2)
    assert helped.dataloader.persistent_workers
    for epoch in range(2):
        assert_batches_equal(walk(alone, epoch), walk(helped, epoch))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_left_early_leaves_nothing_behind(tokenizer, dataset, num_workers: int):
    """Workers have read ahead when Composer stops, as after every evaluator's first batch."""
    dataset = {**dataset, "shuffle": True}
    spec = build(tokenizer, dataset, num_workers=num_workers)
    whole = walk(build(tokenizer, dataset), epoch=1)
    for _ in spec.dataloader:
        break
    assert_batches_equal(walk(spec, epoch=1), whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_are_left_alone(tokenizer, dataset, num_workers: int):
    """The model's dropout uses the same random numbers, however the data is read."""
    spec = build(tokenizer, {**dataset, "shuffle": True}, num_workers=num_workers)
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    walk(spec)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_equal(np.random.get_state(), before[1])
    assert random.getstate() == before[2]


def test_epochs_differ_where_shuffled_alone(tokenizer, dataset):
    fixed, shuffled = (build(tokenizer, {**dataset, "shuffle": flag}) for flag in (False, True))
    assert_batches_equal(walk(fixed, 0), walk(fixed, 1))
    first, second = walk(shuffled, 0), walk(shuffled, 1)
    with pytest.raises(AssertionError):
        assert_batches_equal(first, second)
    assert documents_in(first) == documents_in(second) == documents_in(walk(fixed))


@pytest.mark.parametrize("seed", [17, 18])
def test_without_shuffling_the_file_s_order_is_kept(tokenizer, dataset, write_jsonl, seed: int):
    rows = [{"prompt": f"row {i}:", "response": " a" * (1 + i * 7 % 40)} for i in range(40)]
    path = str(write_jsonl(rows, "ordered.jsonl"))
    dataset = {**dataset, "hf_name": path, "shuffle": False, "shuffle_seed": seed}
    batches = walk(build(tokenizer, dataset, size=1), epoch=2)
    found = [
        tokenizer.decode(ids).split(":")[0]
        for batch in batches
        for pack in batch
        for ids in split_documents(pack)
    ]
    assert found == [f"row {i}" for i in range(40)]


def test_packs_of_an_evaluation_batch(tokenizer, dataset):
    assert {len(batch) for batch in walk(build(tokenizer, dataset, size=5))} == {5}
    assert {len(b) for b in walk(build(tokenizer, {**dataset, "eval_packs": 3}, size=5))} == {3}
    assert {len(b) for b in walk(build(tokenizer, {**dataset, "eval_packs": None}, size=5))} == {5}


def test_a_pack_is_as_long_as_a_document_unless_said_otherwise(tokenizer, dataset):
    for pack_tokens in ({}, {"pack_tokens": None}):
        dataset = {key: value for key, value in dataset.items() if key != "pack_tokens"}
        batches = walk(build(tokenizer, {**dataset, **pack_tokens}))
        tokens = [pack["num_tokens"] for batch in batches for pack in batch]
        assert 64 < max(tokens) <= 128
        assert {pack["max_seqlen"] for batch in batches for pack in batch} == {128}


def test_one_shape_over_an_epoch(tokenizer, dataset):
    spec = build(tokenizer, {**dataset, "fixed_shape": True}, size=7)
    plain = walk(build(tokenizer, dataset, size=7))
    batches = walk(spec)
    shapes = {(pack["input_ids"].shape, len(pack["cu_seqlens"])) for b in batches for pack in b}
    most = most_documents(spec.dataloader.dataset.documents.lengths, 256)
    assert shapes == {((1, 256), most + 2 + 1)}  # two more fill up an empty pack
    assert most + 2 < 256 / 4
    assert documents_in(batches) == documents_in(plain)
    for key in (spec.get_num_samples_in_batch, spec.get_num_tokens_in_batch):
        assert [key(batch) for batch in batches] == [key(batch) for batch in plain]


def test_drop_last(tokenizer, dataset):
    whole, dropped = (walk(build(tokenizer, dataset, 7, drop_last=flag)) for flag in (False, True))
    assert min(pack["num_tokens"] for pack in whole[-1]) == 0, "choose another size: all is whole"
    assert_batches_equal(dropped, whole[:-1])


def test_what_is_dropped_or_cut_is_said(tokenizer, dataset, write_jsonl, make_rows, caplog):
    rows = [*make_rows(10), {"prompt": "", "response": "a"}, {"prompt": "~" * 40, "response": "a"}]
    dataset["hf_name"] = str(write_jsonl([*rows, {"prompt": "~", "response": "!" * 200}]))
    with caplog.at_level(logging.WARNING, "foundry_ext"):
        build(tokenizer, {**dataset, "max_seq_len": 40, "overlong": "truncate"})
    (message,) = [record.getMessage() for record in caplog.records]
    assert "(max_seq_len 40)" in message
    assert "1 dropped_empty" in message
    assert "1 row dropped, with an empty prompt or response; the first is row 10," in message
    assert "1 dropped_no_loss" in message
    assert "truncated" in message
    assert "tokens_cut" in message


@pytest.mark.parametrize(
    ("overlong", "texts", "what"),
    [
        ("truncate", ["a", "", "a" * 50, ""], "2 rows dropped, with an empty 'text'; .* is row 1,"),
        ("truncate", ["a" * 50, ""], "1 row dropped, with an empty 'text'; .* is row 1,"),
        ("split", ["a", "", "a" * 50], "1 row dropped, .* is row 1,"),
        ("split", ["a" * 50, ""], "1 row dropped, .* is document 2,"),
    ],
)
def test_the_first_empty_row_is_named(
    tokenizer, dataset, write_jsonl, caplog, overlong, texts, what
):
    more = {"hf_name": str(write_jsonl([{"text": one} for one in texts])), "max_seq_len": 32}
    with caplog.at_level(logging.WARNING, "foundry_ext"):
        build(tokenizer, {**dataset, **more, "overlong": overlong}, name="packed_text")
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(what, message)


def test_nothing_is_said_where_nothing_is_lost(tokenizer, dataset, caplog):
    with caplog.at_level(logging.WARNING, "foundry_ext"):
        build(tokenizer, dataset)
    assert not caplog.records


def test_plain_text_is_split_unless_said_otherwise(tokenizer, texts):
    for overlong in ({}, {"overlong": None}):
        counts = build(
            tokenizer, {**texts, **overlong}, name="packed_text"
        ).dataloader.dataset.documents.counts
        assert counts["split"] > counts["truncated"] == 0
    cut = build(tokenizer, {**texts, "overlong": "truncate"}, name="packed_text")
    assert cut.dataloader.dataset.documents.counts["truncated"] > 0


def test_holdout_through_the_builder(tokenizer, dataset, write_jsonl):
    rows = [{"q": f"q{i % 40}", "prompt": f"q{i % 40} {i}", "response": "a"} for i in range(120)]
    dataset["hf_name"] = str(write_jsonl(rows, "shared.jsonl"))
    dataset["preprocessing_fn"] = {"prompt": "prompt", "response": "response"}
    sides = []
    for part in ("train", "eval"):
        holdout = {"by": "q", "fraction": 0.3, "part": part}
        batches = walk(build(tokenizer, {**dataset, "holdout": holdout}))
        texts = [tokenizer.decode(ids) for ids, _ in documents_in(batches)]
        sides.append({text.split()[0] for text in texts})
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


ERRORS = {
    "unknown key": (
        {"max_seqlen": 1},
        "unknown key dataset.max_seqlen, did you mean .max_seq_len.\\? the keys are .*max_seq_len",
    ),
    "packing ratio": ({"packing_ratio": 2.0}, "replace dataset.packing_ratio by .*pack_tokens"),
    "ratio auto": ({"packing_ratio": "auto"}, "replace dataset.packing_ratio by .*pack_tokens"),
    "small packs": ({"pack_tokens": 64}, "pack_tokens: 64 is below max_seq_len 128.* raise pack_t"),
    "vague packs": ({"pack_tokens": "16k"}, "pack_tokens: '16k' is not a whole number of tokens"),
    "no max_seq_len": ({"max_seq_len": None}, "set dataset.max_seq_len, the most tokens"),
    "no source": ({"hf_name": None}, "set dataset.hf_name: a hub dataset, a local file, or a"),
    "no split": ({"split": None}, "set split, e.g. split: train"),
    "overlong": (
        {"overlong": "cut"},
        "overlong: 'cut'; choose one of truncate, split, drop, error",
    ),
    "no evaluation packs": (
        {"eval_packs": 0},
        "dataset.eval_packs: 0 must be a whole number from 1",
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_key_and_the_way_out(tokenizer, dataset, case: str, name: str):
    change, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        build(tokenizer, {**dataset, **change}, name=name)


FINETUNING_ERRORS = {
    "encoder-decoder": (
        {"decoder_only_format": False},
        "decoder_only_format: false cannot be packed",
    ),
    "two sources": (
        {"remote": "s3://b", "local": "x"},
        "dataset.hf_name does not go with dataset.remote: leave one out",
    ),
    "held out of a stream": (
        {"hf_name": None, "streams": {}, "holdout": {"by": "q", "fraction": 0.1, "part": "eval"}},
        "dataset.holdout does not go with dataset.streams: leave one out",
    ),
    "targets": ({"target_responses": "first"}, "target_responses"),
    "no function": ({"preprocessing_fn": "nowhere:f"}, "'nowhere:f' is no function"),
    "text": ({"text_key": "text"}, "packed_finetuning: unknown key dataset.text_key"),
}


@pytest.mark.parametrize("case", FINETUNING_ERRORS)
def test_errors_of_finetuning(tokenizer, dataset, case: str):
    change, message = FINETUNING_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        build(tokenizer, {**dataset, **change})


def test_errors_of_plain_text(tokenizer, texts):
    with pytest.raises(ValueError, match=r"no column 'content' in .*there are text: set text_key"):
        build(tokenizer, {**texts, "text_key": "content"}, name="packed_text")
    with pytest.raises(ValueError, match=r"packed_text: unknown key dataset.preprocessing_fn"):
        build(tokenizer, {**texts, "preprocessing_fn": "a:b"}, name="packed_text")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_tokenizer_with_an_end_of_text_is_needed(tokenizer_folder, dataset, name: str):
    endless = PreTrainedTokenizerFast(
        tokenizer_object=AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    )
    for tokenizer in (None, endless):
        with pytest.raises(ValueError, match=rf"{name} needs a tokenizer with .*\(eos_token\)"):
            build(tokenizer, dataset, name=name)


def test_a_tokenizer_without_a_pad_token_will_do(tokenizer, dataset):
    """SmolLM2's base models have no pad token, and packs need none."""
    tokenizer.pad_token = None
    assert documents_in(walk(build(tokenizer, dataset))).total() == 120


@pytest.mark.parametrize("size", [0.5, 2.5, 0])
def test_a_fraction_of_a_pack_is_no_batch(tokenizer, dataset, size, monkeypatch):
    monkeypatch.setattr("foundry_ext.data.loading.load_rows", pytest.fail)  # before it takes long
    message = f"batch size {size} is not a whole number of packs; raise the global batch"
    with pytest.raises(ValueError, match=message):
        build(tokenizer, dataset, size=size)


def test_no_document_left_is_an_error(tokenizer, dataset):
    with pytest.raises(ValueError, match=r"no document of .* is left to train on: \d+ dropped"):
        build(tokenizer, {**dataset, "max_seq_len": 2})


def test_real_rows(tokenizer, dataset):
    """Rows of GSM8K work, with a tokenizer that makes many tokens of them."""
    if not SHARED_ROWS.exists():
        pytest.skip(f"{SHARED_ROWS} is not on this machine")
    dataset |= {"hf_name": str(SHARED_ROWS), "split": "train[:400]", "max_seq_len": 2048}
    dataset |= {"preprocessing_fn": {"prompt": "question", "response": "answer"}}
    spec = build(tokenizer, {**dataset, "pack_tokens": 4096, "shuffle": True})
    rows = [json.loads(line) for line in SHARED_ROWS.read_text().splitlines()[:400]]
    found = Counter(
        tokenizer.decode(ids).removesuffix("<|endoftext|>") for ids, _ in documents_in(walk(spec))
    )
    assert spec.dataloader.dataset.documents.counts["truncated"] == 0
    assert found == Counter(row["question"] + row["answer"] for row in rows)
