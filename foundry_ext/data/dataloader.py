"""`packed_finetuning` and `packed_text`: registry builders -> Composer DataSpec."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist, reproducibility
from llmfoundry.data.finetuning.tasks import dataset_constructor
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.batch import Pack, num_documents, num_tokens, split_batch
from foundry_ext.data.collator import PackCollator
from foundry_ext.data.config import (
    FINETUNING_KEYS,
    TEXT_KEYS,
    check_keys,
    get_batch_packs,
    get_pack_tokens,
    stream_key,
    tokenize_settings,
)
from foundry_ext.data.documents import Documents
from foundry_ext.data.sampler import PackedBatchSampler
from foundry_ext.data.sources import fetch, load_rows, load_streams, local_rank_zero_first
from foundry_ext.data.tokenize import tokenize_rows, tokenize_stream

log = logging.getLogger(__name__)


class PackedDataset(Dataset):
    """Documents by pack, and how far training has come in them.

    Composer saves `state_dict` and restores `load_state_dict` of a loader's dataset, never of its
    sampler, so the batch number is kept here. Documents are never read to skip them.
    """

    def __init__(
        self, documents: Documents, collator: PackCollator, sampler_settings: dict[str, Any]
    ):
        self.documents, self.collator = documents, collator
        self.num_documents = int(np.count_nonzero(documents.lengths))
        self.sampler = PackedBatchSampler(self, documents.lengths, **sampler_settings)
        self.epoch, self.next_batch = 0, 0
        self.pending_rng: Any = None

    def __len__(self) -> int:
        """Documents in use: Composer's samples of an epoch."""
        return self.num_documents

    def __getitem__(self, pack: NDArray[np.int64]) -> Pack:
        return self.collator([self.documents[int(index)] for index in pack])

    @property
    def fingerprint(self) -> str:
        """Of the data and of all that decides the plan, ranks excluded."""
        sampler = self.sampler
        return f"{self.documents.fingerprint}-{sampler.capacity}-{sampler.seed}-{sampler.shuffle:d}"

    def state_dict(self, num_samples: int | None = None, from_beginning: bool = True) -> dict:
        """The batch that comes next; `num_samples`, which counts documents, is of no use here."""
        return {
            "epoch": self.epoch,
            "batch": self.next_batch,
            "global_batch_packs": self.sampler.batch_packs * self.sampler.num_replicas,
            "fingerprint": self.fingerprint,
            "plan": self.sampler.plan_digest(self.epoch) if self.next_batch else None,
            "rng": reproducibility.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on where `state` was saved, on any number of ranks that meets at a batch's end.

        Raises:
            ValueError: saved with another loader, other data, other packs in the epoch at hand, or
                between the batches of this global batch size.
        """
        if state is None:
            # Composer takes it that the place was found again, and skips no batches itself.
            raise ValueError(
                "the checkpoint was made with another loader and does not say where in the data it"
                " ends; restore that loader, or start anew with load_weights_only: true"
            )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was made with other data or packing ({state['fingerprint']}, now"
                f" {self.fingerprint}); restore the YAML, or start anew with load_weights_only:"
                " true"
            )
        packs = state["batch"] * state["global_batch_packs"]
        batch, rest = divmod(packs, self.sampler.batch_packs * self.sampler.num_replicas)
        if rest:
            raise ValueError(
                f"the checkpoint ends after {packs} packs, which is inside a global batch of"
                f" {self.sampler.batch_packs} x {self.sampler.num_replicas}; restore its batch size"
            )
        if state["plan"] not in (None, self.sampler.plan_digest(state["epoch"])):
            # The batch size decides whether an epoch has the first one's packs, see the sampler.
            raise ValueError(
                f"the checkpoint ends inside epoch {state['epoch']}, which has other packs under"
                " this global batch size or numpy; restore those of the checkpoint"
            )
        self.epoch, self.next_batch = state["epoch"], batch
        self.sampler.resume_at(epoch=self.epoch, batch=batch)
        # At an epoch's start Composer restores the random state itself.
        self.pending_rng = state["rng"] if batch else None

    def restore_rng(self) -> None:
        """Once, the random state that `load_state_dict` was given."""
        if self.pending_rng is not None:
            reproducibility.load_rng_state(self.pending_rng)
            self.pending_rng = None


class PackedDataLoader(DataLoader):
    """Yields lists of packs and keeps the dataset's place.

    Composer restores the random state when it skips batches, but not when a dataset resumes itself;
    dropout would then differ from the run that was not interrupted. So it is restored here, right
    before the first batch, which is where an uninterrupted run had it.
    """

    dataset: PackedDataset

    def __init__(self, dataset: PackedDataset, **kwargs: Any):
        super().__init__(
            dataset,
            batch_sampler=dataset.sampler,
            collate_fn=_same,
            # Its own generator: an iterator draws a seed, which must not disturb the model's.
            generator=torch.Generator().manual_seed(dataset.sampler.seed),
            **kwargs,
        )

    def __iter__(self) -> Iterator[list[Pack]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dataset, sampler = self.dataset, self.dataset.sampler
        dataset.epoch, dataset.next_batch = sampler.epoch, sampler.first_batch
        if dataset.next_batch == 0:
            dataset.pending_rng = None
        for batch in super().__iter__():
            dataset.next_batch += 1
            dataset.restore_rng()
            yield batch
        dataset.restore_rng()  # where no batch was left in the epoch
        dataset.epoch, dataset.next_batch = sampler.epoch + 1, 0


def _same(packs: list[Pack]) -> list[Pack]:
    return packs


def build_packed_finetuning_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    num_workers: int = 0,
    drop_last: bool = False,
    **loader: Any,
) -> DataSpec:
    """Prompt/response and chat rows, packed. The keys are those of llm-foundry's `finetuning`, and:

    - `pack_tokens` (default `max_seq_len`): tokens a pack may hold; size it to fill the device.
    - `overlong` (truncate, split, drop, error; default truncate): rows above `max_seq_len`.
    - `eval_packs`: packs of an evaluation batch, in place of `device_eval_batch_size`.
    - `holdout`: {by, fraction, part}, a split by the values of a column.
    - `fixed_shape` (default false): every pack filled to one shape, for compilation.
    - `shuffle_seed` (default 17).

    Args:
        tokenizer: needs an end-of-text token.
        device_batch_size: packs of a batch on this device.
        dataset: the keys above.
        num_workers, drop_last: as in torch's DataLoader; `drop_last` leaves out a last incomplete
            global batch.
        loader: pin_memory, prefetch_factor, persistent_workers, timeout.

    Raises:
        ValueError: unknown or contradictory keys; names the key and the way out.
    """
    check_keys(dataset, FINETUNING_KEYS, "packed_finetuning")
    if not dataset.get("decoder_only_format", True):
        raise ValueError("packed_finetuning: decoder_only_format: false has no packed form")
    tokenizer = _require_tokenizer(tokenizer, "packed_finetuning")
    settings = tokenize_settings(dataset, ("target_prompts", "target_responses"))
    preprocess = _preprocessing_fn(dataset)

    def load() -> Documents:
        if stream_key(dataset) is not None:
            stream = load_streams(dataset, tokenizer, settings.max_seq_len)
            return tokenize_stream(stream, tokenizer, settings)
        arguments = _row_arguments(dataset)
        with local_rank_zero_first():
            rows = load_rows(**arguments)
            return tokenize_rows(
                rows, tokenizer, settings, preprocess=preprocess, num_proc=_num_proc()
            )

    return _build(load, dataset, tokenizer, device_batch_size, num_workers, drop_last, **loader)


def build_packed_text_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int,
    dataset: dict[str, Any],
    num_workers: int = 0,
    drop_last: bool = False,
    **loader: Any,
) -> DataSpec:
    """Plain text for continued pretraining: a document a row, closed with end-of-text, packed.

    Keys as in `packed_finetuning` without those of prompts and responses; `text_key` (default
    "text") names the column, and `overlong` is "split" unless said otherwise.
    """
    check_keys(dataset, TEXT_KEYS, "packed_text")
    tokenizer = _require_tokenizer(tokenizer, "packed_text")
    text_key = dataset.get("text_key") or "text"
    dataset = {**dataset, "text_key": text_key, "overlong": dataset.get("overlong") or "split"}
    settings = tokenize_settings(dataset, ("text_key",))

    def load() -> Documents:
        arguments = _row_arguments(dataset)
        with local_rank_zero_first():
            rows = load_rows(**arguments)
            if text_key not in rows.column_names:
                raise ValueError(
                    f"packed_text: no column {text_key!r} in {dataset['hf_name']}; there are"
                    f" {', '.join(rows.column_names)}: set text_key"
                )
            return tokenize_rows(
                rows.select_columns([text_key]), tokenizer, settings, num_proc=_num_proc()
            )

    return _build(load, dataset, tokenizer, device_batch_size, num_workers, drop_last, **loader)


def _build(
    load: Callable[[], Documents],
    dataset: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int,
    num_workers: int,
    drop_last: bool,
    *,
    pin_memory: bool = True,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """Everything cheap is checked before `load`, which may take long."""
    pack_tokens = get_pack_tokens(dataset)
    eval_packs = dataset.get("eval_packs")
    batch_packs = get_batch_packs(device_batch_size if eval_packs is None else eval_packs)
    documents = load()
    _log_counts(documents, dataset)
    packed = PackedDataset(
        documents,
        PackCollator(
            max_seq_len=dataset["max_seq_len"],
            pack_tokens=pack_tokens,
            pad_token_id=cast(int, tokenizer.pad_token_id or 0),
            fixed_shape=dataset.get("fixed_shape", False),
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
    )
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


def _require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, name: str
) -> PreTrainedTokenizerBase:
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{name} needs a tokenizer with an end-of-text token (eos_token)")
    return tokenizer


def _row_arguments(dataset: dict[str, Any]) -> dict[str, Any]:
    """Those of `load_rows`; to be called by all ranks at once, see `fetch`."""
    if dataset.get("hf_name") is None:
        raise ValueError("set dataset.hf_name: a hub dataset, a local file, or a folder")
    hf_name, split = fetch(dataset["hf_name"], dataset.get("split"))
    keys = ("hf_kwargs", "safe_load", "holdout")
    options = {key: dataset[key] for key in keys if dataset.get(key) is not None}
    return {"hf_name": hf_name, "split": split, **options}


def _preprocessing_fn(dataset: dict[str, Any]) -> Callable[[dict[str, Any]], Any] | None:
    given = dataset.get("preprocessing_fn")
    if isinstance(given, dict):
        return dataset_constructor.get_preprocessing_fn_from_dict(given)
    return dataset_constructor.get_preprocessing_fn_from_str(given, dataset.get("hf_name"))


def _num_proc() -> int:
    """Processes to tokenise with: this machine's cores, less what the user keeps back."""
    return min(os.cpu_count() or 1, int(os.environ.get("MAX_NUM_PROC", 64)))


def _log_counts(documents: Documents, dataset: dict[str, Any]) -> None:
    """What was cut, split or dropped is a warning, so that it is seen at any log level."""
    counts = {name: count for name, count in documents.counts.items() if count}
    name = dataset.get("hf_name") or "streams"
    tokens = int(documents.lengths.sum())
    log.info("%s: %d tokens; documents: %s", name, tokens, counts)
    if set(counts) - {"kept"} and dist.get_global_rank() == 0:
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        log.warning("%s (max_seq_len %d): %s", name, dataset["max_seq_len"], found)
