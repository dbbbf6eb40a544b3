"""Prepared data in memory's reach: shards of given rows, without a source or a tokenizer."""

from pathlib import Path

import numpy as np

from foundry_ext.data.prepared.census import take_census
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.index import (
    PreparedIndex,
    ShardAbout,
    read_index,
    shard_folder,
    write_index,
)
from foundry_ext.data.prepared.local_shards import LocalShards
from foundry_ext.data.prepared.recipe import Recipe
from foundry_ext.data.prepared.shard import RowSizes, write_shard
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.data.table import Tokens


def make_row(length: int, seed: int, *, with_loss: bool) -> Tokens:
    rng = np.random.default_rng((length, seed))
    mask = rng.random(length) < 0.6 if with_loss else np.ones(length, np.bool_)
    return Tokens(rng.integers(0, 49152, length, dtype=np.int32), mask)


def make_recipe(text_key: str | None) -> Recipe:
    """Return a recipe of two-byte ids that no tokenizer has made."""
    return Recipe(
        source="rows",
        split="train",
        revision=None,
        hf_kwargs={},
        holdout=None,
        tokenizer="t",
        tokenizer_digest="0",
        text_key=text_key,
        target_prompts="none",
        target_responses="last",
        preprocessing_fn=None,
        preprocess_digest="0",
        ids="uint16",
        versions={},
    )


def write_prepared(
    folder: Path, shards: list[list[Tokens]], *, with_loss: bool = True
) -> PreparedIndex:
    """Write shards with these rows, and their index; return it."""
    recipe = make_recipe(None if with_loss else "text")
    abouts, sizes = [], []
    for number, rows in enumerate(shards):
        key = f"{number:032x}"
        mds = write_shard(
            folder / shard_folder(key), rows, ids=recipe.ids, with_loss=recipe.with_loss
        )
        sizes.append(RowSizes.of(rows))
        lengths = [len(row.input_ids) for row in rows]
        abouts.append(
            ShardAbout(
                key=key,
                piece=f"piece {number}",
                rows=len(rows),
                tokens=sum(lengths),
                longest=max(lengths),
                loss_tokens=sum(int(row.loss_mask[1:].sum()) for row in rows),
                num_untrained=0,
                mds=mds,
            )
        )
    write_index(folder, recipe, abouts, sizes)
    return read_index(Storage(str(folder)), folder)


def open_source(
    folder: Path, max_seq_len: int, overlong: str = "truncate", passes: float = 1.0
) -> PreparedSource:
    storage = Storage(str(folder))
    index = read_index(storage, folder)
    shards = LocalShards(storage, index.shards, index.recipe.ids)
    return PreparedSource(index, shards, max_seq_len, overlong, passes)


def join_sources(sources: list[PreparedSource], *, window: int = 10) -> PreparedDocuments:
    censuses = [take_census(source, "data") for source in sources]
    return PreparedDocuments(sources, censuses, window=window)


def open_documents(folder: Path, max_seq_len: int, *, window: int = 10, **options):
    return join_sources([open_source(folder, max_seq_len, **options)], window=window)
