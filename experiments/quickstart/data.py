"""Data of the quickstart: library and problems, for training, held out, and as choices."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.quickstart import library, problems

# Independent of a run's seed, so that all runs are measured on the same held-out items.
SEED = 0
NUM_ONE_STEP = 6000
# So few that high learning rates learn them by heart: the rate that learns most on held-out
# problems then lies inside the grid, and is not one that destroys the base model. They fill six
# packs to 95 %, so every seed has six packs per epoch, and all runs have equally many steps.
NUM_TRAIN = 144
NUM_EVAL = 160
NUM_CHOICES = 80


def prepare(folder: Path) -> None:
    """Write data/*.jsonl and tokenizer/ into `folder`, replacing what is there."""
    source = library.standard_library()
    one_step = list(map(_as_text, problems.problems("one_step", "train", NUM_ONE_STEP, SEED)))
    parts: dict[str, Iterable[Mapping[str, Any]]] = {
        "library_train": source["train"],
        "library_eval": source["eval"],
        "library_choice": library.choices(source["eval"], NUM_CHOICES, SEED),
        "one_step_train": one_step,
        "one_step_eval": map(_as_rows, problems.problems("one_step", "eval", NUM_EVAL, SEED)),
        "problems_train": map(_as_rows, problems.problems("two_steps", "train", NUM_TRAIN, SEED)),
        "problems_eval": map(_as_rows, problems.problems("two_steps", "eval", NUM_EVAL, SEED)),
        "problem_choice": problems.choices(NUM_CHOICES, SEED),
    }
    for name, rows in parts.items():
        path = folder / "data" / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} rows")
    texts = [row["text"] for row in (*source["train"], *one_step)]
    library.train_tokenizer(texts, folder / "tokenizer")
    print(f"{folder / 'tokenizer'}: {library.VOCABULARY} byte-level BPE tokens")


def _as_rows(problem: problems.Problem) -> dict[str, str]:
    return {"prompt": problem.prompt, "response": problem.response}


def _as_text(problem: problems.Problem) -> dict[str, str]:
    return {"text": problem.prompt + problem.response}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines; return how many were written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
