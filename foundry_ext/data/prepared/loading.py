"""A loader's `dataset` section -> documents of prepared data."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.config import get_preprocessing_fn
from foundry_ext.data.prepared.census import Census, take_census
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.index import SHARD_FILE, PreparedIndex, read_index, shard_folder
from foundry_ext.data.prepared.local_shards import LocalFolder, LocalShards
from foundry_ext.data.prepared.plan_cache import planned
from foundry_ext.data.prepared.recipe import check_tokenizer, digest_function, without_token
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.data.prepared_settings import (
    PreparedSettings,
    get_cache_limit,
    get_local,
    get_prepared,
    get_window,
    passes,
)
from foundry_ext.data.ranks import local_rank_zero_first
from foundry_ext.data.settings import OVERLONG
from foundry_ext.packing.window_sampler import WindowSampler
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


def load_prepared(
    dataset: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, name: str
) -> tuple[PreparedDocuments, list[dict[str, Any]]]:
    """Return the documents of a section, and a description per source.

    All ranks must call it together.

    Args:
        dataset: the section; `is_prepared` holds.
        tokenizer: the run's, which must be the one that the data was prepared with.
        name: of the builder, packed_finetuning or packed_text.

    Raises:
        UserError: keys, a place or a recipe that do not go together; a damaged index.
    """
    given, window = get_prepared(dataset), get_window(dataset)
    local = get_local(dataset, given)
    folder = None if local is None else LocalFolder(local, get_cache_limit(dataset))
    sources, censuses = [], []
    for settings in given:
        index, files = _open(settings, folder)
        check_tokenizer(index.recipe, tokenizer, settings.place)
        _check_rows(index, dataset, settings, name)
        overlong = _overlong(settings, index)
        source = PreparedSource(index, files, dataset["max_seq_len"], overlong)
        source.check_overlong(settings.where)
        sources.append(source)
        censuses.append(take_census(source, settings.place))
    amounts = passes(given, [census.num_tokens for census in censuses])
    used = [replace(one, passes=amount) for one, amount in zip(sources, amounts, strict=True)]
    descriptions = [_describe(*one) for one in zip(given, used, censuses, strict=True)]
    for description, source, census in zip(descriptions, used, censuses, strict=True):
        _log(description, source, census)
    return PreparedDocuments(used, censuses, window=window), descriptions


def _open(
    settings: PreparedSettings, folder: LocalFolder | None
) -> tuple[PreparedIndex, LocalShards]:
    storage = Storage(settings.place)
    copies = Path(storage.place)
    if folder is not None:
        place = xxhash.xxh3_64_hexdigest(storage.place.encode())
        copies = folder.path / "index" / place
    with local_rank_zero_first():
        index = read_index(storage, copies)
        if folder is None:
            _check_here(storage, index)
    return index, LocalShards(storage, index.shards, index.recipe.ids, folder)


def _check_here(storage: Storage, index: PreparedIndex) -> None:
    """Check that all shards of a folder are there, and as large as they were when written."""
    for shard in index.shards:
        path = storage.path(f"{shard_folder(shard.key)}/{SHARD_FILE}")
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise UserError(
                f"{path} is missing, or not whole, and the index names it; copy the whole folder,"
                " or run `foundry-ext prepare` again"
            )


def _overlong(settings: PreparedSettings, index: PreparedIndex) -> str:
    overlong = settings.overlong or ("truncate" if index.recipe.with_loss else "split")
    if overlong not in OVERLONG:
        raise UserError(
            f"{settings.where}.overlong: {overlong!r}; choose one of {', '.join(OVERLONG)}"
        )
    return overlong


def _check_rows(
    index: PreparedIndex, dataset: Mapping[str, Any], settings: PreparedSettings, name: str
) -> None:
    """Check what the YAML says about rows against what was prepared."""
    recipe = index.recipe
    if name == "packed_text" and recipe.with_loss:
        raise UserError(
            f"{settings.where}.prepared: {settings.place} has rows with prompts; set"
            " train_loader.name to packed_finetuning"
        )
    said = {
        "text_key": (dataset.get("text_key"), recipe.text_key),
        "target_prompts": (dataset.get("target_prompts"), recipe.target_prompts),
        "target_responses": (dataset.get("target_responses"), recipe.target_responses),
        "preprocessing_fn": (dataset.get("preprocessing_fn"), recipe.preprocessing_fn),
        "hf_name": (dataset.get("hf_name"), recipe.source),
        "split": (dataset.get("split"), recipe.split),
        "holdout": (dataset.get("holdout"), recipe.holdout),
        "hf_kwargs": (without_token(dataset.get("hf_kwargs")) or None, recipe.hf_kwargs),
    }
    for key, (wanted, prepared) in said.items():
        if wanted is not None and _as_text(wanted) != _as_text(prepared):
            raise UserError(
                f"dataset.{key}: {wanted!r}, but {settings.place} was prepared with {prepared!r};"
                f" leave {key} out, or prepare the data again"
            )
    if dataset.get("preprocessing_fn") is not None:
        digest = digest_function(get_preprocessing_fn(dict(dataset)))
        if digest != recipe.preprocess_digest:
            raise UserError(
                f"dataset.preprocessing_fn: {recipe.preprocessing_fn} has changed since"
                f" {settings.place} was prepared; prepare the data again, or leave the key out"
            )


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict) else str(value)


def _describe(settings: PreparedSettings, source: PreparedSource, census: Census) -> dict[str, Any]:
    recipe = source.index.recipe
    counts = census.counts
    return {
        "name": settings.place,
        "split": recipe.split,
        "revision": recipe.revision,
        "documents": round(census.num_documents * source.passes),
        "tokens": round(census.num_tokens * source.passes),
        "passes": source.passes,
        "counts": counts,
    }


def _log(description: Mapping[str, Any], source: PreparedSource, census: Census) -> None:
    counts = {kind: count for kind, count in census.counts.items() if count}
    log.info(
        "%s: %d tokens in %d shards, %g passes in an epoch; documents: %s",
        *(description["name"], census.num_tokens, len(source.index.shards), source.passes, counts),
    )
    if set(counts) - {"kept"} and dist.get_global_rank() == 0:
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        log.warning("%s (max_seq_len %d): %s", description["name"], source.max_seq_len, text)


def window_sampler(
    dataset: Dataset, documents: PreparedDocuments, **settings: Any
) -> WindowSampler:
    """Return a sampler that finds the packs of each window in the cache, or counts them once.

    All ranks must call it together, and begin every epoch together.

    Args:
        dataset: as in `WindowSampler`.
        documents: the documents of the windows.
        settings: as in `WindowSampler`, without `window` and `count`.
    """
    count = _Count(documents, {key: settings[key] for key in ("capacity", "seed", "shuffle")})
    sampler = WindowSampler(dataset, documents, window=documents.window, count=count, **settings)
    documents.check_limit(sampler.plan(0).windows)
    return sampler


class _Count:
    """Packs of each window of an epoch, from the cache or counted by all ranks together."""

    def __init__(self, documents: PreparedDocuments, settings: Mapping[str, Any]):
        self.deciding = ["windows", documents.fingerprint, documents.window, np.__version__]
        self.deciding += list(settings.values())

    def __call__(self, epoch: int, num: int, work: Callable[[int], int]) -> NDArray[np.int64]:
        name, deciding = f"Packing epoch {epoch}", [*self.deciding, epoch]
        rows = planned(deciding, num, 1, lambda i: [work(i)], name=name, unit="windows")
        return rows[:, 0]
