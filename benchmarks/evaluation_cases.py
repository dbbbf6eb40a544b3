"""Cases of benchmarks/evaluation.py: real rows under a real tokenizer, or random ones as long.

Real are the files that `foundry-ext tasks` writes, arc_challenge.jsonl and winogrande.jsonl, and
GSM8K's rows, gsm8k_test.jsonl.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.data.special_tokens import encode_prompts
from foundry_ext.evaluation.config import GenerationSetConfig, MultipleChoiceSetConfig
from foundry_ext.evaluation.generation import STOP_STRINGS, GenerationSet
from foundry_ext.evaluation.multiple_choice import MultipleChoiceSet
from foundry_ext.evaluation.rows import read_rows
from foundry_ext.packing.collator import Document

POSITIONS = 2048
MOST_NEW_TOKENS = 128


@dataclass(frozen=True)
class Case:
    """Documents in groups that may share a prefix, or prompts to continue."""

    name: str
    groups: Sequence[Sequence[Document]] = ()
    prompts: Sequence[Sequence[int]] = ()
    has_ended: Callable[[Sequence[int]], bool] = field(default=lambda _ids: False)

    @property
    def documents(self) -> list[Document]:
        return [document for group in self.groups for document in group]

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents or prompts, each counted whole."""
        documents = sum(len(document.input_ids) for document in self.documents)
        return documents + sum(len(prompt) for prompt in self.prompts)


def real_cases(data: Path, tokenizer: Any, items: int) -> list[Case]:
    """Make the cases of rows, evenly spaced over the files in `data`."""
    few = max(items // 4, 1)
    cases = []
    for name, file, shots, count in (
        ("ARC, 0 shots", "arc_challenge", 0, items),
        ("ARC, 5 shots", "arc_challenge", 5, few),
        ("WinoGrande, 0 shots", "winogrande", 0, 2 * items),
    ):
        config = MultipleChoiceSetConfig(
            name="task",
            role="forgetting",
            path=str(data / f"{file}.jsonl"),
            num_fewshot=shots,
            max_items=count,
        )
        task = MultipleChoiceSet(config, tokenizer, POSITIONS)
        groups = [[task.documents[index] for index in indices] for indices in task.choices]
        cases.append(Case(name, groups))
    path = str(data / "gsm8k_test.jsonl")
    cases.append(Case("KL, GSM8K's answers", [[one] for one in _answers(path, tokenizer, items)]))
    settings = GenerationSetConfig(name="task", role="learning", path=path, max_items=few)
    prompts = GenerationSet(settings, tokenizer, POSITIONS).prompts

    def has_ended(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(ids[-12:]))
        return ids[-1] == tokenizer.eos_token_id or any(stop in text for stop in STOP_STRINGS)

    return [*cases, Case("GSM8K, 5 shots, generation", (), prompts, has_ended)]


def _answers(path: str, tokenizer: Any, items: int) -> list[Document]:
    documents = []
    for row in read_rows(path)[:items]:
        question = f"Question: {row['question']}\nAnswer:"
        context, ids = encode_prompts(tokenizer, [question, f"{question} {row['answer']}"])
        documents.append(Document(np.asarray(ids), np.arange(len(ids)) >= len(context)))
    return documents


def random_cases(vocabulary: int, items: int) -> list[Case]:
    """Make cases of random ids, about as long as the real ones are in SmolLM2's tokens."""
    rng, few = np.random.default_rng(0), max(items // 4, 1)

    def ids(median: int, sigma: float = 0.4) -> np.ndarray:
        return rng.integers(vocabulary, size=max(int(median * rng.lognormal(0, sigma)), 2))

    def question(context: int, choice: int, choices: int) -> list[Document]:
        shared = ids(context)
        return [document(shared, ids(choice)) for _ in range(choices)]

    def document(context: np.ndarray, scored: np.ndarray) -> Document:
        joined = np.concatenate([context, scored])
        return Document(joined, np.arange(len(joined)) >= len(context))

    def schema() -> list[Document]:
        """Two options differ in the last tokens of the context, and the continuation is scored."""
        before, after = ids(13), ids(8)
        return [document(np.concatenate([before, ids(2, 0)]), after) for _ in range(2)]

    return [
        Case("ARC, 0 shots", [question(30, 6, 4) for _ in range(items)]),
        Case("ARC, 5 shots", [question(200, 6, 4) for _ in range(few)]),
        Case("WinoGrande, 0 shots", [schema() for _ in range(2 * items)]),
        Case("KL, GSM8K's answers", [[document(ids(60), ids(110))] for _ in range(items)]),
        Case(
            "GSM8K, 5 shots, generation", (), [ids(900, 0.15).tolist()[:1500] for _ in range(few)]
        ),
    ]
