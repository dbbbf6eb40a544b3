"""Rows -> documents: token ids, and which of them are predicted.

llm-foundry's own chat templates, preprocessing functions and target policies do the formatting, so
a row means the same under `finetuning` and `packed_finetuning`. A document has at most
`max_seq_len` tokens; `overlong` decides what happens to a longer row, which is always counted.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only, validate_target_settings
from llmfoundry.data.finetuning.tasks import (
    StreamingFinetuningDataset,
    _get_example_type,
    _slice_chat_formatted_example,
    tokenize_formatted_example,
)
from llmfoundry.utils.exceptions import BaseContextualError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.cache import cached, table_key
from foundry_ext.data.documents import Documents
from foundry_ext.data.table import NO_TOKENS, Tokens, to_records, to_table
from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError, one_line

Preprocess = Callable[[dict[str, Any]], Any]

OVERLONG = ("truncate", "split", "drop", "error")
_ROWS = (
    "; a row has a prompt and a response, both text, or messages: correct it, or set"
    " preprocessing_fn to a function that makes such rows"
)
# Characters per call of the tokenizer: its encodings take some hundred bytes per token.
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """Settings that, with the tokenizer, decide the tokens of a row."""

    max_seq_len: int
    """Most tokens of a document."""
    overlong: str = "truncate"
    """truncate: keep the beginning; split: pieces of max_seq_len; drop; error."""
    target_prompts: str = "none"
    """Prompts to predict: none, all, or length>=N."""
    target_responses: str = "last"
    """Responses to predict: last or all."""
    text_key: str | None = None
    """Column of plain text, all of it predicted; None for prompt/response and chat rows."""

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise UserError(f"overlong: {self.overlong!r}; choose one of {', '.join(OVERLONG)}")
        if self.max_seq_len < 2:
            raise UserError(f"max_seq_len: {self.max_seq_len} leaves no token to predict")
        targets = self.target_prompts.lower(), self.target_responses.lower()
        try:
            validate_target_settings(*targets, decoder_only_format=True)
        except ValueError as error:  # names the key, the value and the known ones
            raise UserError(one_line(error)) from error


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    *,
    preprocess: Preprocess | None = None,
    num_proc: int | None = None,
    name: str = "rows",
) -> Documents:
    """Tokenise rows, or find them in the cache by their content, see data/cache.py.

    Rows are prompt/response or chat rows after `preprocess`, or have `settings.text_key`. Each of
    `num_proc` processes gets 1000 rows or more. The progress bar shows `name`.

    Raises:
        UserError: no rows; a row that cannot be read, or is too long under `overlong: error`. The
            message names the row.
    """
    if len(rows) == 0:
        raise UserError("the dataset has no rows; check its split and holdout")
    reader = _Reader(tokenizer, settings)

    def write(folder: Path) -> None:
        table = _map(
            rows,
            _table_of(reader, preprocess),
            num_proc=min(num_proc or 1, len(rows) // 1000) or None,
            desc=f"Tokenizing {name}",
            cache_file_name=str(folder / "part.arrow"),
        )
        files = [Path(file["filename"]).name for file in table.cache_files]
        about = {"files": files, "fingerprint": Documents(table).fingerprint}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    folder = cached(table_key(rows, tokenizer, asdict(settings), preprocess), write)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    parts = [datasets.Dataset.from_file(str(folder / file)) for file in about["files"]]
    return Documents(datasets.concatenate_datasets(parts), fingerprint=about["fingerprint"])


def tokenize_stream(
    rows: StreamingFinetuningDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
) -> Documents:
    """Tokenise rows that come as `turns`; the documents stay in memory and are not cached."""
    reader = _Reader(tokenizer, settings)

    def table(batch: dict[str, list[int]]) -> pa.Table:
        records = []
        for index in batch["index"]:
            tokens = _named(index, lambda row: reader.stitch(rows[row]["turns"]), index)
            records += to_records(index, tokens, settings.max_seq_len, settings.overlong)
        return to_table(records)

    indices = datasets.Dataset.from_dict({"index": list(range(rows.num_samples))})
    return Documents(_map(indices, table, with_indices=False, desc="Reading streams"))


def _map(rows: datasets.Dataset, table: Callable[..., pa.Table], **settings: Any) -> Any:
    """Map without the cache of `datasets`, whose key would be the rows' path and time."""
    return rows.map(
        table,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint="documents",
        load_from_cache_file=False,
        **{"with_indices": True, **settings},
    )


def _table_of(reader: "_Reader", preprocess: Preprocess | None) -> Callable[..., pa.Table]:
    limit, overlong = reader.settings.max_seq_len, reader.settings.overlong

    def table(batch: dict[str, list[Any]], indices: list[int]) -> pa.Table:
        names = list(batch)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        if preprocess is not None and reader.settings.text_key is None:
            rows = [_named(i, preprocess, row) for i, row in zip(indices, rows, strict=True)]
        tokens = reader.read_batch(rows)
        if tokens is None:
            tokens = [_named(i, reader.read, row) for i, row in zip(indices, rows, strict=True)]
        return to_table(
            record
            for i, row in zip(indices, tokens, strict=True)
            for record in to_records(i, row, limit, overlong)
        )

    return table


