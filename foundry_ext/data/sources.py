"""Where rows come from: the hub at a revision, local JSONL, Parquet or CSV, MDS streams.

Every source ends as a memory-mapped `datasets.Dataset` of raw rows, or, for MDS, of rows already
tokenised into llm-foundry's turns.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from composer.utils import dist, parse_uri
from llmfoundry.data.finetuning.dataloader import _download_remote_hf_dataset
from llmfoundry.data.finetuning.tasks import SUPPORTED_EXTENSIONS, StreamingFinetuningDataset
from llmfoundry.data.text_data import build_streams
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def fetch(hf_name: str, split: str | None) -> tuple[str, str]:
    """The local copy of an object store's folder, and its split; other names stay as they are.

    All ranks must call it at once: they wait for one another in it.

    Raises:
        ValueError: no split.
    """
    if split is None:
        raise ValueError(f"dataset {hf_name}: set split, e.g. split: train")
    if parse_uri(hf_name)[0] in ("", None):
        return hf_name, split
    return _download_remote_hf_dataset(hf_name, split), split.replace("-", "_")


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Local rank 0 fills the cache on disk, then the others read it.

    They wait for a file, not in a collective, which would time out over a long tokenisation. So
    there must be no collective inside, or rank 0 would wait for the others for ever.
    """
    signal = dist.get_node_signal_file_name()
    first = dist.get_local_rank() == 0
    if not first:
        with dist.local_rank_zero_download_and_wait(signal):
            pass
    try:
        yield
    finally:
        if first:
            with open(signal, "w"):
                pass
        dist.barrier()
        if first:
            os.remove(signal)


def load_rows(
    hf_name: str,
    split: str,
    *,
    hf_kwargs: dict[str, Any] | None = None,
    safe_load: bool = False,
    holdout: dict[str, Any] | None = None,
) -> datasets.Dataset:
    """Rows of a hub dataset, or of a local file or folder.

    Args:
        hf_name: hub name ("meta-math/MetaMathQA"), local file or folder, or builder ("json", with
            `data_files` in `hf_kwargs`).
        split: as in `datasets.load_dataset`, slices included ("train[:1%]").
        hf_kwargs: passed to `load_dataset`; `revision` pins a hub dataset.
        safe_load: download only data files, no code.
        holdout: {by: column, fraction: f, part: train or eval}, see `hold_out`.

    Raises:
        ValueError: unknown holdout, rows that are no objects.
        FileNotFoundError: no such file, folder or dataset.
    """
    kwargs = dict(hf_kwargs or {})
    path = Path(hf_name)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset file {hf_name} does not exist (in {Path.cwd()})")
        if _BUILDERS[path.suffix] == "json":
            _check_lines(path)
        hf_name = _BUILDERS[path.suffix]
        # A lone file is one split, whatever it is called.
        kwargs["data_files"] = {split.split("[")[0]: str(path)}
    elif safe_load and not path.is_dir():
        hf_name = huggingface_hub.snapshot_download(
            hf_name,
            repo_type="dataset",
            allow_patterns=[f"*{extension}" for extension in SUPPORTED_EXTENSIONS],
            revision=kwargs.pop("revision", None),
            token=kwargs.pop("token", None),
        )
    rows = datasets.load_dataset(hf_name, split=split, **kwargs)
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(f"dataset {hf_name}: streaming is not possible, a plan needs all lengths")
    if holdout is None:
        return rows
    if set(holdout) != {"by", "fraction", "part"}:
        raise ValueError(f"holdout: give by, fraction and part, not {', '.join(holdout) or 'none'}")
    return hold_out(rows, **holdout)


def _check_lines(path: Path) -> None:
    """Rows must be objects. pyarrow 19 takes most others for rows without values, and ends the
    process without a word (SIGSEGV) where one of its blocks begins with `null`."""
    only_null = path.suffix != ".jsonl"  # the objects of a .json may go over many lines
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            start = line.lstrip()[:4]
            if start[:1] in (b"", b"{") or (only_null and start != b"null"):
                if start[:1] == b"[":  # one array of them all
                    return
                continue
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} begins no JSON object; give one row a line,"
                ' such as {"prompt": "...", "response": "..."}'
            )


def find_revision(rows: datasets.Dataset, hf_kwargs: dict[str, Any] | None = None) -> str | None:
    """The hub's commit that rows came from, whether or not one was asked for; None for files."""
    for source in rows.info.download_checksums or {}:  # hf://datasets/openai/gsm8k@<commit>/...
        found = re.search(r"(?:@|/snapshots/)([0-9a-f]{40})/", str(source))
        if found:
            return found.group(1)
    return (hf_kwargs or {}).get("revision")


def hold_out(rows: datasets.Dataset, *, by: str, fraction: float, part: str) -> datasets.Dataset:
    """One side of a split in which all rows with the same value of column `by` are on one side.

    MetaMathQA's rows are rephrasings of shared questions: a split by rows would show the model in
    training what it is asked in evaluation. The side is decided by a hash of the value, so it is
    the same on every machine and stays when rows are added.

    Args:
        rows: must have the column `by`.
        fraction: share of distinct values that is held out, between 0 and 1.
        part: "train" for what is left, "eval" for what is held out.

    Raises:
        ValueError: unknown column or part, impossible fraction.
    """
    if by not in rows.column_names:
        raise ValueError(f"holdout: no column {by!r}; there are {', '.join(rows.column_names)}")
    if part not in ("train", "eval") or not 0 < fraction < 1:
        raise ValueError(
            f"holdout: part {part!r}, fraction {fraction!r}; part is train or eval, fraction in"
            " (0, 1)"
        )

    def is_wanted(values: list[Any]) -> list[bool]:
        return [(_share(str(value)) < fraction) == (part == "eval") for value in values]

    return rows.filter(is_wanted, input_columns=[by], batched=True, desc=f"holdout: {part}")


def _share(value: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64


_STREAM_KEYS = frozenset(
    (
        *("remote", "local", "split", "download_retry", "download_timeout", "validate_hash"),
        *("keep_zip", "cache_limit", "token_encoding_type", "allow_unsafe_types"),
    )
)
_WEIGHTS = ("proportion", "repeat", "choose")


def load_streams(
    dataset: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> StreamingFinetuningDataset:
    """MDS streams as llm-foundry reads them: row `i`, in stored order, is a dict with `turns`.

    All of it will be read, so it must fit on disk. All ranks must call this at once: they wait for
    one another in it.

    Raises:
        ValueError: streams with weights, which a plan over whole documents does not draw.
    """
    streams = dataset.get("streams")
    for name, stream in (streams or {}).items():
        weighted = [key for key in _WEIGHTS if stream.get(key) is not None]
        if weighted:
            raise ValueError(
                f"streams.{name}.{weighted[0]}: weighted streams are not supported by"
                " packed_finetuning; every document is used once an epoch"
            )
    arguments = {key: dataset[key] for key in _STREAM_KEYS & dataset.keys()}
    return StreamingFinetuningDataset(
        tokenizer=tokenizer,
        streams=None if streams is None else build_streams(streams),
        max_seq_len=max_seq_len,
        batch_size=1,
        **arguments,
    )
