"""The packs of an epoch, and checks of what they are made from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs of one epoch, in training order: `packs[i]` holds the document indices of pack i.

    Attributes:
        documents: [num_documents] int64, the indices of all packs, concatenated.
        offsets: [num_packs + 1] int64; pack i is `documents[offsets[i] : offsets[i + 1]]`.
        capacity: tokens that a pack can hold.
        num_tokens: tokens in all packs.
    """

    documents: np.ndarray
    offsets: np.ndarray
    capacity: int
    num_tokens: int

    def __post_init__(self) -> None:
        self.documents.setflags(write=False)
        self.offsets.setflags(write=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the document indices of one pack: int64, read-only.

        Raises:
            IndexError: there is no such pack.
        """
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self.documents[self.offsets[i] : self.offsets[i + 1]]

    @property
    def packing_efficiency(self) -> float:
        """Tokens over capacity, 0 to 1; 1 without packs, because nothing is wasted."""
        return self.num_tokens / (len(self) * self.capacity) if len(self) else 1.0


def reordered(packs: Packs, rng: np.random.Generator) -> Packs:
    """Return the same packs in another order."""
    # numpy only: there may be millions of packs, too many for a Python object each.
    order = rng.permutation(len(packs))
    sizes = np.diff(packs.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    index = np.repeat(packs.offsets[:-1][order] - offsets[:-1], sizes)
    index += np.arange(len(index))
    return replace(packs, documents=packs.documents[index], offsets=offsets)


def check_least(least: int, **values: int) -> None:
    """Check that each value is at least `least`.

    Raises:
        ValueError: otherwise; names the value.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}")


def check_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Return the lengths as an array of integers.

    Raises:
        ValueError: a length is outside 1..capacity, or they are not a flat sequence of integers.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)  # numpy's type for [] is float
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"lengths are {lengths.dtype} of shape {lengths.shape}; "
            "pass one integer number of tokens per document"
        )
    bad = np.flatnonzero((lengths <= 0) | (lengths > capacity))
    if len(bad):
        raise ValueError(
            f"document {bad[0]} has {lengths[bad[0]]} tokens, outside 1..{capacity} (capacity), "
            f"and so do {len(bad) - 1} more; leave out empty documents, and shorten or drop long "
            "ones by the loader's `overlong` setting"
        )
    return lengths