def _named(index: int, function: Callable[[Any], Any], row: Any) -> Any:
    """Return function(row); errors name the row, and say which rows can be read."""
    try:
        return function(row)
    except Exception as error:
        way_out = _ROWS if isinstance(error, BaseContextualError | KeyError) else ""
        items = row.items() if way_out and isinstance(row, dict) else ()
        lacks = [repr(key) for key, value in items if value is None]
        if lacks:  # Arrow has one column for each key of any row
            way_out = f"; it has no {' or '.join(lacks)}, which others have{way_out}"
        raise UserError(f"row {index}: {type(error).__name__}: {error}{way_out}") from error


class _Reader:
    """Tokenizer of formatted rows: one as llm-foundry does it, or many, equal but faster."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings):
        self.tokenizer, self.settings = tokenizer, settings
        self.eos = cast(int, tokenizer.eos_token_id)

    def read(self, row: dict[str, Any]) -> Tokens:
        """Tokenise one row; a bad one raises an exception of llm-foundry's."""
        text_key = self.settings.text_key
        if text_key is None:
            return self.stitch(tokenize_formatted_example(row, self.tokenizer)["turns"])
        text = row[text_key]
        if not isinstance(text, str):
            raise UserError(f"column {text_key!r} holds {type(text).__name__}, not text")
        # Not verbose: it warns about texts over the model's length, which `overlong` handles.
        encoding = self.tokenizer(text, truncation=False, padding=False, verbose=False)
        return self._close(text, cast(list[int], encoding["input_ids"]))

    def stitch(self, turns: Sequence[Any]) -> Tokens:
        """Join the turns, closed with end-of-text, as llm-foundry's own collator does."""
        if any(len(turn[key]) == 0 for turn in turns for key in ("input_ids", "labels")):
            return NO_TOKENS
        turns = [{key: list(turn[key]) for key in ("input_ids", "labels")} for turn in turns]
        prompts, responses = self.settings.target_prompts, self.settings.target_responses
        ids, labels = stitch_turns_decoder_only(turns, prompts, responses, self.eos)
        return Tokens(np.array(ids, np.int32), np.array(labels, np.int64) != IGNORE_INDEX)

    def _close(self, text: str, ids: list[int]) -> Tokens:
        """Add the end-of-text token, which is learned too, unless the tokenizer added it."""
        if not text or not ids:
            return NO_TOKENS
        if ids[-1] != self.eos:
            ids = [*ids, self.eos]
        return Tokens(np.array(ids, np.int32), np.ones(len(ids), np.bool_))

    def read_batch(self, rows: Sequence[dict[str, Any]]) -> list[Tokens] | None:
        """Tokenise many rows per call on the tokenizer's Rust side; None if that is impossible.

        The first row is read both ways, because a tokenizer's Python side may do more than its Rust
        side. After any error the caller reads the rows one by one, which names the bad one.
        """
        of_transformers = type(self.tokenizer).__module__.startswith("transformers.")
        if not (of_transformers and self.tokenizer.is_fast):
            return None
        try:
            # First, because it tells the Rust side neither to truncate nor to pad.
            first = self.read(rows[0])
            tokens = list(self._read_batch(rows))
        except Exception:
            return None
        same = all(map(np.array_equal, first, tokens[0]))
        return tokens if same else None

    def _read_batch(self, rows: Sequence[dict[str, Any]]) -> Iterator[Tokens]:
        text_key = self.settings.text_key
        if text_key is not None:
            texts = [[row[text_key]] for row in rows]
            encoded = self._encode(texts, add_special_tokens=True)
            yield from (self._close(*text, *ids) for text, ids in zip(texts, encoded, strict=True))
            return
        (kind,) = {_get_example_type(row) for row in rows}
        texts = [self._texts(row, kind) for row in rows]
        for encodings in self._encode(texts, add_special_tokens=kind == "prompt_response"):
            turns = [
                {"input_ids": prompt, "labels": response}
                for prompt, response in zip(encodings[::2], encodings[1::2], strict=True)
            ]
            if kind == "prompt_response":
                _drop_second_bos(turns[0], cast(int | None, self.tokenizer.bos_token_id))
            yield self.stitch(turns)

    def _texts(self, row: dict[str, Any], kind: str) -> list[str]:
        """Return prompt, response, prompt, response, ... of a row."""
        if kind == "chat":
            turns = _slice_chat_formatted_example(cast(Any, row), self.tokenizer)
            return [text for turn in turns for text in turn]
        return [row["prompt"], *(text for key, text in row.items() if key != "prompt")]

    def _encode(
        self, texts: Sequence[Sequence[str]], *, add_special_tokens: bool
    ) -> Iterator[list[list[int]]]:
        """Yield the ids of each text of each row; some rows are encoded at a time."""
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast  # pyright: ignore
        for group in _groups(texts):
            flat = [text for row in group for text in row]
            encodings = iter(encode(flat, add_special_tokens=add_special_tokens))
            for row in group:
                yield [next(encodings).ids for _ in row]


def _groups(texts: Sequence[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
    group, size = [], 0
    for row in texts:
        group.append(row)
        size += sum(map(len, row))
        if size >= _BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _drop_second_bos(turn: dict[str, list[int]], bos: int | None) -> None:
    """Remove a response's BOS as llm-foundry does, if the tokenizer starts every text with one."""
    prompt, response = turn["input_ids"], turn["labels"]
    if bos is not None and prompt[:1] == response[:1] == [bos]:
        turn["labels"] = response[1:]
