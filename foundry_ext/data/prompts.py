"""Rows of the shipped data sets -> prompt and response.

A YAML names one as `preprocessing_fn: foundry_ext.data.prompts:metamathqa`. Questions are put as
lm-evaluation-harness puts GSM8K's, "Question: ...\\nAnswer:", so that what is trained and what is
asked in evaluation have one form.
"""

from collections.abc import Mapping


def metamathqa(row: Mapping[str, str]) -> dict[str, str]:
    """meta-math/MetaMathQA: columns `query` and `response`."""
    return _question_answer(row["query"], row["response"])


def gsm8k(row: Mapping[str, str]) -> dict[str, str]:
    """openai/gsm8k: columns `question` and `answer`."""
    return _question_answer(row["question"], row["answer"])


def magicoder(row: Mapping[str, str]) -> dict[str, str]:
    """ise-uiuc/Magicoder-Evol-Instruct-110K: columns `instruction` and `response`.

    Put as Magicoder puts them (arXiv 2312.02120), without its opening sentence.
    """
    prompt = f"@@ Instruction\n{row['instruction']}\n\n@@ Response\n"
    return {"prompt": prompt, "response": row["response"]}


def _question_answer(question: str, answer: str) -> dict[str, str]:
    # The space belongs to the answer: a prompt that ends in one is tokenised unlike running text.
    return {"prompt": f"Question: {question}\nAnswer:", "response": f" {answer}"}
