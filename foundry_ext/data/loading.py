"""A loader's `dataset` section -> its documents: rows, MDS streams or prepared data."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.cached_documents import find_documents
from foundry_ext.data.config import (
    Source,
    get_sources,
    get_text_key,
    stream_key,
    tokenize_settings,
)
from foundry_ext.data.count_text import describe_nothing_left, log_counts, log_mixture
from foundry_ext.data.documents import Documents
from foundry_ext.data.full_disk import naming_full_disk
from foundry_ext.data.mixture import MixedDocuments, draw
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.loading import load_prepared
from foundry_ext.data.prepared_settings import is_prepared
from foundry_ext.data.ranks import local_rank_zero_first
from foundry_ext.data.row_errors import separator_hint
from foundry_ext.data.sources import fetch, find_revision, load_rows
from foundry_ext.data.streams import load_streams, tokenize_stream
from foundry_ext.data.tokenize import tokenize_rows
from foundry_ext.packing.algorithm import most_documents, most_of_counts
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.processes import num_cores

AnyDocuments = Documents | MixedDocuments | PreparedDocuments


def load_documents(
    dataset: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, name: str
) -> tuple[AnyDocuments, list[dict[str, Any]]]:
    """Return the documents of a section, and a description per source.

    All ranks must call it together.

    Args:
        dataset: the section, whose keys have been checked.
        tokenizer: the run's.
        name: of the builder, packed_finetuning or packed_text.

    Raises:
        UserError: the rows cannot be read, or none is left.
    """
    documents: AnyDocuments
    if is_prepared(dataset):
        documents, descriptions = load_prepared(dataset, tokenizer, name=name)
    elif stream_key(dataset) is None:
        documents, descriptions = _read_sources(get_sources(dataset, name), tokenizer)
    else:
        documents, descriptions = _read_streams(dataset, name, tokenizer)
    if not documents.num_used:
        max_seq_len = dataset["max_seq_len"]
        raise UserError(describe_nothing_left(documents.counts, descriptions, max_seq_len))
    return documents, descriptions


def most_documents_of(documents: AnyDocuments, capacity: int) -> int:
    """Return the most documents that any plan can put into one pack."""
    if isinstance(documents, PreparedDocuments):
        return most_of_counts(documents.most_lengths, capacity)
    return most_documents(documents.lengths[documents.lengths > 0], capacity)


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


def _num_proc() -> int:
    """Return the processes to tokenise with: the cores that are ours, at most $MAX_NUM_PROC."""
    return min(num_cores(), int(os.environ.get("MAX_NUM_PROC", 64)))
