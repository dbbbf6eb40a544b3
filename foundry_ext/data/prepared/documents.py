"""Documents of prepared data, read shard by shard; see packing/windows.py for their order.

A document is named by one number: its shard's position, over all sources, times 2**32, plus its
position among the shard's documents.

A source may be used several times in an epoch, or in part. Each complete pass over it has all its
shards as *units*. A part f of a pass has them, too, with a share f of each shard's tokens, which
moves on with every epoch: after 1/f epochs every document has been used.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from foundry_ext.data.documents import sketch
from foundry_ext.data.prepared.census import Census, merge_censuses
from foundry_ext.data.prepared.cuts import Cuts
from foundry_ext.data.prepared.shard import FlatTokens, Shard
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import Document, PackCollator

_SHARD = 2**32
_DRAW_SEED = 17  # of the order in which parts of a shard are taken


class PreparedDocuments:
    """The documents of all sources.

    Args:
        sources: at least one.
        censuses: the counts of one pass over each source.
        window: rows that a window has at least. The sizes and files of two windows are kept open.

    Attributes:
        census: the counts of an epoch. A part of a pass counts by its share.
    """

    def __init__(
        self, sources: Sequence[PreparedSource], censuses: Sequence[Census], *, window: int
    ):
        self.sources, self.censuses, self.window = list(sources), list(censuses), window
        self.census = merge_censuses(censuses, [source.passes for source in sources])
        counts = [len(source.index.shards) for source in sources]
        self._first_shard = np.cumsum([0, *counts])
        self._source = np.repeat(np.arange(len(sources)), counts)
        self._rows = np.concatenate([np.diff(source.index.first_row) for source in sources])
        self._most_rows = 2 * (window + int(self._rows.max(initial=0)))
        self._units = _units(sources, self._first_shard)
        self._open: OrderedDict[int, tuple[Cuts, Shard | None]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind, for a worker process to open its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the shards, and of what decides the documents they have."""
        digest = xxhash.xxh3_128()
        for source in self.sources:
            deciding = (source.max_seq_len, source.overlong, source.passes)
            digest.update(f"{source.index.fingerprint} {deciding}".encode())
        return digest.hexdigest()[:16]

    @property
    def most_lengths(self) -> NDArray[np.int64]:
        """[max_seq_len + 1] most documents of each length that an epoch may have."""
        passes = [float(np.ceil(source.passes)) for source in self.sources]
        return merge_censuses(self.censuses, passes).lengths.astype(np.int64)

    @property
    def varies(self) -> bool:
        """Whether epochs have different documents."""
        return any(source.passes % 1 for source in self.sources)

    @property
    def num_used(self) -> int:
        """Documents of an epoch that are used."""
        return self.census.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch."""
        return self.census.num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return self.census.longest

    @property
    def plan_fingerprint(self) -> str:
        """Hash of all that decides the packs but the sampler's settings."""
        return f"{self.fingerprint} window {self.window}"

    @property
    def counts(self) -> dict[str, int]:
        """Documents of an epoch per outcome, as `counts` of `Documents`."""
        return self.census.counts

    def source_fingerprints(self) -> list[str]:
        """Return the hash of each source's shards."""
        return [source.index.fingerprint for source in self.sources]

    def count_loss_tokens(self) -> int:
        """Return the tokens of an epoch that are predicted.

        It is an estimate where rows with prompts are cut.
        """
        total = 0.0
        for source, census in zip(self.sources, self.censuses, strict=True):
            if source.index.recipe.with_loss:
                shards = source.index.shards
                tokens = sum(shard.tokens for shard in shards)
                share = sum(shard.loss_tokens for shard in shards) / max(tokens, 1)
                total += census.num_tokens * share * source.passes
            else:
                total += (census.num_tokens - census.num_documents) * source.passes
        return round(total)

    def sizes(self) -> NDArray[np.int64]:
        """Return [num_units], rows of each unit, or about as many in a part."""
        shards, parts = self._units
        return np.round(self._rows[shards] * parts).astype(np.int64)

    def documents(
        self, epoch: int, units: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return [n] documents of units, in order, and [n] tokens of each; 0 leaves one out."""
        names, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for unit in units.tolist():
            shard, part = int(self._units[0][unit]), float(self._units[1][unit])
            cuts = self._cuts(shard)
            names.append(shard * _SHARD + np.arange(len(cuts)))
            used = cuts.lengths.astype(np.int64)
            lengths.append(used if part == 1 else _part(used, shard, part, epoch))
        return np.concatenate(names), np.concatenate(lengths)

    def prepare(self, units: NDArray[np.int64], following: NDArray[np.int64]) -> None:
        """Make the shards of a window readable, and begin to fetch those of the next."""
        now, next_ = (np.unique(self._units[0][some]) for some in (units, following))
        windows = []
        for number, source in enumerate(self.sources):
            first = self._first_shard[number]
            mine = [some[self._source[some] == number] - first for some in (now, next_)]
            windows.append((source.files, mine[0].tolist(), mine[1].tolist()))
        for files, *window in windows:  # all before a shard is fetched, or one removes another's
            files.announce(*window)
        for files, *window in windows:
            files.need(*window)

    def check_limit(self, windows: Sequence[NDArray[np.int64]]) -> None:
        """Check that the folder of fetched shards may hold any two windows that follow each other.

        Raises:
            UserError: it may not.
        """
        for position, window in enumerate(windows):
            both = np.concatenate([window, *windows[position + 1 : position + 2]])
            size = 0
            for shard in np.unique(self._units[0][both]).tolist():
                source = int(self._source[shard])
                size += self.sources[source].index.shards[shard - self._first_shard[source]].bytes
            for source in self.sources:
                if source.files.local is not None:
                    source.files.local.check(size)

    def locate(self, document: int) -> tuple[int, int]:
        """Return (source, row in it) of a document."""
        shard, position = divmod(document, _SHARD)
        source = int(self._source[shard])
        first = self.sources[source].index.first_row[shard - self._first_shard[source]]
        return source, int(first + self._cuts(shard).rows[position])

    def lengths_of(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return [n] tokens of documents."""
        shards, positions = np.divmod(np.asarray(documents, np.int64), _SHARD)
        lengths = np.zeros(len(documents), dtype=np.int64)
        for shard in np.unique(shards):
            mine = shards == shard
            lengths[mine] = self._cuts(int(shard)).lengths[positions[mine]]
        return lengths

    def outcome_of(self, document: int) -> tuple[RowOutcome, int]:
        """Return the outcome of a document, and how many tokens were removed from it."""
        shard, position = divmod(document, _SHARD)
        cuts = self._cuts(shard)
        return RowOutcome(int(cuts.outcomes[position])), int(cuts.num_truncated_tokens[position])

    def read_flat(self, documents: NDArray[np.integer]) -> tuple[FlatTokens, NDArray[np.int64]]:
        """Return the tokens of documents, end to end, and [n] tokens of each."""
        shards, positions = np.divmod(np.asarray(documents, np.int64), _SHARD)
        used, lengths = np.unique(shards), self.lengths_of(documents)
        total = int(lengths.sum())
        ids, mask = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.bool_)
        owner = np.repeat(shards, lengths) if len(used) > 1 else None
        for shard in used:
            mine = shards == shard
            cuts, file = self._opened(int(shard))
            at = positions[mine]
            part = file.read(cuts.rows[at], cuts.starts[at], cuts.lengths[at])
            where = slice(None) if owner is None else owner == shard
            ids[where], mask[where] = part.input_ids, part.loss_mask
        return FlatTokens(ids, mask), lengths

    def pack(self, documents: NDArray[np.integer], collator: PackCollator) -> Pack:
        """Return a pack of documents."""
        tokens, lengths = self.read_flat(documents)
        return collator.join(*tokens, lengths)

    def read(self, documents: NDArray[np.integer]) -> list[Document]:
        """Return documents one by one."""
        (ids, mask), lengths = self.read_flat(documents)
        ends = np.cumsum(lengths)[:-1]
        parts = zip(np.split(ids, ends), np.split(mask, ends), strict=True)
        return [Document(*part) for part in parts] if len(documents) else []

    def used_documents(self) -> Iterator[NDArray[np.int64]]:
        """Yield the documents of each shard that are used."""
        for shard in range(len(self._source)):
            yield shard * _SHARD + np.flatnonzero(self._cuts(shard).lengths)

    def sketches(self, documents: NDArray[np.integer], most_tokens: int) -> NDArray[np.uint64]:
        """Return [n], as in `Documents.sketches`."""
        hashes = np.zeros(len(documents), dtype=np.uint64)
        shards, positions = np.divmod(np.asarray(documents, np.int64), _SHARD)
        for shard in np.unique(shards):
            mine = shards == shard
            cuts, file = self._opened(int(shard))
            at = positions[mine]
            lengths = np.minimum(cuts.lengths[at], most_tokens)
            one = np.ones(len(at), dtype=np.int64)
            places = [cuts.starts[at] + lengths * quarter // 4 for quarter in (1, 2, 3)]
            tokens = [file.read(cuts.rows[at], place, one).input_ids for place in places]
            hashes[mine] = sketch(lengths, tokens)
        return hashes

    def _cuts(self, shard: int) -> Cuts:
        if shard not in self._open:
            source = int(self._source[shard])
            cuts = self.sources[source].cuts(shard - int(self._first_shard[source]))
            self._keep(shard, cuts, None)
        self._open.move_to_end(shard)
        return self._open[shard][0]

    def _opened(self, shard: int) -> tuple[Cuts, Shard]:
        cuts, file = self._cuts(shard), self._open[shard][1]
        if file is None:
            source = int(self._source[shard])
            file = self.sources[source].files.open_shard(shard - int(self._first_shard[source]))
            self._keep(shard, cuts, file)
        return cuts, file

    def _keep(self, shard: int, cuts: Cuts, file: Shard | None) -> None:
        self._open[shard] = cuts, file
        rows = sum(int(self._rows[shard]) for shard in self._open)
        while rows > self._most_rows and len(self._open) > 1:
            removed, _ = self._open.popitem(last=False)
            rows -= int(self._rows[removed])


def _units(
    sources: Sequence[PreparedSource], first_shard: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the shard of each unit, and the part of it that an epoch uses."""
    shards, parts = [], []
    for number, source in enumerate(sources):
        own = np.arange(first_shard[number], first_shard[number + 1])
        whole, rest = divmod(source.passes, 1)
        for part in [1.0] * int(whole) + [rest] * (rest > 0):
            shards.append(own)
            parts.append(np.full(len(own), part))
    return np.concatenate(shards), np.concatenate(parts)


def _part(lengths: NDArray[np.int64], shard: int, part: float, epoch: int) -> NDArray[np.int64]:
    """Return the lengths of an epoch's part of a shard's documents, 0 for the others.

    The documents lie in a random order on a circle of as many tokens as they have. The part is an
    arc, which begins where that of the epoch before ended. The first one begins anywhere, so that
    the shards' arcs do not all begin or end together.
    """
    rng = np.random.default_rng((_DRAW_SEED, shard))
    order, phase = rng.permutation(len(lengths)), rng.random()
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    starts = (ends - lengths[order]) / max(total, 1)
    is_used = np.zeros(len(lengths), dtype=np.bool_)
    is_used[order] = (starts - phase - epoch * part) % 1 < part
    return np.where(is_used, lengths, 0)
