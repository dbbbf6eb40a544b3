"""Tokenisation of rows: llm-foundry's labels, and exact counts of cut or dropped rows."""

import json
import random
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest
from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
from llmfoundry.data.finetuning.tasks import is_valid_ift_example, tokenize_formatted_example
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from foundry_ext.data.documents import Documents
from foundry_ext.data.tokenize import RowReader, TokenizeSettings, tokenize_rows
from foundry_ext.utils.constants import IGNORE_INDEX

LONG = 2048
SHARED_ROWS = Path(__file__).parents[3] / "shared/data/train/gsm8k_train.jsonl"
TARGETS = [
    (prompts, responses)
    for prompts in ("none", "all", "length>=6", "length>=20", "LENGTH>=20")
    for responses in ("last", "all")
]


def tokenize(rows, tokenizer, preprocess=None, **settings) -> Documents:
    settings = TokenizeSettings(**{"max_seq_len": LONG, **settings})
    return tokenize_rows(
        datasets.Dataset.from_list(rows), tokenizer, settings, preprocess=preprocess
    )


def chat_rows(num: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)

    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices("abcdef 123", k=rng.randint(1, 20)))}

    def messages() -> list[dict[str, str]]:
        system = [say("system")] if rng.random() < 0.3 else []
        return system + [
            say(role) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")
        ]

    return [{"messages": messages()} for _ in range(num)]


