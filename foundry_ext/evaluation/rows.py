"""Rows of a task's JSONL file, and few-shot prompts made of them."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.json_lines import read_lines

# Fixed, so that an item has the same examples in every run, on every rank and for every method.
FEW_SHOT_SEED = 1234


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file.

    Raises:
        UserError: there is no row, or a line is not a JSON object; names the line.
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
    """Return a digest of the rows' content, 16 hex digits; the file's path does not count."""
    text = json.dumps(rows, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def few_shot_prompt(examples: Sequence[str], index: int, num_fewshot: int) -> str:
    """Return `num_fewshot` solved examples other than `index`, drawn by a seed per item.

    Example: examples "q a", "r b", index 1, one shot gives "q a\\n\\n".

    Raises:
        UserError: there are not that many other examples.
    """
    if num_fewshot >= len(examples):
        raise UserError(
            f"num_fewshot: {num_fewshot} examples and the question need more than the file's"
            f" {len(examples)} rows"
        )
    others = [other for other in range(len(examples)) if other != index]
    drawn = random.Random(f"{FEW_SHOT_SEED}-{index}").sample(others, num_fewshot)
    return "".join(f"{examples[other]}\n\n" for other in drawn)
