"""Row -> documents: token ids, and which of them are to be predicted.

llm-foundry's own chat templates, preprocessing functions and target policies do the formatting, so
a row means the same under `finetuning` and `packed_finetuning`. A document is at most `max_seq_len`
tokens; what happens to a longer row is chosen (`overlong`) and counted, never silent.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher
from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only, validate_target_settings
from llmfoundry.data.finetuning.tasks import (
    StreamingFinetuningDataset,
    tokenize_formatted_example,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batch import IGNORE_INDEX
from foundry_ext.data.documents import FEATURES, Documents, Outcome

OVERLONG = ("truncate", "split", "drop", "error")
_FORMAT_VERSION = 1  # of the tokenised table; part of its cache key

Tokens = tuple[list[int], list[int]]  # input_ids and labels, one length


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """What decides the tokens of a row, besides the tokenizer."""

    max_seq_len: int
    """Tokens a document may have."""
    overlong: str = "truncate"
    """truncate: keep the beginning; split: pieces of max_seq_len; drop; error."""
    target_prompts: str = "none"
    """Prompts to predict: none, all, or length>=N."""
    target_responses: str = "last"
    """Responses to predict: last or all."""
    text_key: str | None = None
    """Plain text of this column, all of it predicted; None for prompt/response and chat rows."""

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong: {self.overlong!r}; choose one of {', '.join(OVERLONG)}")
        if self.max_seq_len < 2:
            raise ValueError(f"max_seq_len: {self.max_seq_len} leaves no token to predict")
        validate_target_settings(
            self.target_prompts.lower(), self.target_responses.lower(), decoder_only_format=True
        )


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    *,
    preprocess: Callable[[dict[str, Any]], Any] | None = None,
    num_proc: int | None = None,
) -> Documents:
    """Tokenises rows, cached on disk by source, tokenizer and settings.

    Args:
        rows: prompt/response or chat rows after `preprocess`, or rows with `settings.text_key`.

    Raises:
        ValueError: no rows; a row that cannot be read, or too long under `overlong: error`, which
            is named.
    """
    if len(rows) == 0:
        raise ValueError("the dataset has no rows: look at its split and holdout")
    formatting = [preprocess, _source_code(preprocess)]
    key = [rows._fingerprint, _identity(tokenizer), asdict(settings), formatting, _FORMAT_VERSION]
    tokenize = _row_tokenizer(tokenizer, settings, preprocess)
    return _documents(rows, tokenize, settings, Hasher.hash(key), num_proc)


def tokenize_stream(
    rows: StreamingFinetuningDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
) -> Documents:
    """As `tokenize_rows` for rows that come as `turns`; kept in memory, cached nowhere."""

    def tokenize(row: dict[str, Any]) -> Tokens:
        return _stitch(rows[row["index"]]["turns"], tokenizer, settings)

    indices = datasets.Dataset.from_dict({"index": list(range(rows.num_samples))})
    return _documents(indices, tokenize, settings, fingerprint="stream")


def _documents(
    rows: datasets.Dataset,
    tokenize: Callable[[dict[str, Any]], Tokens],
    settings: TokenizeSettings,
    fingerprint: str,
    num_proc: int | None = None,
) -> Documents:
    """Maps rows to documents; `fingerprint` names the file of the cache, where `rows` have one."""

    def table(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        columns = zip(*batch.values(), strict=True)
        records = (
            record
            for index, values in zip(indices, columns, strict=True)
            for record in _records(index, dict(zip(names, values, strict=True)), tokenize, settings)
        )
        return _columns(records)

    return Documents(
        rows.map(
            table,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            new_fingerprint=fingerprint,
            num_proc=min(num_proc or 1, len(rows) // 1000) or None,
            desc="Tokenizing",
        )
    )


def _row_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    preprocess: Callable[[dict[str, Any]], Any] | None,
) -> Callable[[dict[str, Any]], Tokens]:
    if settings.text_key is None:

        def tokenize(row: dict[str, Any]) -> Tokens:
            example = row if preprocess is None else preprocess(row)
            turns = tokenize_formatted_example(example, tokenizer)["turns"]
            return _stitch(turns, tokenizer, settings)

        return tokenize

    text_key = settings.text_key

    def tokenize_text(row: dict[str, Any]) -> Tokens:
        text = row[text_key]
        if not isinstance(text, str):
            raise ValueError(f"column {text_key!r} holds {type(text).__name__}, not text")
        # Not verbose: it warns of texts over the model's length, which `overlong` deals with.
        encoding = tokenizer(text, truncation=False, padding=False, verbose=False)
        ids = list(cast(list[int], encoding["input_ids"])) if text else []
        # The end of a text is to be learned too; a tokenizer that adds it itself adds it once.
        if ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(_eos_token_id(tokenizer))
        return ids, ids

    return tokenize_text


def _stitch(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings
) -> Tokens:
    """Turns end to end, closed with end-of-text, as llm-foundry's own collator does it."""
    if any(len(turn[key]) == 0 for turn in turns for key in ("input_ids", "labels")):
        return [], []
    turns = [{key: list(turn[key]) for key in ("input_ids", "labels")} for turn in turns]
    return stitch_turns_decoder_only(
        turns, settings.target_prompts, settings.target_responses, _eos_token_id(tokenizer)
    )


