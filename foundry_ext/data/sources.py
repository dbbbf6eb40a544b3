"""Where rows come from: the hub at a revision, local JSONL, Parquet or CSV, MDS streams.

Every source ends as a memory-mapped `datasets.Dataset` of raw rows, or, for MDS, of rows already
tokenised into llm-foundry's turns.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from composer.utils import parse_uri
from llmfoundry.data.finetuning.dataloader import _download_remote_hf_dataset
from llmfoundry.data.finetuning.tasks import SUPPORTED_EXTENSIONS, StreamingFinetuningDataset
from llmfoundry.data.text_data import build_streams
from transformers import PreTrainedTokenizerBase

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    hf_name: str,
    split: str | None,
    *,
    hf_kwargs: dict[str, Any] | None = None,
    safe_load: bool = False,
    holdout: dict[str, Any] | None = None,
) -> datasets.Dataset:
    """Rows of a hub dataset, a local file or folder, or a remote folder of `<split>.jsonl`.

    Args:
        hf_name: hub name ("meta-math/MetaMathQA"), local file or folder, builder ("json", with
            `data_files` in `hf_kwargs`), or URI of a folder in an object store.
        split: as in `datasets.load_dataset`, slices included ("train[:1%]").
        hf_kwargs: passed to `load_dataset`; `revision` pins a hub dataset.
        safe_load: download only data files, no code.
        holdout: {by: column, fraction: f, part: train or eval}, see `hold_out`.

    Raises:
        ValueError: no split; unknown holdout. FileNotFoundError: no such file, folder or dataset.
    """
    if split is None:
        raise ValueError(f"dataset {hf_name}: set split, e.g. split: train")
    kwargs = dict(hf_kwargs or {})
    if parse_uri(hf_name)[0] not in ("", None):
        hf_name, split = _download_remote_hf_dataset(hf_name, split), split.replace("-", "_")
    path = Path(hf_name)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset file {hf_name} does not exist (in {Path.cwd()})")
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
    return rows if holdout is None else hold_out(rows, **holdout)


def hold_out(rows: datasets.Dataset, *, by: str, fraction: float, part: str) -> datasets.Dataset:
    """One side of a split in which all rows with the same value of column `by` are on one side.

    MetaMathQA's rows are rephrasings of shared questions: a split by rows would show the model in
    training what it is asked in evaluation. The side is decided by a hash of the value, so it is the
    same on every machine and stays when rows are added.

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
            f"holdout: part {part!r}, fraction {fraction!r}; part is train or eval, fraction in (0, 1)"
        )

    def is_wanted(values: list[Any]) -> list[bool]:
        return [(_share(str(value)) < fraction) == (part == "eval") for value in values]

    return rows.filter(is_wanted, input_columns=[by], batched=True, desc=f"holdout: {part}")


def _share(value: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64


_STREAM_KEYS = frozenset(
    ("streams", "remote", "local", "split", "download_retry", "download_timeout")
    + ("validate_hash", "keep_zip", "cache_limit", "token_encoding_type", "allow_unsafe_types")
)
_WEIGHTS = ("proportion", "repeat", "choose")


def load_streams(
    dataset: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> Iterator[dict[str, Any]]:
    """Rows of MDS streams as llm-foundry reads them: each a dict with `turns`, in stored order.

    The whole stream is read, so it must fit on disk.

    Raises:
        ValueError: streams with weights, which a plan over whole documents does not draw.
    """
    streams = dataset.get("streams")
    for name, stream in (streams or {}).items():
        weighted = [key for key in _WEIGHTS if stream.get(key) is not None]
        if weighted:
            raise ValueError(
                f"streams.{name}.{weighted[0]}: weighted streams are not supported by packed_finetuning;"
                " every document is used once an epoch"
            )
    arguments = {key: dataset[key] for key in _STREAM_KEYS & dataset.keys() if key != "streams"}
    rows = StreamingFinetuningDataset(
        tokenizer=tokenizer,
        streams=None if streams is None else build_streams(streams),
        max_seq_len=max_seq_len,
        batch_size=1,
        **arguments,
    )
    return (rows[index] for index in range(rows.num_samples))
