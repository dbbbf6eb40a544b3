"""`foundry-ext prepare` of a run that a YAML file and overrides describe."""

from collections.abc import Sequence
from pathlib import Path

from streaming.base.util import bytes_to_int

from foundry_ext.config.loading import load_config
from foundry_ext.data.prepared.merging import Part, merge_parts
from foundry_ext.data.prepared.preparing import Prepared, prepare, summarise
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.preflight.inspect.packs import loader_section, open_tokenizer
from foundry_ext.preflight.runs import checked
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.processes import num_cores


def prepare_run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    out: str,
    loader: str = "train",
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    source: int = 0,
    shard_size: int | str = "64mb",
) -> Prepared:
    """Tokenise the rows of a run's loader into shards.

    Args:
        path: the YAML file.
        overrides: `key=value` texts.
        out: folder or URI; what is there already is not made again.
        loader: "train" or "eval"; of several eval loaders the first.
        workers: processes; the cores that are ours by default.
        part: (number, of how many), counted from 1; None for all, with the index.
        source: which one of `dataset.datasets`, from 0.
        shard_size: bytes of a shard, about, or a text such as 64mb.

    Raises:
        UserError: the configuration is wrong, or a row cannot be read.
    """
    config = checked(load_config(path, overrides))
    section, _ = loader_section(config, loader)
    tokenizer = open_tokenizer(config)
    return prepare(
        section["dataset"],
        tokenizer,
        name=section["name"],
        tokenizer_name=str(config["tokenizer"]["name"]),
        out=out,
        workers=workers or num_cores(),
        part=None if part is None else Part(*part),
        source=source,
        shard_bytes=_size(shard_size),
    )


def _size(value: int | str) -> int:
    try:
        size = bytes_to_int(value)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--shard-size: {value!r} is no size; give bytes, or such as 64mb"
        ) from error
    if not 0 < size < 2**31:
        raise UserError(f"--shard-size: {value!r} must be between 1 byte and 2 GB")
    return size


def merge(out: str) -> Prepared:
    """Write the index of all parts.

    Raises:
        UserError: a part is not finished, or parts do not go together.
    """
    return summarise(merge_parts(Storage(out)), has_index=True)