def theirs(row, tokenizer, max_seq_len: int, prompts: str, responses: str):
    """Return llm-foundry's ids and labels of a row, or None if it drops the row."""
    example = tokenize_formatted_example(row, tokenizer)
    policy = (prompts.lower(), responses)
    if not is_valid_ift_example(max_seq_len, *policy, True, example):
        return None
    collate = Seq2SeqFinetuningCollator(
        tokenizer, max_seq_len, True, target_prompts=prompts, target_responses=responses
    )
    batch = collate([example])
    real = batch["attention_mask"][0].bool()
    return batch["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist()


def ours(documents: Documents, index: int):
    document = documents[index]
    if len(document.input_ids) == 0:
        return None
    labels = np.where(document.loss_mask, document.input_ids.astype(int), IGNORE_INDEX)
    return document.input_ids.tolist(), labels.tolist()


@pytest.mark.filterwarnings("ignore:Truncating sequence")
@pytest.mark.parametrize("max_seq_len", [LONG, 24])
@pytest.mark.parametrize(("prompts", "responses"), TARGETS)
@pytest.mark.parametrize("kind", ["prompt_response", "chat"])
def test_labels_are_llm_foundrys(
    tokenizer, make_rows, kind: str, prompts: str, responses: str, max_seq_len: int
):
    rows = make_rows(60, seed=1) if kind == "prompt_response" else chat_rows(60)
    policy = {"target_prompts": prompts, "target_responses": responses}
    documents = tokenize(rows, tokenizer, max_seq_len=max_seq_len, **policy)
    assert len(documents) == len(rows)
    expected = [theirs(row, tokenizer, max_seq_len, prompts, responses) for row in rows]
    assert [ours(documents, i) for i in range(len(rows))] == expected
    if (prompts, responses, max_seq_len) == ("none", "last", 24):
        assert None in expected, "choose other rows: none is left out"


def test_labels_are_llm_foundrys_where_pad_is_the_end_of_a_turn(tokenizer):
    """Trap 8: as in SmolLM2-Instruct, no real `<|im_end|>` may be taken for padding.

    llm-foundry adds one more, because the template ends with a line break.
    """
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    rows = chat_rows(20, seed=2)
    documents = tokenize(rows, tokenizer, target_responses="all")
    for i, row in enumerate(rows):
        ids, labels = theirs(row, tokenizer, LONG, "none", "all")
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        assert ours(documents, i) == (ids[:-1], labels[:-1])
        document = documents[i]
        ends = document.loss_mask & (document.input_ids == tokenizer.eos_token_id)
        assert ends.sum() == len([m for m in row["messages"] if m["role"] == "assistant"])


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_answers_that_are_not_trained_are_counted(tokenizer, overlong: str):
    """`target_responses` is `last` by default. They count whatever becomes of the row."""
    rows = chat_rows(40, seed=3)
    answers = [sum(m["role"] == "assistant" for m in row["messages"]) for row in rows]
    settings = {"max_seq_len": 100, "overlong": overlong}
    every = tokenize(rows, tokenizer, target_responses="all")
    assert "responses_not_trained" not in every.counts and not every.num_untrained.any()
    documents = tokenize(rows, tokenizer)
    assert documents.num_untrained.tolist() == [num - 1 for num in answers]
    cut = tokenize(rows, tokenizer, **settings)
    assert 0 < cut.counts["kept"] < 40
    for counts in (documents.counts, cut.counts):
        assert counts["responses_not_trained"] == sum(answers) - 40 > 40


@pytest.fixture
def read_singly(monkeypatch, tmp_path) -> list:
    """Return the list of rows that were read one by one, with an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    found, read = [], RowReader.read
    monkeypatch.setattr(
        RowReader, "read", lambda self, row: (found.append(row), read(self, row))[1]
    )
    return found


def text_rows(num: int) -> list[dict[str, str]]:
    return [{"text": f"{i} bird" * (i % 7)} for i in range(1, num + 1)]


@pytest.mark.parametrize("kind", ["prompt_response", "completion", "chat", "text"])
def test_rows_are_read_many_at_a_time(tokenizer, make_rows, monkeypatch, read_singly, kind: str):
    """Batches are two to three times as fast; the first row is also read singly, to compare."""
    rows = {"chat": chat_rows, "text": text_rows}.get(kind, make_rows)(60)
    if kind == "completion":
        rows = [{"completion": row["response"], "prompt": row["prompt"]} for row in rows]
    text_key = "text" if kind == "text" else None
    documents = tokenize(rows, tokenizer, text_key=text_key)
    assert read_singly == rows[:1]
    monkeypatch.setattr("foundry_ext.data.tokenize._BATCH_CHARACTERS", 150)
    monkeypatch.setattr("foundry_ext.data.cache._FORMAT_VERSION", -2)  # past the cache
    again = tokenize(rows, tokenizer, text_key=text_key)
    monkeypatch.setattr(RowReader, "read_batch", lambda self, rows: None)
    monkeypatch.setattr("foundry_ext.data.cache._FORMAT_VERSION", -3)
    singly = tokenize(rows, tokenizer, text_key=text_key)
    assert len(read_singly) == 2 + 60
    assert documents.fingerprint == again.fingerprint == singly.fingerprint


def test_a_tokenizer_that_was_told_to_cut_and_pad_does_neither(tokenizer, make_rows):
    rows = make_rows(30)
    expected = tokenize(rows, tokenizer).fingerprint
    tokenizer(["a", "b c d e"], padding="max_length", truncation=True, max_length=3)
    tokenizer.backend_tokenizer.enable_truncation(3)
    documents = tokenize([*rows, rows[0]], tokenizer)  # another key
    assert tokenize(rows, tokenizer).fingerprint == expected
    assert documents.lengths.max() > 3


@pytest.mark.parametrize("kind", ["prompt_response", "chat", "text"])
def test_a_tokenizer_that_begins_every_text(tokenizer, make_rows, read_singly, kind: str):
    """With a tokenizer like Llama's, llm-foundry removes the second start token of a row."""
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    rows = {"chat": chat_rows, "text": text_rows}.get(kind, make_rows)(40)
    documents = tokenize(rows, tokenizer, text_key="text" if kind == "text" else None)
    assert len(read_singly) == 1
    for i, row in enumerate(rows):
        if kind == "text":
            want = [*tokenizer(row["text"])["input_ids"], 0] if row["text"] else []
            assert documents[i].input_ids.tolist() == want
        else:
            assert ours(documents, i) == theirs(row, tokenizer, LONG, "none", "last")
    if kind != "chat":
        assert documents[0].input_ids[0] == 1


@pytest.mark.parametrize("module", ["transformers.models.of_its_own", "a_users_module"])
def test_a_tokenizer_whose_python_side_does_more_is_heeded(
    tokenizer, make_rows, read_singly, module: str
):
    class Shouting(PreTrainedTokenizerFast):
        def _batch_encode_plus(self, texts, *args, **kwargs):
            return super()._batch_encode_plus([text.upper() for text in texts], *args, **kwargs)

    Shouting.__module__ = module
    tokenizer.__class__ = Shouting
    rows = make_rows(25)
    documents = tokenize(rows, tokenizer)
    assert len(read_singly) >= len(rows)
    assert [ours(documents, i) for i in range(25)] == [
        theirs(row, tokenizer, LONG, "none", "last") for row in rows
    ]


def test_real_rows_are_llm_foundrys(tokenizer):
    if not SHARED_ROWS.exists():
        pytest.skip(f"{SHARED_ROWS} is not on this machine")
    rows = [json.loads(line) for line in SHARED_ROWS.read_text().splitlines()[:300]]
    rows = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
    documents = tokenize(rows, tokenizer)
    for i, row in enumerate(rows):
        assert ours(documents, i) == theirs(row, tokenizer, LONG, "none", "last")


def test_the_end_of_text_closes_a_row_once(tokenizer):
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": "b<|endoftext|>"},
        {"prompt": "a", "response": "b<|endoftext|>c"},
    ]
    documents = tokenize(rows, tokenizer)
    first, second, third = (documents[i].input_ids.tolist() for i in range(3))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert first == second == [*tokenizer("ab")["input_ids"], 0]
    assert third == [*tokenizer("ab<|endoftext|>c")["input_ids"], 0]
    # Trap 8: the id 0 inside is as real as any.
    assert documents[2].loss_mask.tolist() == [False, True, True, True, True]


