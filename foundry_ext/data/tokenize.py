"""Rows -> documents: token ids, and which of them are predicted.

llm-foundry's own chat templates, preprocessing functions and target policies do the formatting, so
a row means the same under `finetuning` and `packed_finetuning`. A document has at most
`max_seq_len` tokens; `overlong` decides what happens to a longer row, which is always counted.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only
from llmfoundry.data.finetuning.tasks import (
    _get_example_type,
    tokenize_formatted_example,
)
from numpy.typing import NDArray
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batches import count_processes, row_sizes, split_rows, work_on
from foundry_ext.data.cache import table_key
from foundry_ext.data.cached_documents import cached_documents
from foundry_ext.data.chats import ChatSlicer
from foundry_ext.data.documents import Documents
from foundry_ext.data.full_disk import check_space
from foundry_ext.data.preprocessing import format_row
from foundry_ext.data.row_errors import naming_row
from foundry_ext.data.rows import without_empty_columns
from foundry_ext.data.settings import TokenizeSettings
from foundry_ext.data.special_tokens import SpecialTokens, WithoutSpecialTokens
from foundry_ext.data.table import NO_TOKENS, Tokens, to_records, to_table, write_table
from foundry_ext.data.token_columns import ids_type
from foundry_ext.utils.constants import IGNORE_INDEX
from foundry_ext.utils.errors import UserError

Preprocess = Callable[[dict[str, Any]], Any]

# Characters per call of the tokenizer: its encodings take some hundred bytes per token.
_BATCH_CHARACTERS = 2**20


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
    `num_proc` processes gets some MB of rows. The progress bar shows `name`.

    Raises:
        UserError: no rows; a row that cannot be read, or is too long under `overlong: error`. The
            message names the row.
    """
    if len(rows) == 0:
        raise UserError("the dataset has no rows; check its split and holdout")
    if preprocess is None and settings.text_key is None:
        rows = without_empty_columns(rows)
    reader = RowReader(tokenizer, settings)
    table = _table_of(rows, reader, preprocess)

    def write(folder: Path) -> None:
        if preprocess is None:  # which may leave out anything
            most = None if settings.overlong == "split" else len(rows) * settings.max_seq_len
            columns = [settings.text_key or "prompt", "response", "messages"]
            check_space(rows, columns, most, reader.token_bytes)
        sizes = row_sizes(rows)
        batches = split_rows(sizes)
        num_processes = count_processes(int(sizes.sum()), num_proc or 1)
        with contextlib.closing(work_on(batches, table, num_processes)) as tables:
            write_table(folder / "part.arrow", batches, tables, f"Tokenizing {name}")

    deciding = asdict(settings) | reader.version
    if preprocess is not None:  # earlier ones let nulls inside values become text
        deciding["nulls"] = 1
    return cached_documents(table_key(rows, tokenizer, deciding, preprocess), write)


def _table_of(
    rows: datasets.Dataset, reader: "RowReader", preprocess: Preprocess | None
) -> Callable[[range], pa.Table]:
    """Return a function that makes the table of a batch of rows."""

    def table(batch: range) -> pa.Table:
        columns = rows[batch.start : batch.stop]
        names = list(columns)
        found = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if preprocess is not None and reader.settings.text_key is None:
            formatted = partial(format_row, preprocess)
            found = [naming_row(i, formatted, row) for i, row in zip(batch, found, strict=True)]
        return reader.table(batch, read_rows(reader, found, batch, reader.read))

    return table


def read_rows(
    reader: "RowReader",
    rows: Sequence[dict[str, Any]],
    indices: Sequence[int | str],
    read: Callable[[dict[str, Any]], Tokens],
) -> list[Tokens]:
    """Return the tokens of rows, read together if that is possible, otherwise by `read`."""
    tokens = reader.read_batch(rows)
    if tokens is None:
        tokens = [naming_row(i, read, row) for i, row in zip(indices, rows, strict=True)]
    return tokens


