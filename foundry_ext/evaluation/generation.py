"""GSM8K: greedy answers, compared with the gold number strictly and flexibly.

Prompt, stop strings, extraction and comparison are those of lm-evaluation-harness's task `gsm8k`,
version 3. Its few-shot examples come from the training split, ours from other rows of the same
file.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.special_tokens import encode_prompts, start_token
from foundry_ext.evaluation.config import GenerationSetConfig
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.evaluation.task_set import TaskSet
from foundry_ext.models.greedy import generate_greedily
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

BATCH_SIZE = 16  # prompts per generated batch
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
ANSWER_MARK = "#### "
INVALID = "[invalid]"

# The harness's patterns, as they are: other ones would give other scores.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(
    re.compile(pattern, flags)
    for pattern, flags in ((",", 0), (r"\$", 0), (".*#### ", re.DOTALL), (r"\.$", 0))
)


def strict_extract(output: str) -> str:
    """Return the first number after `#### `, or "[invalid]"."""
    match = _STRICT.search(output)
    return match[1].strip() if match else INVALID


def flexible_extract(output: str) -> str:
    """Return the last thing that looks like a number, or "[invalid]"."""
    numbers = [match[0] for match in _NUMBER.finditer(output)]
    return numbers[-1].strip() if numbers else INVALID


def normalise(answer: str) -> str:
    """Return the part that is compared.

    Commas, dollar signs, a final dot and everything up to the last `#### ` are removed.
    """
    for ignored in _IGNORED:
        answer = ignored.sub("", answer)
    return answer.lower()


@dataclass(frozen=True)
class Problem:
    """A problem with its solution and the answers that count as right."""

    prompt: str
    solution: str
    """The text after the prompt when this problem is a few-shot example."""
    golds: tuple[str, ...]
    """Right answers, normalised; any of them will do."""

    @property
    def solved(self) -> str:
        """The problem with its solution, as a few-shot example."""
        return f"{self.prompt} {self.solution}"


def parse_problem(row: dict[str, Any], place: str) -> Problem:
    """Return the problem in a row of GSM8K, {question, answer}, or of llm-foundry.

    llm-foundry's is {context, answer} with optional aliases and chain_of_thought.

    Raises:
        UserError: the row has neither form; names `place`, its file and index.
    """
    answer = row.get("answer")
    if isinstance(answer, str) and isinstance(row.get("question"), str):
        return Problem(f"Question: {row['question']}\nAnswer:", answer, (normalise(answer),))
    if isinstance(answer, str) and isinstance(row.get("context"), str):
        reasoning = row.get("chain_of_thought") or ""
        solution = f"{reasoning}\n{ANSWER_MARK}{answer}" if reasoning else answer
        golds = dict.fromkeys(map(normalise, [answer, *(row.get("aliases") or [])]))
        return Problem(row["context"], solution, tuple(golds))
    raise UserError(
        f"{place}: keys {', '.join(sorted(row))}; a generation row has question and answer, or"
        " context, answer and aliases"
    )


def output_text(text: str) -> str:
    """Return the text before the first stop string."""
    for stop in STOP_STRINGS:
        text = text.split(stop)[0]
    return text


def generate(
    model: SmolLM2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Return greedy continuations, whatever the model's own generation settings are.

    A row ends with the end-of-text token, or when a stop string is among its latest tokens;
    `output_text` removes what follows the string.
    """
    end_id = tokenizer.eos_token_id
    # A token is at least one byte, so these hold every stop string that just ended.
    window = max(len(text.encode()) for text in STOP_STRINGS)

    def has_ended(ids: Sequence[int]) -> bool:
        if ids[-1] == end_id:
            return True
        latest = tokenizer.decode(list(ids[-window:]))
        return any(stop in latest for stop in STOP_STRINGS)

    generated = generate_greedily(
        model, prompts, max_new_tokens=max_new_tokens, has_ended=has_ended
    )
    return [
        output_text(text) for text in tokenizer.batch_decode(generated, skip_special_tokens=True)
    ]


class GenerationSet(TaskSet[GenerationSetConfig]):
    """A file of problems whose prompts are encoded once."""

    def __init__(
        self, config: GenerationSetConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
    ):
        super().__init__(config, parse_problem)
        self.tokenizer = tokenizer
        room = max_length - config.max_new_tokens
        if room < 1:
            raise UserError(
                f"sets.{config.name}.max_new_tokens: {config.max_new_tokens} leaves no room for"
                f" a prompt in the model's {max_length} positions; lower it"
            )
        prompts = encode_prompts(
            tokenizer,
            [
                before + problem.prompt
                for before, problem in zip(self.few_shot, self.questions, strict=True)
            ],
        )
        self.prompts = [prompt[-room:] or [start_token(tokenizer)] for prompt in prompts]
        num_truncated = sum(len(prompt) > room for prompt in prompts)
        self.count("prompts", [len(prompt) for prompt in self.prompts], num_truncated, room)
        self.digest = self._digest()

    def _digest(self) -> str:
        """Return a digest of the encoded prompts, few-shot examples included, and the answers."""
        golds = [question.golds for question in self.questions]
        return hashlib.sha256(repr((self.prompts, golds)).encode()).hexdigest()[:16]

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseStates | None, shard: Shard
    ) -> list[Item]:
        """Return an item per problem of this rank's shard."""
        # Sorted by length, so that the rows of a batch see about as many keys. Batches do not
        # depend on the number of ranks.
        order = np.argsort(self.lengths, kind="stable")
        batches = [order[first : first + BATCH_SIZE] for first in range(0, len(order), BATCH_SIZE)]
        items = []
        for number in shard.progress(len(batches), self.config.name, unit="batches"):
            batch = batches[number]
            prompts = [self.prompts[index] for index in batch]
            outputs = generate(model, self.tokenizer, prompts, self.config.max_new_tokens)
            items += [
                self._item(int(index), output) for index, output in zip(batch, outputs, strict=True)
            ]
        return items

    def _item(self, index: int, output: str) -> Item:
        golds = self.questions[index].golds
        return {
            "item": str(self.items[index]),
            "gold": golds[0],
            "output": output,
            "strict_match": int(normalise(strict_extract(output)) in golds),
            "flexible_extract": int(normalise(flexible_extract(output)) in golds),
        }

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """Return the items of all ranks in the file's order."""
        return sorted(gathered, key=lambda item: int(item["item"]))
