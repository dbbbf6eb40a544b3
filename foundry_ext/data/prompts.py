"""Preprocessing functions of the shipped data sets: rows -> prompt and response.

A YAML names one as `preprocessing_fn: foundry_ext.data.prompts:metamathqa`. Questions are written
as lm-evaluation-harness writes GSM8K's, "Question: ...\\nAnswer:", so that training and evaluation
share one form.
"""

from collections.abc import Mapping


def metamathqa(row: Mapping[str, str]) -> dict[str, str]:
    """Format a row of meta-math/MetaMathQA: columns `query` and `response`."""
    return _question_answer(row["query"], row["response"])


def gsm8k(row: Mapping[str, str]) -> dict[str, str]:
    """Format a row of openai/gsm8k: columns `question` and `answer`."""
    return _question_answer(row["question"], row["answer"])


def magicoder(row: Mapping[str, str]) -> dict[str, str]:
    """Format a row of ise-uiuc/Magicoder-Evol-Instruct-110K: `instruction` and `response`.

    Formatted as by Magicoder (arXiv 2312.02120), without its opening sentence.
    """
    prompt = f"@@ Instruction\n{row['instruction']}\n\n@@ Response\n"
    return {"prompt": prompt, "response": row["response"]}


def _question_answer(question: str, answer: str) -> dict[str, str]:
    # The space belongs to the answer: a prompt ending in one is tokenised unlike running text.
    return {"prompt": f"Question: {question}\nAnswer:", "response": f" {answer}"}
