"""Index of prepared data: what it was made from, its shards, and the size of every row.

| file | content |
|---|---|
| `prepared.json` | the recipe, the totals, and per shard its key, rows, tokens and place |
| `index.json` | the shards as mosaicml-streaming lists them |
| `lengths.npy` | [rows] uint32 tokens of each row, in the order of the source |
| `first_loss.npy` | [rows] uint32 first predicted token of each row; absent in plain text |
| `shards/<key>/` | a shard: `shard.00000.mds`, and `about.json`, which is written last |
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from foundry_ext.data.content import content_digest
from foundry_ext.data.prepared.recipe import Recipe
from foundry_ext.data.prepared.shard import NEVER, RowSizes
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError

PREPARED, INDEX, LENGTHS, FIRST_LOSS = (
    "prepared.json",
    "index.json",
    "lengths.npy",
    "first_loss.npy",
)
SHARD_FILE = "shard.00000.mds"
_VERSION = 1
_AGAIN = "run `foundry-ext prepare` again, with --merge if it was made in parts"


def shard_folder(key: str) -> str:
    """Return the folder of a shard in its storage."""
    return f"shards/{key}"


@dataclass(frozen=True, kw_only=True)
class ShardAbout:
    """A shard's description, without the sizes of its rows."""

    key: str
    """Hash of the piece's content and of the recipe."""
    piece: str
    """The piece that it was made from, such as `data.jsonl, bytes 0 to 1000`."""
    rows: int
    tokens: int
    longest: int
    """Tokens of its longest row."""
    loss_tokens: int
    """Tokens that are predicted, without the first of each row."""
    num_untrained: int
    """Responses of chats that `target_responses` leaves out."""
    mds: dict[str, Any]
    """Its entry in index.json."""

    @property
    def bytes(self) -> int:
        return self.mds["raw_data"]["bytes"]


@dataclass(frozen=True, eq=False)
class PreparedIndex:
    """The shards of prepared data, in the order of the source.

    Attributes:
        lengths: [rows] uint32 tokens of each row, mapped from a file.
        first_loss: [rows] uint32, see `RowSizes`; None in plain text.
        first_row: [num_shards + 1] first row of each shard, and the number of rows.
    """

    recipe: Recipe
    shards: Sequence[ShardAbout]
    lengths: NDArray[np.uint32]
    first_loss: NDArray[np.uint32] | None
    first_row: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Hash of the shards and their order."""
        keys = " ".join([self.recipe.key, *(shard.key for shard in self.shards)])
        return xxhash.xxh3_128(keys.encode()).hexdigest()[:16]

    def sizes(self, shard: int) -> RowSizes:
        """Return the sizes of a shard's rows."""
        rows = slice(self.first_row[shard], self.first_row[shard + 1])
        lengths = np.asarray(self.lengths[rows])
        if self.first_loss is None:
            return RowSizes(lengths, np.where(lengths > 1, 1, NEVER).astype(np.uint32))
        return RowSizes(lengths, np.asarray(self.first_loss[rows]))


def write_index(
    folder: Path, recipe: Recipe, shards: Sequence[ShardAbout], sizes: Sequence[RowSizes]
) -> list[str]:
    """Write the index of shards into a folder, and return the files' names, the last one last."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for shard in shards:
        data = shard.mds["raw_data"]
        entries.append(
            {
                **shard.mds,
                "raw_data": {**data, "basename": f"{shard_folder(shard.key)}/{SHARD_FILE}"},
            }
        )
    (folder / INDEX).write_text(
        json.dumps({"version": 2, "shards": entries}, sort_keys=True), encoding="utf-8"
    )
    _write_array(folder / LENGTHS, [one.lengths for one in sizes])
    names = [INDEX, LENGTHS]
    if recipe.with_loss:
        _write_array(folder / FIRST_LOSS, [one.first_loss for one in sizes])
        names.append(FIRST_LOSS)
    digests = {name: content_digest([folder / name]) for name in names}
    about = {
        "version": _VERSION,
        "recipe": asdict(recipe),
        "rows": sum(shard.rows for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "files": digests,
        "shards": [asdict(shard) for shard in shards],
    }
    (folder / PREPARED).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return [*names, PREPARED]


def _write_array(path: Path, parts: Sequence[NDArray[np.uint32]]) -> None:
    total = sum(len(part) for part in parts)
    array = np.lib.format.open_memmap(path, "w+", np.uint32, (total,))
    start = 0
    for part in parts:
        array[start : start + len(part)] = part
        start += len(part)
    array.flush()


def read_index(storage: Storage, local: Path) -> PreparedIndex:
    """Return the index of prepared data.

    Args:
        storage: where the data is.
        local: folder for copies of the index's files, if the storage is no folder of its own.

    Raises:
        UserError: there is no prepared data, it is of another version, or a file is damaged.
    """
    folder = Path(storage.place) if storage.is_folder and Path(storage.place) == local else local
    about = _read_about(storage, folder)
    try:
        files = dict(about["files"])
        recipe = Recipe(**about["recipe"])
        shards = [ShardAbout(**shard) for shard in about["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / PREPARED} is damaged; {_AGAIN}") from error
    for name, digest in files.items():
        path = folder / name
        if folder != Path(storage.place) and not _is_same(path, digest):
            storage.get(name, path)
        # The row sizes decide every plan, so a damaged one would go unnoticed.
        if not _is_same(path, digest):
            raise UserError(f"{path}: it is not the file that {PREPARED} names; {_AGAIN}")
    return PreparedIndex(
        recipe,
        shards,
        np.load(folder / LENGTHS, mmap_mode="r"),
        np.load(folder / FIRST_LOSS, mmap_mode="r") if recipe.with_loss else None,
        np.cumsum([0, *(shard.rows for shard in shards)], dtype=np.int64),
    )


def _is_same(path: Path, digest: str) -> bool:
    return path.is_file() and content_digest([path]) == digest


def _read_about(storage: Storage, folder: Path) -> dict[str, Any]:
    path = folder / PREPARED
    try:
        if folder != Path(storage.place):
            storage.get(PREPARED, path)
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"prepared: {storage.place} holds no prepared data, no {PREPARED}; make it with"
            f" `foundry-ext prepare YAML --out {storage.place}`, and with --merge after --part"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; {_AGAIN}") from error
    if version != _VERSION:
        raise UserError(
            f"{path} is of version {version}, this foundry_ext reads {_VERSION}; prepare the data"
            " again, or use the version that wrote it"
        )
    return about