def test_plain_text_is_all_predicted_and_closed_once(tokenizer):
    texts = ["a bird", "one two<|endoftext|>", "", "12"]
    documents = tokenize([{"text": text} for text in texts], tokenizer, text_key="text")
    for i, text in enumerate(texts):
        want = tokenizer(text.removesuffix("<|endoftext|>"))["input_ids"]
        assert documents[i].input_ids.tolist() == ([*want, 0] if text else [])
        assert documents[i].loss_mask.all()
    assert documents.counts["dropped_empty"] == 1
    assert documents.counts["kept"] == 3


TEXT_TOKENS = [3, 16, 17, 32, 33, 40, 1]  # the end of text included, max_seq_len is 16


@pytest.mark.parametrize(
    ("overlong", "lengths", "counts"),
    [
        (
            "truncate",
            [3, 16, 16, 16, 16, 16, 0],
            {"kept": 2, "truncated": 4, "dropped_empty": 1, "tokens_cut": 1 + 16 + 17 + 24},
        ),
        (
            "split",  # the 17th and the 33rd token are left alone, with nothing to predict
            [3, 16, 16, 0, 16, 16, 16, 16, 0, 16, 16, 8, 0],
            {"kept": 2, "split": 8, "dropped_no_loss": 2, "dropped_empty": 1, "tokens_cut": 2},
        ),
        (
            "drop",
            [3, 16, 0, 0, 0, 0, 0],
            {"kept": 2, "dropped_overlong": 4, "dropped_empty": 1, "tokens_cut": 17 + 32 + 33 + 40},
        ),
    ],
)
def test_overlong_texts(tokenizer, overlong: str, lengths: list[int], counts: dict[str, int]):
    texts = ["~" * (num - 1) for num in TEXT_TOKENS]
    rows = [{"text": text} for text in texts]
    settings = {"text_key": "text", "overlong": overlong, "max_seq_len": 16}
    documents = tokenize(rows, tokenizer, **settings)
    assert documents.lengths.tolist() == lengths
    assert {name: count for name, count in documents.counts.items() if count} == counts
    # Not one token is lost without being counted; an empty text has none.
    assert documents.lengths.sum() + counts["tokens_cut"] == sum(TEXT_TOKENS) - 1


def test_pieces_of_a_split_text_join_to_the_whole(tokenizer, make_rows):
    rows = [{"text": row["prompt"] + row["response"]} for row in make_rows(50)]
    whole = tokenize(rows, tokenizer, text_key="text")
    pieces = tokenize(rows, tokenizer, text_key="text", overlong="split", max_seq_len=7)
    assert pieces.lengths.max() == 7
    assert pieces.lengths.sum() + pieces.counts["tokens_cut"] == whole.lengths.sum()
    joined = [token for i in range(len(pieces)) for token in pieces[i].input_ids.tolist()]
    # A piece of one token teaches nothing and is counted as cut.
    expected = []
    for i in range(len(whole)):
        ids = whole[i].input_ids.tolist()
        expected += ids[: len(ids) - (len(ids) % 7 == 1)]
    assert joined == expected


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_every_token_of_a_row_is_kept_or_counted(tokenizer, make_rows, overlong: str):
    rows = make_rows(80, seed=4)
    whole = tokenize(rows, tokenizer)
    documents = tokenize(rows, tokenizer, overlong=overlong, max_seq_len=30)
    assert documents.lengths.max() <= 30
    assert documents.lengths.sum() + documents.counts["tokens_cut"] == whole.lengths.sum()
    assert sum(documents.counts[name] for name in documents.counts if name != "tokens_cut") == len(
        documents
    )
    for i in np.flatnonzero(documents.lengths):
        assert documents[i].loss_mask[1:].any()


def test_overlong_error_names_the_row(tokenizer):
    rows = [{"text": "~"}, {"text": "~~~~~~~~~"}]
    message = r"row 1 has 10 tokens, more than max_seq_len 8; .* truncate, split or drop"
    with pytest.raises(ValueError, match=message):
        tokenize(rows, tokenizer, text_key="text", overlong="error", max_seq_len=8)
    documents = tokenize(rows, tokenizer, text_key="text", overlong="error", max_seq_len=10)
    assert documents.counts["kept"] == 2


