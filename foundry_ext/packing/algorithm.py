"""Packing: the choice of documents that share a row of `capacity` tokens.

It sees lengths only, no tokens, and needs no torch. `pack` is a pure function of its arguments, so
every rank and every resumed run computes the same packs instead of exchanging or storing them.

Method, per window of shuffled documents:

1. Three quarters of the documents are packed in arrival order by next fit. This mixes long and
   short documents but leaves a gap at the end of each pack.
2. The rest, the pool, closes the gaps: a pack with a gap of g tokens takes a pool document of
   exactly g tokens. All packs are matched at once, by sorting.
3. Only packs without a gap are kept. The documents of all others go through 1 and 2 again until
   a round places too few of them. The last few per cent are packed by first fit decreasing.

    lengths [3, 5, 2, 6, 3], capacity 8, pool: the 2 and the last 3
    next fit [3, 5] [6 _ _]  ->  the 2 closes the gap: [3, 5] [6, 2]; the 3 waits for round 2

`pack_in_order` shuffles nothing: it is next fit over the documents as they come.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from foundry_ext.packing.packs import Packs, check_least, check_lengths

# Fraction of the documents reserved for closing gaps. Measured on log-normal lengths (median 350,
# sigma .9) at capacity 2048: packing efficiency is the same from .1 to .5; the coefficient of
# variation of documents per pack is .49 at .1 and .47 from .2 to .4.
_POOL_SHARE = 0.25
# Rounds continue while each places at least this fraction of its documents. The rest is packed by
# length, which mixes long and short documents less.
_MIN_PROGRESS = 0.02
# Above this ratio to the ideal number of packs, first fit decreasing is tried on the window.
_TOLERANCE = 1.001


def pack(
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    *,
    seed: int,
    epoch: int,
    number: int | None = None,
    window: int = 2**17,
) -> Packs:
    """Put every document into exactly one pack of at most `capacity` tokens.

    pack([3, 5, 2, 6, 3], 8, seed=0, epoch=0)  ->  [4], [0, 1], [2, 3]: 3, 8 and 8 tokens
    pack([3, 5, 2, 6, 3], 8, seed=0, epoch=1)  ->  [0], [1, 4], [3, 2]

    It never makes more than 1.001 times the packs of first fit decreasing over the same window.
    This also limits the method: if lengths leave little choice (a few hundred documents, or few
    distinct lengths), the packs are those of first fit decreasing. Between epochs they then differ
    in order but little in composition.

    Args:
        lengths: [num_documents], tokens of each document, integers in 1..capacity.
        capacity: tokens that a pack can hold.
        seed: seed of the shuffle, together with `epoch`. Equal arguments give equal packs under
            one version of numpy, whose generators may change (NEP 19).
        epoch: see `seed`.
        number: see `seed`; for plans that are made of several calls.
        window: documents packed at a time. It bounds the working memory, not the shuffle, which is
            over all documents. Below about 2**14 packing efficiency drops, and long and short
            documents are mixed less.

    Raises:
        ValueError: a length is outside 1..capacity, lengths are not a flat sequence of integers,
            capacity or window is below 1, or seed or epoch is negative.
    """
    check_least(1, capacity=capacity, window=window)
    check_least(0, seed=seed, epoch=epoch)
    lengths = check_lengths(lengths, capacity)
    rng = np.random.default_rng((seed, epoch) if number is None else (seed, epoch, number))
    documents, sizes = zip(*_packed_windows(lengths, capacity, window, rng), strict=True)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Packs(np.concatenate(documents), offsets, capacity, int(lengths.sum(dtype=np.int64)))


def pack_in_order(
    lengths: Sequence[int] | np.ndarray, capacity: int, *, window: int = 2**17
) -> Packs:
    """Fill packs with neighbours and keep the order of the documents, by next fit.

    pack_in_order([3, 5, 2, 6, 3], 8)  ->  [0, 1], [2, 3], [4]: 8, 8 and 3 tokens

    A pack is closed when the next document does not fit, so packs have gaps that `pack` would
    close: each is at most as large as the document after it.

    Args:
        lengths: [num_documents], tokens of each document, integers in 1..capacity.
        capacity: tokens that a pack can hold.
        window: documents looked at a time. It bounds the working memory and changes no pack.

    Raises:
        ValueError: as in `pack`.
    """
    check_least(1, capacity=capacity, window=window)
    lengths = check_lengths(lengths, capacity)
    window = max(window, capacity + 1)  # so that no pack is longer than a window
    starts, first = [], 0
    while first < len(lengths):
        found = first + _next_fit(lengths[first : first + window], capacity)
        is_last = first + window >= len(lengths)
        # The last pack ran out of documents: it starts the next window.
        starts.append(found if is_last else found[:-1])
        first = len(lengths) if is_last else int(found[-1])
    offsets = np.concatenate([*starts, [len(lengths)]]).astype(np.int64)
    return Packs(np.arange(len(lengths)), offsets, capacity, int(lengths.sum(dtype=np.int64)))


def most_documents(lengths: np.ndarray, capacity: int) -> int:
    """Return the most documents that any plan can put into one pack, by taking the shortest.

    most_documents([5, 2, 3, 2, 9], 8)  ->  3, of 2, 2 and 3 tokens

    Args:
        lengths: [num_documents], tokens of each document, positive integers.
        capacity: tokens that a pack can hold.
    """
    return most_of_counts(np.bincount(lengths), capacity)


def most_of_counts(counts: np.ndarray, capacity: int) -> int:
    """Return `most_documents` for counts[l] documents of l tokens; counts[0] is ignored."""
    counts = counts.copy()
    counts[:1] = 0
    tokens = np.cumsum(counts * np.arange(len(counts)))  # in documents of up to this length
    # The first length of which not all documents fit beside all shorter ones.
    partial = int(np.searchsorted(tokens, capacity, side="right"))
    if partial == len(counts):
        return int(counts.sum())
    left = capacity - int(tokens[partial - 1])
    return int(counts[:partial].sum()) + left // partial


def _packed_windows(
    lengths: np.ndarray, capacity: int, window: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (documents in the order of their packs, documents per pack) of each window."""
    windows = np.array_split(rng.permutation(len(lengths)), max(1, -(-len(lengths) // window)))
    carry = windows[0][:0]
    for i, window_documents in enumerate(windows):
        documents = np.concatenate([carry, window_documents])
        pack_of = _pack_window(lengths[documents].astype(np.int64), capacity, rng)
        # The last pack is the one that ran out of documents: it stays open for the next window.
        num_closed = _count(pack_of) - (i < len(windows) - 1)
        closed = pack_of < num_closed
        # Packs were made in order of quality, full ones first: shuffle that order away.
        shuffled = rng.permutation(num_closed)[pack_of[closed]]
        yield documents[closed][_argsort(shuffled, num_closed)], np.bincount(shuffled)
        carry = documents[~closed]


def _pack_window(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Return the pack of each document; the last pack is the most likely to have a gap."""
    pack_of = np.full(len(lengths), -1)
    num_packs, left = 0, np.arange(len(lengths))
    progress = 1.0
    while len(left) and progress >= _MIN_PROGRESS:
        full_pack_of = _full_packs(lengths[left], capacity, rng)
        placed = full_pack_of >= 0
        pack_of[left[placed]] = num_packs + full_pack_of[placed]
        num_packs += _count(full_pack_of)
        left = left[~placed]
        progress = placed.mean()
    pack_of[left] = num_packs + _first_fit_decreasing(lengths[left], capacity)
    # If half of the documents are longer than half a pack, full packs of short documents leave the
    # long ones without partners. Sorting by length is then the better plan.
    ideal = -(-lengths.sum() // capacity)
    if _count(pack_of) > _TOLERANCE * ideal:
        by_length = _first_fit_decreasing(lengths, capacity)
        if _count(pack_of) > _TOLERANCE * _count(by_length):
            return by_length
    return pack_of


def _full_packs(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Return the pack of each document that ends up in a pack without a gap, -1 for others."""
    in_pool = (rng.random(len(lengths)) < _POOL_SHARE) & (2 * lengths <= capacity)
    in_pool[0] = False  # next fit needs a document to start with
    base, pool = np.flatnonzero(~in_pool), np.flatnonzero(in_pool)
    starts = _next_fit(lengths[base], capacity)
    gaps = capacity - np.add.reduceat(lengths[base], starts)
    packs, closers = _match(gaps, lengths[pool], capacity)
    full = gaps == 0
    full[packs] = True
    labels = np.where(full, np.cumsum(full) - 1, -1)
    pack_of = np.full(len(lengths), -1)
    pack_of[base] = np.repeat(labels, np.diff(starts, append=len(base)))
    pack_of[pool[closers]] = labels[packs]
    return pack_of


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the first document of each pack; a pack takes documents until one does not fit."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    # following[i]: the start of the next pack if one starts at i. numpy finds it for every i at
    # once, so only the walk along the chain is left to Python.
    following = (np.searchsorted(ends, ends[:-1] + capacity, side="right") - 1).tolist()
    starts, i = [], 0
    while i < len(following):
        starts.append(i)
        i = following[i]
    return np.array(starts, dtype=np.int64)


def _match(gaps: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices into gaps, indices into lengths) of equal values, each index at most once.

    gaps [5, 3, 5], lengths [4, 5, 3]  ->  [1, 0], [2, 1]: the second gap of 5 finds no partner
    """
    by_gap, by_length = _argsort(gaps, capacity + 1), _argsort(lengths, capacity + 1)
    num_gaps = np.bincount(gaps, minlength=capacity + 1)
    num_lengths = np.bincount(lengths, minlength=capacity + 1)
    value = gaps[by_gap]
    rank = np.arange(len(gaps)) - (np.cumsum(num_gaps) - num_gaps)[value]  # among equal gaps
    partner = (np.cumsum(num_lengths) - num_lengths)[value] + rank
    has_partner = rank < num_lengths[value]
    return by_gap[has_partner], by_length[partner[has_partner]]


def _first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the pack of each document; each pack takes the longest that fits, until none does.

    This equals first fit over documents sorted by falling length, done pack by pack instead of
    document by document. It makes at most 11/9 of the optimum + 6/9 packs (Dosa 2007), and comes
    far closer with many short documents.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    # Bit l: a document of length l is left. The longest that fits is then one bit operation away.
    available = sum(1 << length for length in np.flatnonzero(counts).tolist())
    counts = counts.tolist()
    taken, packs = [], []  # length and pack of each document, in the order they are packed
    current, gap = -1, 0
    while available:
        fitting = available & ((2 << gap) - 1)
        if not fitting:
            current, gap = current + 1, capacity
            continue
        length = fitting.bit_length() - 1
        counts[length] -= 1
        if not counts[length]:
            available ^= 1 << length
        gap -= length
        taken.append(length)
        packs.append(current)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    by_length = _argsort(lengths, capacity + 1)
    pack_of[by_length] = np.array(packs, dtype=np.int64)[
        _argsort(np.array(taken, dtype=np.int64), capacity + 1)
    ]
    return pack_of


def _count(pack_of: np.ndarray) -> int:
    return int(pack_of.max(initial=-1)) + 1


def _argsort(keys: np.ndarray, num_keys: int) -> np.ndarray:
    """Return a stable argsort of keys in 0..num_keys-1."""
    # numpy has a radix sort for 16 bits only.
    return np.argsort(keys.astype(np.uint16) if num_keys <= 2**16 else keys, kind="stable")