class RowReader:
    """Tokenizer of formatted rows: one as llm-foundry does it, or many, equal but faster."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings):
        self.tokenizer, self.settings = tokenizer, settings
        self.plain: Any = WithoutSpecialTokens(tokenizer)
        self.special = SpecialTokens(tokenizer)
        self.slice_chat = ChatSlicer(tokenizer)
        self.max_id = max(tokenizer.get_vocab().values())
        self.token_bytes: int = ids_type(self.max_id).bit_width // 8

    @property
    def version(self) -> dict[str, int]:
        """Version in a cache's key; plain text without special tokens is as in the first one."""
        is_new = self.settings.text_key is None or self.special.begin or self.special.end
        return {"reader": 2} if is_new else {}

    def read(self, row: dict[str, Any]) -> Tokens:
        """Tokenise one row; a bad one raises an exception of llm-foundry's."""
        text_key = self.settings.text_key
        if text_key is None:
            turns = tokenize_formatted_example(row, self.plain)["turns"]
            return self._join(turns, is_chat=_get_example_type(row) == "chat")
        text = row[text_key]
        if not isinstance(text, str):
            raise UserError(f"column {text_key!r} holds {type(text).__name__}, not text")
        # Not verbose: it warns about texts over the model's length, which `overlong` handles.
        encoding = self.plain(text, truncation=False, padding=False, verbose=False)
        return self._text(text, cast(list[int], encoding["input_ids"]))

    def read_stored(self, row: dict[str, Any]) -> Tokens:
        """Return the tokens of a row of a stream, which may be tokenised already."""
        text_key = self.settings.text_key
        if text_key is None and "turns" in row:
            for turn in row["turns"]:
                self._check(np.array([*turn["input_ids"], *turn["labels"]]))
            return self.stitch(row["turns"], is_chat=True)
        if text_key is None or text_key in row:
            return self.read(row)
        if "tokens" not in row:
            raise UserError(f"no {text_key!r} and no 'tokens'; there are {', '.join(row)}")
        ids = np.asarray(row["tokens"])  # as they are: whoever wrote them may have joined texts
        self._check(ids)
        ids = ids.astype(np.int32)
        return Tokens(ids, np.ones(len(ids), np.bool_)) if len(ids) else NO_TOKENS

    def _check(self, ids: NDArray[np.integer]) -> None:
        """Check that stored ids are those of a tokenizer as large as this one."""
        bad = ids[(ids < 0) | (ids >= (2**16 if self.token_bytes == 2 else 2**31))]
        if len(bad):
            raise UserError(
                f"the token {bad[0]} is beyond the tokenizer's {self.max_id}; give the tokenizer"
                " that the shards were tokenized with"
            )

    def _join(self, turns: Sequence[Any], *, is_chat: bool) -> Tokens:
        """Join the turns of a row of text, with the tokens that the tokenizer puts around it."""
        special = self.special
        if (special.begin or special.end) and not _lacks_a_side(turns):
            turns = [dict(turn) for turn in turns]
            turns[0]["input_ids"] = special.opened(list(turns[0]["input_ids"]))
            if not (is_chat and special.is_closed(turns[-1]["labels"])):
                turns[-1]["labels"] = special.closed(list(turns[-1]["labels"]))
        return self.stitch(turns, is_chat=is_chat)

    def stitch(self, turns: Sequence[Any], *, is_chat: bool) -> Tokens:
        """Join the turns, closed with end-of-text, as llm-foundry's own collator does.

        Unlike there, a chat that its template closed, and ended with a line break, is closed once.
        """
        if _lacks_a_side(turns):
            return NO_TOKENS
        turns = [{key: list(turn[key]) for key in ("input_ids", "labels")} for turn in turns]
        prompts, responses = self.settings.target_prompts, self.settings.target_responses
        eos = None if is_chat and self.special.is_closed(turns[-1]["labels"]) else self.special.eos
        ids, labels = stitch_turns_decoder_only(turns, prompts, responses, eos)
        num_untrained = len(turns) - 1 if responses.lower() == "last" else 0
        return Tokens(
            np.array(ids, np.int32), np.array(labels, np.int64) != IGNORE_INDEX, num_untrained
        )

    def table(self, indices: Sequence[int], rows: Iterable[Tokens]) -> pa.Table:
        """Return the documents of rows, as `overlong` says."""
        settings, records = self.settings, []
        for index, row in zip(indices, rows, strict=True):
            first, *rest = to_records(index, row, settings.max_seq_len, settings.overlong)
            records += [first._replace(num_untrained=row.num_untrained), *rest]
        return to_table(records, max_id=self.max_id, with_responses=settings.text_key is None)

    def _text(self, text: str, ids: list[int]) -> Tokens:
        """Return a plain text: closed with end-of-text, which is learned too."""
        if not text or not ids:
            return NO_TOKENS
        ids = self.special.closed(self.special.opened(ids))
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
            encoded = self._encode(texts)
            yield from (self._text(*text, *ids) for text, ids in zip(texts, encoded, strict=True))
            return
        (kind,) = {_get_example_type(row) for row in rows}
        texts = [self._texts(row, kind) for row in rows]
        for encodings in self._encode(texts):
            turns = [
                {"input_ids": prompt, "labels": response}
                for prompt, response in zip(encodings[::2], encodings[1::2], strict=True)
            ]
            if kind == "prompt_response":
                _drop_second_bos(turns[0], cast(int | None, self.tokenizer.bos_token_id))
            yield self._join(turns, is_chat=kind == "chat")

    def _texts(self, row: dict[str, Any], kind: str) -> list[str]:
        """Return prompt, response, prompt, response, ... of a row."""
        if kind == "chat":
            return self.slice_chat(row)
        return [row["prompt"], *(text for key, text in row.items() if key != "prompt")]

    def _encode(self, texts: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
        """Yield the ids of each text of each row; some rows are encoded at a time."""
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast  # pyright: ignore
        for group in _groups(texts):
            flat = [text for row in group for text in row]
            encodings = iter(encode(flat, add_special_tokens=False))
            for row in group:
                yield [next(encodings).ids for _ in row]


def _lacks_a_side(turns: Sequence[Any]) -> bool:
    return any(len(turn[key]) == 0 for turn in turns for key in ("input_ids", "labels"))


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
    """Remove a response's BOS as llm-foundry does, if prompt and response begin with one."""
    prompt, response = turn["input_ids"], turn["labels"]
    if bos is not None and prompt[:1] == response[:1] == [bos]:
        turn["labels"] = response[1:]
