"""A loader's `dataset` section -> prepared data: the steps of `foundry-ext prepare`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from composer.utils import parse_uri
from llmfoundry.data.finetuning.tasks import SUPPORTED_EXTENSIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batches import work_on
from foundry_ext.data.config import Source, check_keys, get_sources, stream_key
from foundry_ext.data.local_rows import files_of_split
from foundry_ext.data.prepared.index import ShardAbout
from foundry_ext.data.prepared.making import Making, check_room, remove_leftovers
from foundry_ext.data.prepared.merging import Part, merge_parts, write_part
from foundry_ext.data.prepared.pieces import Piece, Row, split_files, split_table
from foundry_ext.data.prepared.recipe import make_recipe
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.data.prepared_settings import is_prepared
from foundry_ext.data.preprocessing import format_row
from foundry_ext.data.row_errors import naming_row
from foundry_ext.data.rows import without_empty_keys
from foundry_ext.data.sources import check_part, fetch, find_revision, load_rows
from foundry_ext.data.table import Tokens
from foundry_ext.data.tokenize import RowReader, read_rows
from foundry_ext.utils.absent import dataset_settings
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.progress import progress

SHARD_BYTES = 2**26
_TEXT_PER_SHARD_BYTE = 2  # text has about 4 bytes a token, a token has 2


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Result of `prepare`."""

    shards: int
    """Shards of this part, or of all if the index was written."""
    rows: int
    tokens: int
    has_index: bool


def prepare(
    dataset: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    tokenizer_name: str,
    out: str,
    workers: int,
    part: Part | None = None,
    source: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Prepared:
    """Make the shards of a source, and their index if no `part` of it is asked for.

    Args:
        dataset: a loader's section.
        tokenizer: the run's tokenizer.
        name: of the builder, packed_finetuning or packed_text.
        tokenizer_name: its name in the YAML.
        out: folder or URI for the shards; those that are there already are kept.
        workers: processes.
        part: a part of the pieces; None for all.
        source: which one of `dataset.datasets`, from 0.
        shard_bytes: about how large a shard of text is to be.

    Raises:
        UserError: keys, or a row, that a loader would refuse, too.
    """
    making = _plan(dataset, tokenizer, name, tokenizer_name, Storage(out), source, shard_bytes)
    pieces, is_whole = making.pieces, part is None
    part = part or Part(1, 1)
    numbers = part.of_pieces(len(pieces))
    remove_leftovers(making.out)
    check_room(making.out, [pieces[number] for number in numbers])
    made = work_on(numbers, making.make, workers)
    title = f"Preparing {making.recipe.source}"
    shards = list(progress(made, title, total=len(numbers), unit="shards"))
    write_part(making.out, part, making.recipe, pieces, shards)
    return summarise(merge_parts(making.out, of=1) if is_whole else shards, has_index=is_whole)


def summarise(shards: Sequence[ShardAbout], *, has_index: bool) -> Prepared:
    """Return the totals of shards."""
    return Prepared(
        shards=len(shards),
        rows=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        has_index=has_index,
    )


def _plan(
    dataset: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tokenizer_name: str,
    out: Storage,
    number: int,
    shard_bytes: int,
) -> Making:
    """Check the section, and find the pieces of its source."""
    dataset = dataset_settings(dict(dataset))
    check_keys(dataset, name)
    source, given = _choose(dataset, name, number)
    pieces, revision = _find_pieces(source, shard_bytes * _TEXT_PER_SHARD_BYTE)
    if not pieces:
        raise UserError(f"{source.hf_name}: there are no rows to prepare")
    recipe = make_recipe(
        source,
        tokenizer,
        tokenizer_name=tokenizer_name,
        revision=revision,
        preprocessing_fn=given.get("preprocessing_fn"),
    )
    read = partial(_read, RowReader(tokenizer, source.settings), source)
    return Making(recipe=recipe, pieces=pieces, read=read, out=out)


def _choose(dataset: Mapping[str, Any], name: str, number: int) -> tuple[Source, Mapping[str, Any]]:
    """Return a source of a section, and the keys that it was given."""
    if is_prepared(dataset):
        raise UserError(
            "dataset.prepared: the data is prepared already; name its source in hf_name"
        )
    if key := stream_key(dict(dataset)):
        raise UserError(
            f"dataset.{key}: MDS streams cannot be prepared; name their rows in hf_name, or train"
            " from the streams as they are"
        )
    sources = get_sources(dict(dataset), name)
    if not 0 <= number < len(sources):
        raise UserError(
            f"--source {number}: dataset.datasets has {len(sources)} sources, counted from 0"
        )
    entries = dataset.get("datasets")
    holdout = sources[number].options.get("holdout")
    if holdout is not None:
        if set(holdout) != {"by", "fraction", "part"}:
            raise UserError("holdout: give by, fraction and part")
        check_part(holdout["fraction"], holdout["part"])
    return sources[number], (entries[number] if entries else dataset)


def _find_pieces(source: Source, piece_bytes: int) -> tuple[list[Piece], str | None]:
    """Return the pieces of a source, and the hub's revision of it."""
    hf_name, split = fetch(source.hf_name, source.split)
    options = dict(source.options)
    holdout = options.pop("holdout", None)  # rows are chosen piece by piece
    kwargs = options.get("hf_kwargs") or {}
    revision = None
    is_here = Path(hf_name).exists() or bool(kwargs.get("data_files")) or parse_uri(hf_name)[0]
    if options.get("safe_load") and not is_here:
        # As `load_rows` does; its files are read where they are, without an Arrow copy.
        hf_name = huggingface_hub.snapshot_download(
            hf_name,
            repo_type="dataset",
            allow_patterns=[f"*{extension}" for extension in SUPPORTED_EXTENSIONS],
            revision=kwargs.get("revision"),
            token=kwargs.get("token"),
        )
        revision = Path(hf_name).name
    found = files_of_split(hf_name, split, kwargs)
    if found is not None:
        pieces = split_files(*found, piece_bytes)
        if pieces is not None:
            return pieces, revision
    rows = load_rows(hf_name, split, **options)
    if source.settings.text_key in rows.column_names:
        needed = {source.settings.text_key, (holdout or {}).get("by")}
        rows = rows.select_columns([name for name in rows.column_names if name in needed])
    found_revision = find_revision(rows, kwargs) or revision
    return split_table(rows, f"{source.hf_name} ({split})", piece_bytes), found_revision


def _read(
    reader: RowReader, source: Source, rows: Sequence[Row], places: Sequence[str]
) -> list[Tokens]:
    text_key = source.settings.text_key
    rows = _with_same_keys(rows)
    if text_key is not None:
        for place, row in zip(places, rows, strict=True):
            if text_key not in row:
                names = ", ".join(row)
                raise UserError(f"{place}: no column {text_key!r}, only {names}; set text_key")
    elif source.preprocess is not None:
        formatted = partial(format_row, source.preprocess)
        rows = [naming_row(one, formatted, row) for one, row in zip(places, rows, strict=True)]
    else:
        rows = without_empty_keys(rows)
    return read_rows(reader, rows, places, reader.read) if rows else []


def _with_same_keys(rows: Sequence[Row]) -> Sequence[Row]:
    """Return rows in which a key that only others have is null, as in a table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if all(len(row) == len(keys) for row in rows):
        return rows
    return [{key: row.get(key) for key in keys} for row in rows]
