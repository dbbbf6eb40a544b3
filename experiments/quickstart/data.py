"""Data of the quickstart: library and problems, for training, held out, and as choices."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.quickstart import library, problems

# Independent of a run's seed, so that all runs are measured on the same held-out items.
SEED = 0
NUM_TRAIN = 6000
NUM_EVAL = 160
NUM_CHOICES = 80


def prepare(folder: Path) -> None:
    """Write data/*.jsonl and tokenizer/ into `folder`, replacing what is there."""
    source = library.standard_library()
    parts: dict[str, Iterable[Mapping[str, Any]]] = {
        "library_train": source["train"],
        "library_eval": source["eval"],
        "library_choice": library.choices(source["eval"], NUM_CHOICES, SEED),
        "problems_train": problems.problems("train", NUM_TRAIN, SEED),
        "problems_eval": problems.problems("eval", NUM_EVAL, SEED),
        "problem_choice": problems.choices(NUM_CHOICES, SEED),
    }
    for name, rows in parts.items():
        path = folder / "data" / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} rows")
    library.train_tokenizer([row["text"] for row in source["train"]], folder / "tokenizer")
    print(f"{folder / 'tokenizer'}: {library.VOCABULARY} byte-level BPE tokens")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines; return how many were written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
