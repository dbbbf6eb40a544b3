"""The readers, each with valid files to start from."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.runs import load_runs
from foundry_ext.config.loading import load_config
from foundry_ext.evaluation.rows import read_rows
from foundry_ext.sweeps.file import command_line, expand, read_sweep
from tests.comparison.records import write_run

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Target:
    label: str
    name: str
    """Name of the file."""
    valid: list[bytes]
    read: Callable[[Path], Any]
    is_json: bool = False
    prepared: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


ROWS = [
    {"prompt": "one", "response": "two"},
    {"prompt": "three 3", "response": "é ∑ \u2028"},
    {"prompt": "", "response": "\0"},
]


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n"


# --- rows of training data, and of tasks ---------------------------------------------------------

_tokenizer: Any = None


@contextlib.contextmanager
def _with_tokenizer() -> Iterator[None]:
    """Prepare a tokenizer, and a separate cache for what `datasets` makes of every file."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    global _tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<e>", *sorted(alphabet)])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    _tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def read_training_rows(path: Path) -> None:
    from llmfoundry import registry

    section = {"hf_name": str(path), "split": "train", "max_seq_len": 16, "pack_tokens": 32}
    spec = registry.dataloaders.get("packed_finetuning")(_tokenizer, 1, section)
    for _ in spec.dataloader:
        pass
    spec.dataloader._iterator = None


# --- YAMLs and sweeps ----------------------------------------------------------------------------


def read_sweep_runs(path: Path) -> None:
    sweep = read_sweep(path)
    for run in expand(sweep, num_runs=20):
        command_line(sweep, run)


SWEEPS = sorted(ROOT.glob("experiments/*/*.yaml"))
EVERY_PARAMETER = b"""
method: random
program: train.py
run_cap: 3
parameters:
  a: {min: 1, max: 9}
  b: {min: 1.0e-5, max: 1.0e-2, distribution: log_uniform_values}
  c: {distribution: q_uniform, min: 0, max: 1, q: 0.25}
  d: {distribution: normal, mu: 0, sigma: 2}
  e: {distribution: log_normal}
  f: {values: [1, b, [2]], probabilities: [0.5, 0.25, 0.25]}
  g: {parameters: {h: {value: 1}, i: {distribution: beta, a: 1, b: 2}}}
"""


# --- records -------------------------------------------------------------------------------------


def _run_files() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), "lora", 1e-2, 17, num_items=2)
        return (run / "record.json").read_bytes(), (run / "items.jsonl").read_bytes()


RECORD, ITEMS = _run_files()
_OTHER = "other"


def _beside_another(path: Path) -> Path:
    """Return the folder of a run with this file, in a folder that contains another run too."""
    folder = path.parent / "runs"
    if not folder.exists():
        write_run(folder / _OTHER, "full", 1e-3, 17, num_items=2)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    return run


def _compare(run: Path) -> None:
    loaded = load_runs([str(run.parent)])
    with contextlib.suppress(ValueError):  # of runs that cannot be compared, which names the runs
        compare_runs(loaded)


def read_run_record(path: Path) -> None:
    run = _beside_another(path)
    (run / "record.json").write_bytes(path.read_bytes())
    (run / "items.jsonl").write_bytes(ITEMS)
    _compare(run)


def read_run_items(path: Path) -> None:
    run = _beside_another(path)
    (run / "record.json").write_bytes(RECORD)
    (run / "items.jsonl").write_bytes(path.read_bytes())
    _compare(run)


TARGETS = {
    "rows": Target(
        label="training rows",
        name="rows.jsonl",
        valid=[_lines(ROWS), _lines([{"messages": [{"role": "user", "content": "a"}]}])],
        read=read_training_rows,
        is_json=True,
        prepared=_with_tokenizer,
    ),
    "tasks": Target(
        label="rows of tasks",
        name="rows.jsonl",
        valid=[_lines(ROWS)],
        read=lambda path: read_rows(str(path)),
        is_json=True,
    ),
    "yaml": Target(
        label="YAMLs",
        name="run.yaml",
        valid=[path.read_bytes() for path in sorted(ROOT.glob("yamls/*/*.yaml"))[:3]]
        + [(ROOT / "yamls/quickstart/lora.yaml").read_bytes()],
        read=lambda path: load_config(path, []),
    ),
    "sweep": Target(
        label="sweep files",
        name="sweep.yaml",
        valid=[EVERY_PARAMETER, *(path.read_bytes() for path in SWEEPS)],
        read=read_sweep_runs,
    ),
    "records": Target(
        label="records",
        name="record.json",
        valid=[json.dumps(json.loads(RECORD)).encode(), RECORD],
        read=read_run_record,
        is_json=True,
    ),
    "items": Target(
        label="items of runs",
        name="items.jsonl",
        valid=[ITEMS],
        read=read_run_items,
        is_json=True,
    ),
}
