"""Merging of prepared data: parts that are finished, and the index of all of them.

OUT/parts/3-of-8.json   the keys of a part's pieces, written when all of them are there
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.data.prepared.index import SHARD_FILE, ShardAbout, shard_folder, write_index
from foundry_ext.data.prepared.pieces import Piece, describe_pieces
from foundry_ext.data.prepared.recipe import Recipe
from foundry_ext.data.prepared.shard import RowSizes
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.utils.errors import UserError

_PART = re.compile(r"parts/[0-9]+-of-[0-9]+\.json")
SIZES, ABOUT = "sizes.npy", "about.json"


def find_shard(out: Storage, key: str) -> ShardAbout | None:
    """Return the description of a shard that is whole, or None."""
    name = f"{shard_folder(key)}/{ABOUT}"
    if not out.exists(name):
        return None
    try:
        about = ShardAbout(**_read_json(out, name))
    except (ValueError, TypeError):  # cut off, or of another version
        return None
    if out.is_folder:
        path = out.path(f"{shard_folder(key)}/{SHARD_FILE}")
        if not path.exists() or path.stat().st_size != about.bytes:
            return None
    return about


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, counted from 1."""

    number: int
    of: int

    def of_pieces(self, num: int) -> range:
        """Return the pieces of this part."""
        return range(self.number - 1, num, self.of)

    @property
    def file(self) -> str:
        return f"parts/{self.number}-of-{self.of}.json"


def write_part(
    out: Storage,
    part: Part,
    recipe: Recipe,
    pieces: Sequence[Piece],
    shards: Sequence[ShardAbout],
) -> None:
    """Note that all shards of a part are there.

    Args:
        out: where they are.
        part: the part.
        recipe: of the tokens.
        pieces: all pieces of the source.
        shards: those of this part, in the order of its pieces.
    """
    about = {
        "recipe": asdict(recipe),
        "pieces": describe_pieces(pieces),
        "num_pieces": len(pieces),
        "keys": [shard.key for shard in shards],
    }
    out.put_text(json.dumps(about), part.file)


def merge_parts(out: Storage, of: int | None = None) -> Sequence[ShardAbout]:
    """Write the index of all parts' shards, and return these.

    Args:
        out: where the parts are.
        of: how many parts there are; None to find out.

    Raises:
        UserError: a part is not finished, or parts were made from different sources or recipes.
    """
    names = {name for name in out.names("parts/") if _PART.fullmatch(name)}
    numbers = sorted({int(Path(name).stem.split("-of-")[1]) for name in names})
    if of is None and len(numbers) == 1:
        of = numbers[0]
    if of is None:
        found = f"parts of {' and of '.join(map(str, numbers))}" if numbers else "no part"
        raise UserError(
            f"{out.place}: there is {found} to merge; finish all of one number of parts, such as"
            " --part 1/4 to --part 4/4, and remove the others in its folder parts"
        )
    parts = [Part(number, of) for number in range(1, of + 1)]
    missing = [part for part in parts if part.file not in names]
    if missing:
        listed = ", ".join(f"{part.number}/{part.of}" for part in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{out.place}: parts {listed}{more} are not finished; run `foundry-ext prepare` with"
            " --part for them, then --merge"
        )
    abouts = [_read_part(out, part) for part in parts]
    recipe = Recipe(**abouts[0]["recipe"])
    for part, about in zip(parts, abouts, strict=True):
        if about["pieces"] != abouts[0]["pieces"]:
            what = "source"
        elif Recipe(**about["recipe"]).key != recipe.key:
            what = "tokenizer, or with other settings,"
        else:
            continue
        raise UserError(
            f"{out.place}: part {part.number}/{of} was made from another {what} than part 1/{of};"
            " run it again"
        )
    keys: list[str] = [""] * abouts[0]["num_pieces"]
    for part, about in zip(parts, abouts, strict=True):
        for piece, key in zip(part.of_pieces(len(keys)), about["keys"], strict=True):
            keys[piece] = key
    return _write_index(out, recipe, keys)


def _read_part(out: Storage, part: Part) -> dict[str, Any]:
    try:
        about = _read_json(out, part.file)
        Recipe(**about["recipe"])
        if len(part.of_pieces(about["num_pieces"])) != len(about["keys"]):
            raise ValueError("keys are missing")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{out.place}: {part.file} is damaged, or of another version; run `foundry-ext prepare`"
            f" with --part {part.number}/{part.of} again"
        ) from error
    return about


def _write_index(out: Storage, recipe: Recipe, keys: Sequence[str]) -> Sequence[ShardAbout]:
    shards, sizes = [], []
    for key in keys:
        about = find_shard(out, key)
        if about is None:
            raise UserError(
                f"{out.place}: shard {key} is not there any more; run `foundry-ext prepare` for its"
                " part again"
            )
        shards.append(about)
        sizes.append(_read_sizes(out, key))
    with tempfile.TemporaryDirectory() as folder:
        for name in write_index(Path(folder), recipe, shards, sizes):
            out.put(Path(folder, name), name)
    return shards


def _read_sizes(out: Storage, key: str) -> RowSizes:
    with out.opened(f"{shard_folder(key)}/{SIZES}") as path:
        lengths, first_loss = np.load(path)
    return RowSizes(lengths, first_loss)


def _read_json(out: Storage, name: str) -> Any:
    with out.opened(name) as path:
        return json.loads(path.read_bytes())
