"""Preprocessing functions of the shipped data sets: rows -> prompt and response.

A YAML names one as `preprocessing_fn: foundry_ext.data.prompts:metamathqa`. Questions are written
as lm-evaluation-harness writes GSM8K's, "Question: ...\\nAnswer:", so that training and evaluation
share one form.
"""

from collections.abc import Mapping
from typing import Any

from foundry_ext.utils.errors import UserError


def metamathqa(row: Mapping[str, Any]) -> dict[str, str]:
    """Format a row of meta-math/MetaMathQA: columns `query` and `response`."""
    return _question_answer(_text(row, "query"), _text(row, "response"))


def gsm8k(row: Mapping[str, Any]) -> dict[str, str]:
    """Format a row of openai/gsm8k: columns `question` and `answer`."""
    return _question_answer(_text(row, "question"), _text(row, "answer"))


def magicoder(row: Mapping[str, Any]) -> dict[str, str]:
    """Format a row of ise-uiuc/Magicoder-Evol-Instruct-110K: `instruction` and `response`.

    Formatted as by Magicoder (arXiv 2312.02120), without its opening sentence.
    """
    prompt = f"@@ Instruction\n{_text(row, 'instruction')}\n\n@@ Response\n"
    return {"prompt": prompt, "response": _text(row, "response")}


def _text(row: Mapping[str, Any], column: str) -> str:
    """Return a text of the row; formatted, 42 would become " 42" and null " None"."""
    value = row[column]
    if isinstance(value, str):
        return value
    shown = "null, or missing" if value is None else f"{type(value).__name__} {value!r}"
    raise UserError(f"column {column!r} is {shown}, not text; write it as text, in quotes")


def _question_answer(question: str, answer: str) -> dict[str, str]:
    # The space belongs to the answer: a prompt ending in one is tokenised unlike running text.
    return {"prompt": f"Question: {question}\nAnswer:", "response": f" {answer}"}
