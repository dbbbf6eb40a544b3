"""Registry builders `packed_finetuning` and `packed_text`: YAML keys -> Composer DataSpec."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import datasets
import pyarrow as pa
import torch
from composer.core import DataSpec
from composer.utils import dist
from datasets.exceptions import DatasetsError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.cached_documents import find_documents
from foundry_ext.data.config import (
    Source,
    check_keys,
    get_batch_packs,
    get_pack_tokens,
    get_sources,
    get_text_key,
    stream_key,
    tokenize_settings,
)
from foundry_ext.data.count_text import describe_nothing_left, log_counts, log_mixture
from foundry_ext.data.dataset import PackedDataLoader, PackedDataset
from foundry_ext.data.documents import Documents
from foundry_ext.data.full_disk import naming_full_disk
from foundry_ext.data.mixture import MixedDocuments, draw
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.loading import load_prepared
from foundry_ext.data.prepared.settings import is_prepared
from foundry_ext.data.ranks import local_rank_zero_first, telling_others
from foundry_ext.data.row_errors import separator_hint
from foundry_ext.data.sources import (
    fetch,
    find_revision,
    load_rows,
)
from foundry_ext.data.streams import load_streams, tokenize_stream
from foundry_ext.data.tokenize import tokenize_rows
from foundry_ext.packing.algorithm import most_documents, most_of_counts
from foundry_ext.packing.batch import num_documents, num_tokens, split_batch
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.absent import dataset_settings
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.processes import num_cores


def build_packed_finetuning_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    num_workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = True,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """Return a loader of packed prompt/response and chat rows.

    The dataset's keys are those of llm-foundry's `finetuning`, and:

    - `pack_tokens` (default `max_seq_len`): tokens of a pack; size it to fill the device.
    - `overlong` (truncate, split, drop, error; default truncate): rows above `max_seq_len`.
    - `eval_packs`: packs per evaluation batch, instead of `device_eval_batch_size`.
    - `holdout`: {by, fraction, part}, a split by the values of a column.
    - `datasets`: a list of sources instead of one, each with `hf_name`, `split` and the other keys
      of a source, or with `text_key` for plain text. All but the main one, which is used
      completely, have a `share` of an epoch's tokens.
    - `prepared`: what `foundry-ext prepare` made, a folder or a URI, instead of rows; an entry of
      `datasets` may have it with `repeat`, `share` or `choose`. `window` (default 262144): the
      documents that are shuffled and packed together. `local`, `cache_limit`: a folder for shards
      that are fetched while training, and its largest size.
    - `fixed_shape` (true, false, auto; default auto): every pack padded to one shape, for
      compilation. train.py decides what auto is, see config/automatic.py; elsewhere it is false.
    - `shuffle` (default false): a new order and new packs in every epoch, by `shuffle_seed`
      (default 17). Otherwise packs of neighbours, in the order of the rows and of `datasets`.
    - `target_responses` (last, all; default last): answers of a chat to learn; others are counted.

    Args:
        tokenizer: needs an end-of-text token.
        device_batch_size: packs per batch on this device.
        dataset: the keys above.
        num_workers: processes that read and collate. Collating 8192 tokens takes 0.2 ms, fetching
            them from a worker 1 ms or more, so workers pay only if documents come from a slow
            disk, that is if the table of tokens is larger than memory.
        drop_last: drop an incomplete last global batch.
        pin_memory: as in torch's DataLoader, like the next three.
        prefetch_factor: batches that a worker prepares ahead.
        persistent_workers: keep the workers between epochs.
        timeout: seconds to wait for a worker; 0 waits forever.

    Raises:
        UserError: unknown or contradictory keys; names the key and the way out.
    """
    packed = _plan_packs("packed_finetuning", tokenizer, device_batch_size, dataset, drop_last)
    return _load_packs(
        packed, num_workers, pin_memory, prefetch_factor, persistent_workers, timeout
    )


def build_packed_text_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    num_workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = True,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """Return a loader of packed plain text for continued pretraining, one document per row.

    Each document ends with end-of-text. Keys are those of `packed_finetuning` without the ones for
    prompts and responses; `text_key` (default "text") names the column, and `overlong` defaults to
    "split". Rows of MDS streams may hold `tokens` instead, which are taken as they are stored.
    """
    packed = _plan_packs("packed_text", tokenizer, device_batch_size, dataset, drop_last)
    return _load_packs(
        packed, num_workers, pin_memory, prefetch_factor, persistent_workers, timeout
    )


@telling_others()
def _plan_packs(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    drop_last: bool,
) -> PackedDataset:
    """Check everything cheap, then read the documents, which may take long, and pack them.

    All ranks must call it together; they compare what they have read.
    """
    dataset = dataset_settings(dataset)
    check_keys(dataset, name)
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise UserError(f"{name} needs a tokenizer with an end-of-text token (eos_token)")
    pack_tokens = get_pack_tokens(dataset)
    batch_packs = get_batch_packs(dataset.get("eval_packs") or device_batch_size)
    if is_prepared(dataset):
        documents, descriptions = load_prepared(dataset, tokenizer, name=name)
    elif stream_key(dataset) is None:
        documents, descriptions = _read_sources(get_sources(dataset, name), tokenizer)
    else:
        documents, descriptions = _read_streams(dataset, name, tokenizer)
    if isinstance(documents, PreparedDocuments):
        lengths = documents.census.lengths
        most = most_of_counts(lengths, pack_tokens)
        is_empty = not lengths.any()
    else:
        most = most_documents(documents.lengths[documents.lengths > 0], pack_tokens)
        is_empty = not documents.lengths.any()
    if is_empty:
        raise UserError(
            describe_nothing_left(documents.counts, descriptions, dataset["max_seq_len"])
        )
    packed = PackedDataset(
        documents,
        PackCollator(
            max_seq_len=dataset["max_seq_len"],
            pack_tokens=pack_tokens,
            pad_token_id=cast(int, tokenizer.pad_token_id or 0),
            fixed_shape=dataset.get("fixed_shape", False) is True,  # auto: train.py has not decided
            max_documents=most,
        ),
        {
            "capacity": pack_tokens,
            "batch_packs": batch_packs,
            "rank": dist.get_global_rank(),
            "world_size": dist.get_world_size(),
            "shuffle": dataset.get("shuffle", False),
            "seed": dataset.get("shuffle_seed", 17),
            "drop_last": drop_last,
        },
        descriptions,
    )
    packed.compare_ranks()
    return packed


def _read_sources(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents | MixedDocuments, list[dict[str, Any]]]:
    """Return the documents, and a description per source.

    All ranks must call it together, see `fetch`.
    """
    read, descriptions = [], []
    for source in sources:
        documents, revision = _read_source(source, tokenizer)
        log_counts(source.hf_name, documents, source.settings)
        read.append(documents)
        descriptions.append({"name": source.hf_name, "split": source.split, "revision": revision})
    parts = draw(read, [source.share for source in sources])
    for description, part in zip(descriptions, parts, strict=True):
        description |= part.describe()
    if len(parts) == 1:
        return read[0], descriptions
    log_mixture(descriptions)
    return MixedDocuments(parts), descriptions


def _read_source(
    source: Source, tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents, str | None]:
    """Return the documents of a source, and the hub revision they come from."""
    hf_name, split = fetch(source.hf_name, source.split)
    with local_rank_zero_first() as node, naming_full_disk(), _naming(source.hf_name):
        documents = _documents_of_node(node)
        if documents is None:
            rows = load_rows(hf_name, split, **source.options)
            revision = find_revision(rows, source.options.get("hf_kwargs"))
            documents = tokenize_rows(
                *(_with_text(rows, source), tokenizer, source.settings),
                preprocess=source.preprocess,
                num_proc=_num_proc(),
                name=f"{source.hf_name} ({source.split})",
            )
            node |= {"key": documents.key, "revision": revision}
        return documents, node["revision"]


def _documents_of_node(node: dict[str, Any]) -> Documents | None:
    """Return the documents whose key the node's first rank has handed over, if they are here.

    So the others neither read the rows nor hash them.
    """
    return find_documents(node["key"]) if node.get("key") else None


def _with_text(rows: datasets.Dataset, source: Source) -> datasets.Dataset:
    """Return the rows without the columns that plain text does not need."""
    text_key = source.settings.text_key
    if text_key is None:
        return rows
    if text_key not in rows.column_names:
        raise UserError(
            f"no column {text_key!r} in {source.hf_name}; there are"
            f" {', '.join(rows.column_names)}"
            f"{separator_hint(rows.column_names) or ': set text_key'}"
        )
    return rows.select_columns([text_key])


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the source in errors about its rows.

    Errors of `datasets` and pyarrow, whose own message says little, are replaced by their cause.
    """
    try:
        yield
    except (ValueError, DatasetsError, pa.ArrowException) as error:
        cause = str(error if isinstance(error, ValueError) else error.__cause__ or error)
        raise UserError(cause if name in cause else f"{name}: {cause}") from error


