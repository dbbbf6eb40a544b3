"""Sources of rows: the hub at a revision, local JSONL, Parquet or CSV.

Every source ends as a memory-mapped `datasets.Dataset` of raw rows; streams.py has MDS shards.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import huggingface_hub
from composer.utils import parse_uri
from datasets.data_files import EmptyDatasetError
from huggingface_hub.errors import HFValidationError
from llmfoundry.data.finetuning.dataloader import _download_remote_hf_dataset
from llmfoundry.data.finetuning.tasks import SUPPORTED_EXTENSIONS

from foundry_ext.data.files import KINDS
from foundry_ext.data.local_rows import cache_of_folder, load_files
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.remote_code import code_only_if_trusted


def fetch(hf_name: str, split: str | None) -> tuple[str, str]:
    """Return the local copy of an object store's folder, and its split; other names are returned.

    All ranks must call it together, because they wait for each other in it.

    Raises:
        UserError: no split.
    """
    if split is None:
        raise UserError(f"dataset {hf_name}: set split, e.g. split: train")
    if parse_uri(hf_name)[0] in ("", None):
        return hf_name, split
    return _download_remote_hf_dataset(hf_name, split), split.replace("-", "_")


def load_rows(
    hf_name: str,
    split: str,
    *,
    hf_kwargs: dict[str, Any] | None = None,
    safe_load: bool = False,
    holdout: dict[str, Any] | None = None,
) -> datasets.Dataset:
    """Return the rows of a hub dataset, or of a local file or folder.

    Args:
        hf_name: hub name ("meta-math/MetaMathQA"), local file or folder, or builder ("json", with
            `data_files` in `hf_kwargs`).
        split: as in `datasets.load_dataset`, slices included ("train[:1%]").
        hf_kwargs: of a hub dataset, passed to `load_dataset`; `revision` pins it. Of files, see
            `load_files`.
        safe_load: download only data files, no code.
        holdout: {by: column, fraction: f, part: train or eval}, see `hold_out`.

    Raises:
        UserError: unknown holdout, or rows that are not objects.
        FileNotFoundError: no such file, folder or dataset.
    """
    kwargs = dict(hf_kwargs or {})
    rows = load_files(hf_name, split, kwargs)
    if rows is None:
        with _naming_the_hub(hf_name):
            rows = _load_named(hf_name, split, safe_load=safe_load, **kwargs)
    if not isinstance(rows, datasets.Dataset):
        raise UserError(
            f"dataset {hf_name}: streaming is not possible: packing needs every document's length"
        )
    if holdout is None:
        return rows
    if set(holdout) != {"by", "fraction", "part"}:
        raise UserError(
            f"holdout: give by, fraction and part, not {', '.join(holdout) or 'nothing'}"
        )
    return hold_out(rows, **holdout)


def _load_named(hf_name: str, split: str, *, safe_load: bool, **kwargs: Any) -> Any:
    if safe_load and not Path(hf_name).is_dir():
        hf_name = huggingface_hub.snapshot_download(
            hf_name,
            repo_type="dataset",
            allow_patterns=[f"*{extension}" for extension in SUPPORTED_EXTENSIONS],
            revision=kwargs.pop("revision", None),
            token=kwargs.pop("token", None),
        )
    if hf_name == "pandas":
        raise UserError(
            "dataset pandas reads pickles, which could run code; write the rows as .parquet or"
            " .jsonl"
        )
    if Path(hf_name).is_dir():
        kwargs.setdefault("cache_dir", cache_of_folder(Path(hf_name)))
    try:
        return datasets.load_dataset(hf_name, split=split, **code_only_if_trusted(kwargs))
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"dataset {hf_name} is loaded by a script of its own, which could run any code; if you"
            " trust it, set hf_kwargs: {trust_remote_code: true}"
        ) from error


@contextlib.contextmanager
def _naming_the_hub(hf_name: str) -> Iterator[None]:
    """Name what was not found, in a folder or on the hub, and what to give."""
    try:
        yield
    except (OSError, EmptyDatasetError, HFValidationError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # this machine failed
            raise
        cause = shorten(str(error), 200, placeholder=" ...")
        if Path(hf_name).exists():
            problem = f"dataset {hf_name} holds no data that can be read"
        else:
            problem = f"dataset {hf_name} is neither here (in {Path.cwd()}) nor on the hub"
        raise FileNotFoundError(
            f"{problem}; give hf_name a local {', '.join(KINDS)} file, a folder of them, or a"
            f" name on the hub ({type(error).__name__}: {cause})"
        ) from error


def find_revision(rows: datasets.Dataset, hf_kwargs: dict[str, Any] | None = None) -> str | None:
    """Return the hub commit that the rows came from, pinned or not; None for files."""
    for source in rows.info.download_checksums or {}:  # hf://datasets/openai/gsm8k@<commit>/...
        match = re.search(r"(?:@|/snapshots/)([0-9a-f]{40})/", str(source))
        if match:
            return match.group(1)
    return (hf_kwargs or {}).get("revision")


def hold_out(rows: datasets.Dataset, *, by: str, fraction: float, part: str) -> datasets.Dataset:
    """Return one side of a split that keeps all rows with the same value of column `by` together.

    MetaMathQA's rows are rephrasings of shared questions: a split by rows would show the model in
    training what it is asked in evaluation. A hash of the value decides the side, so it is the same
    on every machine and does not change when rows are added.

    Args:
        rows: the rows to split.
        by: a column of `rows`.
        fraction: share of distinct values to hold out, between 0 and 1.
        part: "train" for the rest, "eval" for what is held out.

    Raises:
        UserError: unknown column or part, or an impossible fraction.
    """
    if by not in rows.column_names:
        raise UserError(f"holdout: no column {by!r}; there are {', '.join(rows.column_names)}")
    check_part(fraction, part)

    def is_wanted(values: list[Any]) -> list[bool]:
        return [is_in_part(value, fraction, part) for value in values]

    return rows.filter(
        is_wanted,
        input_columns=[by],
        batched=True,
        desc=f"holdout: {part}",
        # Kept in a file, the rows' numbers would be read back without a check for damage.
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def check_part(fraction: Any, part: Any) -> None:
    """Check the values of `holdout`.

    Raises:
        UserError: they name no part.
    """
    if part not in ("train", "eval") or not 0 < fraction < 1:
        raise UserError(
            f"holdout: part {part!r}, fraction {fraction!r}; part is train or eval, fraction in"
            " (0, 1)"
        )


def is_in_part(value: Any, fraction: float, part: str) -> bool:
    """Return whether a row with this value of the column `by` is in a part, see `hold_out`."""
    return (_share(str(value)) < fraction) == (part == "eval")


def _share(value: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64
