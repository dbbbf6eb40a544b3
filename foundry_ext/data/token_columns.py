"""The columns of a table that hold documents' tokens, as they lie in its Arrow files.

input_ids is uint16 if all ids of the tokenizer fit in it, otherwise int32. Which tokens carry loss
is kept as the places where that changes, because few documents change more than once:

    loss mask  0 0 0 1 1 1   1 1 1   0 0 1 1 0
    mask_ends  [3]           [0]     [2, 4]

Plain text, all of which is learned, lacks that column. Earlier versions wrote int32 and, in
has_loss, a byte per token; their tables are read as they are.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from foundry_ext.packing.collator import Document

IDS, ENDS, _HAS_LOSS = "input_ids", "mask_ends", "has_loss"


def ids_type(max_id: int) -> Any:
    """Return the Arrow type that holds ids up to `max_id` in the fewest bytes."""
    return pa.uint16() if max_id < 2**16 else pa.int32()


def mask_ends(masks: NDArray[np.bool_], offsets: NDArray[np.int32]) -> pa.ListArray:
    """Return the column of masks that lie end to end, document i from offsets[i] on."""
    before = np.empty_like(masks)
    before[1:] = masks[:-1]
    before[offsets[:-1][np.diff(offsets) > 0]] = False
    places = np.flatnonzero(masks != before)
    documents = np.searchsorted(offsets, places, side="right") - 1
    counts = np.bincount(documents, minlength=len(offsets) - 1)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, (places - offsets[documents]).astype(np.int32))


class TokenChunk:
    """The documents of a chunk of a table.

    Attributes:
        offsets: [n + 1] int32, where each document begins in `ids`.
        ids: the documents' tokens, end to end, perhaps with others around them.
        template: False, then as often True, each at least as often as a document has tokens.
    """

    def __init__(self, ids: Any, masks: Any, kind: str | None):
        self.offsets, self.ids = ids.offsets.to_numpy(), ids.values.to_numpy()
        self._starts: Any = None
        self._flags: Any = None
        self._ends: Any = None
        if kind is not None:
            self._starts, values = masks.offsets.to_numpy(), masks.values.to_numpy()
            if kind == _HAS_LOSS:
                self._flags = values.view(np.bool_)
            else:
                self._ends = values
        self.template = np.empty(0, np.bool_)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, row: int) -> Document:
        """Return a document; its ids and, mostly, its mask are views."""
        start, end = self.offsets.item(row), self.offsets.item(row + 1)
        return Document(self.ids[start:end], self.loss_mask(row, end - start))

    def loss_mask(self, row: int, length: int) -> NDArray[np.bool_]:
        """Return the mask of a document of this length."""
        first, starts = 0, self._starts
        if starts is not None:
            start, stop = starts.item(row), starts.item(row + 1)
            if self._ends is None:
                return self._flags[start:stop]
            if stop - start > 1:
                return _mask(self._ends[start:stop].tolist(), length)
            first = self._ends.item(start) if stop > start else length
        start = len(self.template) // 2 - first
        return self.template[start : start + length]

    def hash_block(self, place: slice) -> str:
        """Return a hash of the tokens, and of the flags of an earlier version."""
        digest = xxhash.xxh3_64(self.ids[place])
        if self._flags is not None:
            digest.update(self._flags[place])
        return digest.hexdigest()

    def index(self) -> Iterator[Any]:
        """Yield the arrays that tell documents and their masks apart."""
        arrays = (self.offsets, self._starts, self._ends)
        yield from (array for array in arrays if array is not None)


def chunks_of(table: datasets.Dataset) -> list[TokenChunk]:
    """Return the chunks of a table's documents, in order."""
    kind = next((name for name in (_HAS_LOSS, ENDS) if name in table.column_names), None)
    ids = table.data.column(IDS).chunks
    masks = [None] * len(ids) if kind is None else table.data.column(kind).chunks
    chunks = [TokenChunk(*pair, kind) for pair in zip(ids, masks, strict=True)]
    longest = max((int(np.diff(chunk.offsets).max(initial=0)) for chunk in chunks), default=0)
    # False up to its middle and True from there on: most masks are a part of it.
    template = np.arange(2 * longest) >= longest
    template.setflags(write=False)  # all documents share it
    for chunk in chunks:
        chunk.template = template
    return chunks


def _mask(ends: list[int], length: int) -> NDArray[np.bool_]:
    mask = np.zeros(length, np.bool_)
    for start, end in zip(ends[::2], [*ends[1::2], length], strict=False):
        mask[start:end] = True
    return mask