def _read_streams(
    dataset: dict[str, Any], name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents, list[dict[str, Any]]]:
    """Return the documents of MDS streams, and their description, as `_read_sources` does."""
    settings = tokenize_settings(dataset, dataset["max_seq_len"], get_text_key(dataset, name))
    stream = load_streams(dataset, tokenizer)
    with local_rank_zero_first() as node, naming_full_disk(), _naming("streams"):
        documents = _documents_of_node(node)
        if documents is None:
            documents = tokenize_stream(stream, tokenizer, settings, num_proc=_num_proc())
            node["key"] = documents.key
    log_counts("streams", documents, settings)
    about = {"name": "streams", "split": dataset.get("split"), "revision": None}
    return documents, [about | draw([documents], [None])[0].describe()]


def _load_packs(
    packed: PackedDataset,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int,
    persistent_workers: bool,
    timeout: float,
) -> DataSpec:
    dataloader = PackedDataLoader(
        packed,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        timeout=timeout,
    )
    return DataSpec(
        dataloader,
        split_batch=split_batch,
        get_num_samples_in_batch=num_documents,
        get_num_tokens_in_batch=num_tokens,
    )


def _num_proc() -> int:
    """Return the processes to tokenise with: the cores that are ours, at most $MAX_NUM_PROC."""
    return min(num_cores(), int(os.environ.get("MAX_NUM_PROC", 64)))