def _eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.eos_token_id)


def _records(
    index: int,
    row: dict[str, Any],
    tokenize: Callable[[dict[str, Any]], Tokens],
    settings: TokenizeSettings,
) -> Iterator[dict[str, Any]]:
    """The documents of one row, at least one, with what became of it."""
    try:
        ids, labels = tokenize(row)
    except Exception as error:
        raise ValueError(f"row {index}: {type(error).__name__}: {error}") from error
    size, limit = len(ids), settings.max_seq_len
    if size == 0:
        yield _record([], [], Outcome.DROPPED_EMPTY)
    elif size <= limit:
        yield _kept(ids, labels, Outcome.KEPT)
    elif settings.overlong == "error":
        raise ValueError(
            f"row {index} has {size} tokens, more than max_seq_len {limit}; raise max_seq_len, or"
            " set overlong to truncate, split or drop"
        )
    elif settings.overlong == "drop":
        yield _record([], [], Outcome.DROPPED_OVERLONG, num_cut=size)
    elif settings.overlong == "truncate":
        yield _kept(ids[:limit], labels[:limit], Outcome.TRUNCATED, num_cut=size - limit)
    else:
        for start in range(0, size, limit):
            piece = slice(start, start + limit)
            yield _kept(ids[piece], labels[piece], Outcome.SPLIT)


def _kept(ids: list[int], labels: list[int], outcome: Outcome, num_cut: int = 0) -> dict[str, Any]:
    """A document, or its absence where no token of it could be learned.

    The first token is predicted by nothing, so its label does not count.
    """
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return _record([], [], Outcome.DROPPED_NO_LOSS, num_cut=num_cut + len(ids))
    return _record(ids, labels, outcome, num_cut)


def _record(
    ids: list[int], labels: list[int], outcome: Outcome, num_cut: int = 0
) -> dict[str, Any]:
    flags = [int(label != IGNORE_INDEX) for label in labels]
    return {"input_ids": ids, "has_loss": flags, "outcome": int(outcome), "num_cut": num_cut}


def _columns(records: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for record in records:
        for name, value in record.items():
            columns[name].append(value)
    return columns


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What of a tokenizer decides its output; its hash by pickling changes once it was used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        state.pop("truncation", None)
        state.pop("padding", None)
    return Hasher.hash([state, tokenizer.chat_template, tokenizer.special_tokens_map])


def _source_code(function: Callable[..., Any] | None) -> bytes | None:
    """The text of a function's module: pickling an importable function keeps no more than its name.

    So the cache is left behind too when a helper in the same file has changed.
    """
    path = getattr(inspect.getmodule(function), "__file__", None)
    return None if path is None else Path(path).read_bytes()