@pytest.mark.parametrize("prompt_tokens", [7, 8, 9, 20])
def test_a_prompt_that_leaves_no_answer_is_dropped_and_counted(tokenizer, prompt_tokens: int):
    """Trap 6: a document without a label would divide by zero."""
    rows = [{"prompt": "~" * prompt_tokens, "response": "!!!"}, {"prompt": "~", "response": "!"}]
    documents = tokenize(rows, tokenizer, max_seq_len=8)
    counts = {name: count for name, count in documents.counts.items() if count}
    if prompt_tokens < 8:
        assert documents.lengths.tolist() == [8, 3]
        assert counts == {"kept": 1, "truncated": 1, "tokens_cut": prompt_tokens + 4 - 8}
    else:
        assert documents.lengths.tolist() == [0, 3]
        assert counts == {"kept": 1, "dropped_no_loss": 1, "tokens_cut": prompt_tokens + 4}


def test_pieces_without_an_answer_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "~" * 20, "response": "!!!"}]
    documents = tokenize(rows, tokenizer, max_seq_len=8, overlong="split")
    assert documents.lengths.tolist() == [0, 0, 8]
    assert documents[2].loss_mask.tolist() == [False] * 4 + [True] * 4
    assert documents.counts["tokens_cut"] == 16


@pytest.mark.parametrize("row", [{"prompt": "", "response": "a"}, {"prompt": "a", "response": ""}])
def test_a_row_with_an_empty_side_is_dropped_and_counted(tokenizer, row):
    """Rows with an empty side are dropped, as in llm-foundry."""
    documents = tokenize([row, {"prompt": "a", "response": "b"}], tokenizer)
    assert theirs(row, tokenizer, LONG, "none", "last") is None
    assert documents.lengths.tolist() == [0, 3]
    assert documents.counts["dropped_empty"] == 1


BAD_ROWS = {
    "no text": ({"prompt": None, "response": "a"}, "InvalidPromptTypeError"),
    "no answer": ({"prompt": "a", "response": None}, "InvalidResponseTypeError"),
    "last is a question": (
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]},
        "InvalidLastChatMessageRoleError",
    ),
    "alone": ({"messages": [{"role": "user", "content": "a"}]}, "NotEnoughChatDataError"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(tokenizer, make_rows, kind: str):
    bad, error = BAD_ROWS[kind]
    good = make_rows(5) if "prompt" in bad else chat_rows(5)
    with pytest.raises(ValueError, match=f"row 3: {error}"):
        tokenize([*good[:3], bad, *good[3:]], tokenizer)


def test_columns_llm_foundry_does_not_know_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="row 0: UnknownExampleTypeError"):
        tokenize([{"question": "a", "answer": "b"}], tokenizer)


def test_text_that_is_none_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"row 1: .*column 'text' holds NoneType, not text"):
        tokenize([{"text": "a"}, {"text": None}], tokenizer, text_key="text")


def test_no_rows_are_an_error(tokenizer):
    rows = datasets.Dataset.from_list([{"text": "a"}]).select([])
    with pytest.raises(ValueError, match="the dataset has no rows"):
        tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=8, text_key="text"))


def test_a_preprocessing_function_makes_the_rows(tokenizer):
    rows = [{"question": "a", "answer": "b", "level": 3}]

    def preprocess(row):
        return {"prompt": row["question"], "response": row["answer"]}

    documents = tokenize(rows, tokenizer, preprocess)
    assert ours(documents, 0) == theirs(preprocess(rows[0]), tokenizer, LONG, "none", "last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong": "cut"}, "overlong: 'cut'; choose one of truncate, split, drop, error"),
        ({"max_seq_len": 1}, "max_seq_len: 1 leaves no token to predict"),
        ({"target_prompts": "some"}, "target_prompts"),
        ({"target_prompts": "length>=x"}, "target_prompts"),
        ({"target_responses": "first"}, "target_responses"),
    ],
)
def test_settings_are_checked(settings, message: str):
    with pytest.raises(ValueError, match=message):
        TokenizeSettings(**{"max_seq_len": 8, **settings})


def test_documents_of_many_chunks_are_found(tokenizer):
    """Documents are found although Arrow has chunks of 1000 rows, some with empty ends."""
    texts = ["x" * (i % 5) for i in range(3210)]
    documents = tokenize([{"text": text} for text in texts], tokenizer, text_key="text")
    assert len(documents._chunks) > 1
    for i in (*range(0, 3210, 37), 999, 1000, 1001, 1999, 2000, 3209):
        text = tokenizer(texts[i])["input_ids"]
        assert documents[i].input_ids.tolist() == (text and [*text, 0])
    assert documents.lengths.tolist() == [len(documents[i].input_ids) for i in range(3210)]
