"""Rows of a task's JSONL file, and prompts of solved examples put before a question."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.json_lines import read_lines

# The same examples stand before an item in every run, on every rank and for every method.
FEW_SHOT_SEED = 1234


def read_rows(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        UserError: no rows, or a line that is no JSON object; names the line.
    """
    rows = []
    for number, row in read_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {row!r} is not an object")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Of the rows' content, wherever the file lies."""
    text = json.dumps(rows, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def few_shot_prompt(examples: Sequence[str], index: int, num_fewshot: int) -> str:
    """`num_fewshot` solved examples other than `index`, drawn by a seed of the item's own.

    Example: examples "q a", "r b", index 1, one shot gives "q a\\n\\n".

    Raises:
        UserError: fewer examples than that.
    """
    if num_fewshot >= len(examples):
        raise UserError(
            f"num_fewshot: {num_fewshot} examples beside the question itself need more than"
            f" {len(examples)} rows"
        )
    others = [place for place in range(len(examples)) if place != index]
    chosen = random.Random(f"{FEW_SHOT_SEED}-{index}").sample(others, num_fewshot)
    return "".join(f"{examples[place]}\n\n" for place in chosen)
