"""Making of prepared data: every piece of a source becomes a shard, in any order, on any machine.

A shard's folder appears under its key when all of it is written, so a kill loses the shards under
way at most, and a second start skips what is there. Two writers of one shard write equal files, of
which the first stays.

    OUT/shards/<key>/     shard.00000.mds, sizes.npy and, last, about.json
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from foundry_ext.data.full_disk import FULL, free_bytes
from foundry_ext.data.prepared.index import SHARD_FILE, ShardAbout, shard_folder
from foundry_ext.data.prepared.merging import ABOUT, SIZES, find_shard
from foundry_ext.data.prepared.pieces import Piece, Row
from foundry_ext.data.prepared.recipe import Recipe
from foundry_ext.data.prepared.shard import RowSizes, write_shard
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.data.sources import is_in_part
from foundry_ext.data.table import NO_TOKENS, Tokens
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.processes import is_running, machine_name

_BATCH_CHARACTERS = 2**22  # of rows that are tokenised together

ReadRows = Callable[[Sequence[Row], Sequence[str]], list[Tokens]]
"""(rows, their places) -> the tokens of each; raises a UserError that names a bad one."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """A source, its tokenizer and the storage: everything that making shards needs.

    Attributes:
        recipe: of the tokens.
        pieces: all pieces of the source.
        read: tokenises rows.
        out: where the shards go.
    """

    recipe: Recipe
    pieces: Sequence[Piece]
    read: ReadRows
    out: Storage

    def make(self, number: int) -> ShardAbout:
        """Return the shard of a piece, made if it is not there.

        Raises:
            UserError: a row cannot be read; names its file and place there.
        """
        piece = self.pieces[number]
        key = self.recipe.shard_key(piece.digest())
        found = find_shard(self.out, key)
        if found is not None:
            return found
        try:
            rows = self._tokens(piece)
        except UserError:
            # Where a piece begins in its file is not known; it is found out for the error.
            self._tokens(piece.located())
            raise
        with _new_folder(self.out, key) as folder:
            # A file has a sample, even if the piece has no row.
            samples = rows or [NO_TOKENS]
            mds = write_shard(folder, samples, ids=self.recipe.ids, with_loss=self.recipe.with_loss)
            (folder / "index.json").unlink()
            sizes = RowSizes.of(rows)
            np.save(folder / SIZES, np.stack([sizes.lengths, sizes.first_loss]))
            lengths = sizes.lengths.astype(np.int64)
            about = ShardAbout(
                key=key,
                piece=piece.name,
                rows=len(rows),
                tokens=int(lengths.sum()),
                longest=int(lengths.max(initial=0)),
                loss_tokens=sum(int(row.loss_mask[1:].sum()) for row in rows),
                num_untrained=sum(row.num_untrained for row in rows),
                mds=mds,
            )
            (folder / ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")
        return about

    def _tokens(self, piece: Piece) -> list[Tokens]:
        tokens: list[Tokens] = []
        for places, rows in _batches(piece):
            chosen = [i for i, row in enumerate(rows) if self._is_used(row)]
            tokens += self.read([rows[i] for i in chosen], [places[i] for i in chosen])
        return tokens

    def _is_used(self, row: Row) -> bool:
        holdout = self.recipe.holdout
        if holdout is None:
            return True
        by, fraction, part = (holdout[key] for key in ("by", "fraction", "part"))
        if by not in row:
            raise UserError(f"holdout: no column {by!r}; there are {', '.join(row)}")
        return is_in_part(row[by], fraction, part)


def _batches(piece: Piece) -> Iterator[tuple[list[str], list[Row]]]:
    places: list[str] = []
    rows: list[Row] = []
    size = 0
    for place, row in piece.rows():
        places.append(place)
        rows.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str)) + 100
        if size >= _BATCH_CHARACTERS:
            yield places, rows
            places, rows, size = [], [], 0
    if rows:
        yield places, rows


@contextlib.contextmanager
def _new_folder(out: Storage, key: str) -> Iterator[Path]:
    """Yield a folder to fill, which then is the shard's, unless another writer was faster."""
    if not out.is_folder:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary, "shard")
            for name in (SHARD_FILE, SIZES, ABOUT):  # the last one says that all are there
                out.put(Path(temporary, "shard", name), f"{shard_folder(key)}/{name}")
        return
    final = out.path(shard_folder(key))
    name = f"{key}.{machine_name()}.{os.getpid()}.{uuid.uuid4().hex}.part"
    partial = final.with_name(name)
    try:
        partial.mkdir(parents=True)
        yield partial
        if find_shard(out, key) is None:
            shutil.rmtree(final, ignore_errors=True)  # what is not whole
            try:
                partial.rename(final)
            except OSError:
                if find_shard(out, key) is None:  # no other writer was faster
                    raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"no space is left for shards in {out.place}; make some and start the same command"
            " again, which goes on, or give --out a folder on another disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(out: Storage) -> None:
    """Remove what killed processes of this machine have left of shards."""
    if not out.is_folder:
        return
    for part in Path(out.place, "shards").glob("*.part"):
        _, machine, process, *_ = part.name.split(".")
        if machine == machine_name() and process.isdecimal() and not is_running(int(process)):
            shutil.rmtree(part, ignore_errors=True)


def check_room(out: Storage, pieces: Sequence[Piece]) -> None:
    """Check that the shards of pieces can fit on the disk.

    Raises:
        OSError: less is free than they certainly need.
    """
    if not out.is_folder:
        return
    free = free_bytes(Path(out.place))
    # Text has 3 to 5 bytes a token, and a token has 2: half of that is taken for certain.
    need = sum(piece.size for piece in pieces) // 4
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{out.place}: {free / 1e6:,.1f} MB are free, and the shards need about"
            f" {2 * need / 1e6:,.1f}; make room, or give --out a folder on another disk",
        )
