"""Documents, packs and batches for tests, and functions that inspect them."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import Document, PackCollator

MAX_SEQ_LEN = 20
BUILT: list[Any] = []  # the loaders of the test at hand


def document(ids: Sequence[int], prompt: int = 1) -> Document:
    """Return a document whose first `prompt` tokens carry no loss, unlike the rest."""
    return Document(
        input_ids=np.asarray(ids, dtype=np.int32), loss_mask=np.arange(len(ids)) >= prompt
    )


def random_documents(num: int, seed: int = 0, vocabulary: int = 9) -> list[Document]:
    """Return documents of 2 to MAX_SEQ_LEN tokens; id 0, a pad token elsewhere, is a real id."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, MAX_SEQ_LEN + 1, num)
    return [
        document(rng.integers(0, vocabulary, length), prompt=int(rng.integers(0, length)))
        for length in lengths
    ]


def random_packs(num: int, seed: int = 0, **collator) -> list[Pack]:
    """Return packs of 0 to 5 documents."""
    rng = np.random.default_rng(seed)
    collate = PackCollator(max_seq_len=MAX_SEQ_LEN, pack_tokens=5 * MAX_SEQ_LEN, **collator)
    return [collate(random_documents(int(rng.integers(0, 6)), seed + i)) for i in range(num)]


def split_documents(pack: Pack, key: str = "input_ids") -> list[list[int]]:
    """Return the real documents of a pack, without filled slots."""
    ends = pack["cu_seqlens"].tolist()[: pack["num_documents"] + 1]
    row = pack[key][0].tolist()
    return [row[start:end] for start, end in pairwise(ends)]


def assert_packs_equal(ours: Pack, theirs: Pack):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, key
            torch.testing.assert_close(value, other, rtol=0, atol=0, msg=key)
        else:
            assert type(value) is type(other) is int, key
            assert value == other, key


def assert_batches_equal(ours: Iterable[Sequence[Pack]], theirs: Iterable[Sequence[Pack]]):
    """Check that both have the same batches of the same packs."""
    for one, other in zip(ours, theirs, strict=True):
        for pack, other_pack in zip(one, other, strict=True):
            assert_packs_equal(pack, other_pack)


def build(tokenizer, dataset: dict[str, Any], size=2, name="packed_finetuning", **loader):
    """Return the DataSpec that llm-foundry's registry builds under this name."""
    from llmfoundry import registry

    BUILT.append(registry.dataloaders.get(name)(tokenizer, size, dataset, **loader))
    return BUILT[-1]


def walk(spec, epoch: int = 0) -> list[list[Pack]]:
    """Return the batches of an epoch in the way that Composer reads them."""
    spec.dataloader.batch_sampler.set_epoch(epoch)
    return list(spec.dataloader)
