"""MDS streams: shards that mosaicml-streaming has written, here or in an object store.

Streaming is used as a store only: every row is read once, in stored order, and its tokens are
cached like those of other rows, by the bytes of the shards.
"""

import contextlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from llmfoundry.data.finetuning.tasks import StreamingFinetuningDataset
from llmfoundry.data.text_data import build_streams
from streaming.base.format.base.reader import Reader as Shard
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batches import count_processes, split_rows, work_on
from foundry_ext.data.cache import table_key
from foundry_ext.data.cached_documents import cached_documents
from foundry_ext.data.config import STREAM_KEYS
from foundry_ext.data.content import content_digest
from foundry_ext.data.documents import Documents
from foundry_ext.data.full_disk import check_space_for_text
from foundry_ext.data.row_errors import naming_row
from foundry_ext.data.settings import TokenizeSettings
from foundry_ext.data.table import write_table
from foundry_ext.data.tokenize import RowReader, read_rows
from foundry_ext.utils.errors import UserError

_WEIGHTS = ("proportion", "repeat", "choose")
_TOKENS = ("tokens", "input_ids", "turns")  # columns of rows that are tokenised
# A stored token has 2 to 8 bytes; as text it would have about 4.
_TEXT_PER_STORED_BYTE = 0.5


class StoredRows(StreamingFinetuningDataset):
    """MDS rows as they are stored: `turns` or `tokens` of ids, or text."""

    def tokenize_example(self, example: Any) -> Any:
        """Return the row, whose `tokens` become numbers if they are bytes, as llm-foundry does."""
        if isinstance(example.get("tokens"), bytes):
            kind = getattr(np, self.token_encoding_type)
            example["tokens"] = np.frombuffer(example["tokens"], kind)
        return example


def load_streams(dataset: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> StoredRows:
    """Return MDS streams: row `i`, in stored order, is text, or is tokenised already.

    All of it will be read, so it must fit on disk unless there is a `cache_limit`. All ranks must
    call this together, because they wait for each other in it.

    Raises:
        UserError: weighted streams, which a plan over complete documents does not draw.
        FileNotFoundError: no shards in `local`, and no `remote`.
    """
    streams = dataset.get("streams")
    for name, stream in (streams or {}).items():
        weighted = [key for key in _WEIGHTS if stream.get(key) is not None]
        if weighted:
            raise UserError(
                f"streams.{name}.{weighted[0]}: weighted streams are not supported; every document"
                " is used once per epoch"
            )
    for stream in (dataset, *(streams or {}).values()):
        _check_local(stream)
    arguments = {key: dataset[key] for key in STREAM_KEYS & dataset.keys()}
    if streams is not None:
        arguments["streams"] = build_streams(streams)
    # llm-foundry would cut tokenised rows to max_seq_len, before `overlong` sees and counts them.
    return StoredRows(tokenizer=tokenizer, max_seq_len=sys.maxsize, batch_size=1, **arguments)


def _check_local(stream: dict[str, Any]) -> None:
    if stream.get("local") is None or stream.get("remote") is not None:
        return
    folder = Path(stream["local"], stream.get("split") or "")
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(
            f"local: {folder} holds no MDS shards, no index.json; set remote to the place they are"
            " copied from, or give hf_name other files of rows"
        )


def tokenize_stream(
    rows: StoredRows,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    *,
    num_proc: int | None = None,
) -> Documents:
    """Tokenise the rows of `load_streams`, or find them in the cache by the shards' bytes.

    One rank of a node calls this; shards that are not here yet are downloaded.

    Raises:
        UserError: a row that cannot be read, or is too long under `overlong: error`. The message
            names the row.
    """
    if rows.num_samples == 0:
        raise UserError("the streams have no rows; check their split")
    reader, shards = RowReader(tokenizer, settings), list(rows.shards)
    deciding = {"encoding": rows.token_encoding_type, **asdict(settings), **reader.version}

    def table(batch: range) -> pa.Table:
        stored = [naming_row(index, rows.__getitem__, index) for index in batch]
        return reader.table(batch, read_rows(reader, stored, batch, reader.read_stored))

    def write(folder: Path) -> None:
        num_bytes = sum(shard.get_raw_size() for shard in shards)
        _check_space(shards, num_bytes, rows.num_samples, reader)
        processes = count_processes(num_bytes, num_proc or 1)
        if rows.cache_limit or sys.platform != "linux":
            # Several would take shards away from one another; elsewhere a process needs a pickle.
            processes = 1
        batches = _batches(shards)
        with contextlib.closing(work_on(batches, table, processes)) as tables:
            write_table(folder / "part.arrow", batches, tables, "Tokenizing streams")

    return cached_documents(table_key(_content(rows), tokenizer, deciding, None), write)


def _content(rows: StoredRows) -> str:
    """Return a digest of the shards' bytes and columns, wherever they lie."""
    digest = xxhash.xxh3_128(b"MDS")
    for index, shard in enumerate(rows.shards):
        rows.prepare_shard(index)
        folder = Path(shard.dirname, shard.split)
        files = [folder / raw.basename for raw, _ in shard.file_pairs]
        columns = [getattr(shard, name, None) for name in ("column_names", "column_encodings")]
        digest.update(repr([len(shard), columns, content_digest(files)]).encode())
    return f"mds-{digest.hexdigest()}"


def _batches(shards: Sequence[Shard]) -> list[range]:
    """Return batches of rows, by the mean size of a row in each shard."""
    starts = itertools.accumulate((len(shard) for shard in shards), initial=0)
    return [
        range(start + batch.start, start + batch.stop)
        for start, shard in zip(starts, shards, strict=False)
        for batch in split_rows(np.full(len(shard), shard.get_raw_size() // max(len(shard), 1)))
    ]


def _check_space(shards: Sequence[Any], num_bytes: int, num_rows: int, reader: RowReader) -> None:
    """Check that the tokens can fit on the disk of the cache.

    Raises:
        OSError: less is free than they certainly need.
    """
    settings = reader.settings
    most = None if settings.overlong == "split" else num_rows * settings.max_seq_len
    names = {name for shard in shards for name in getattr(shard, "column_names", ())}
    text = _TEXT_PER_STORED_BYTE * num_bytes if names & {*_TOKENS} else num_bytes
    check_space_for_text(text, most, reader.token_bytes)
