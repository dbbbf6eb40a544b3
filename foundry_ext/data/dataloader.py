"""Registry builders `packed_finetuning` and `packed_text`: YAML keys -> Composer DataSpec."""

from typing import Any, cast

import torch
from composer.core import DataSpec
from composer.utils import dist
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.config import check_keys, get_batch_packs, get_pack_tokens
from foundry_ext.data.dataset import PackedDataLoader, PackedDataset
from foundry_ext.data.loading import load_documents, most_documents_of
from foundry_ext.data.ranks import telling_others
from foundry_ext.packing.batch import num_documents, num_tokens, split_batch
from foundry_ext.packing.collator import PackCollator
from foundry_ext.utils.absent import dataset_settings
from foundry_ext.utils.errors import UserError


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
      rows that are shuffled and packed together. `local`, `cache_limit`: a folder for shards
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
    documents, descriptions = load_documents(dataset, tokenizer, name=name)
    packed = PackedDataset(
        documents,
        PackCollator(
            max_seq_len=dataset["max_seq_len"],
            pack_tokens=pack_tokens,
            pad_token_id=cast(int, tokenizer.pad_token_id or 0),
            fixed_shape=dataset.get("fixed_shape", False) is True,  # auto: train.py has not decided
            max_documents=most_documents_of(documents, pack_tokens),
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
