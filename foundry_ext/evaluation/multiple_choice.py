"""Multiple-choice questions, answered by the likeliest choice; a shared prefix is computed once.

Scores are defined as in lm-evaluation-harness: `acc` takes the choice with the largest summed
log-probability of the continuation's tokens, `acc_norm` the one with the largest sum divided by the
choice's length in characters. llm-foundry instead takes the lowest perplexity, a mean over tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.special_tokens import encode_prompts, start_token
from foundry_ext.evaluation.config import MultipleChoiceSetConfig
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.evaluation.task_set import TaskSet
from foundry_ext.evaluation.trees import plant, score_forest
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.collator import Document
from foundry_ext.utils.errors import UserError

# Tokens per pack: enough to fill a GPU, and no more than a training pack has.
PACK_TOKENS = 8192


@dataclass(frozen=True)
class Choice:
    """A context and the continuation of it that is scored.

    The choices of a question share the context; the choices of a schema task share the
    continuation.
    """

    context: str
    text: str
    """The choice, or the shared continuation, without the space before it."""

    @property
    def continuation(self) -> str:
        """The text with a space before it."""
        return self.text if self.text[:1].isspace() else f" {self.text}"


@dataclass(frozen=True)
class Question:
    """A question; `gold` is the index of its right choice."""

    choices: tuple[Choice, ...]
    gold: int

    @property
    def solved(self) -> str:
        """The question with its right answer, as a few-shot example."""
        right = self.choices[self.gold]
        return right.context + right.continuation


def parse_question(row: dict[str, Any], place: str) -> Question:
    """Return the question in {query, choices, gold} or {context_options, continuation, gold}.

    Raises:
        UserError: the row has neither form, or gold is not the index of a choice; names `place`,
            its file and index.
    """
    if "choices" in row and "query" in row:
        choices = tuple(Choice(row["query"], text) for text in row["choices"])
    elif "context_options" in row and "continuation" in row:
        choices = tuple(Choice(context, row["continuation"]) for context in row["context_options"])
    else:
        raise UserError(
            f"{place}: keys {', '.join(sorted(row))}; a multiple-choice row has query, choices and"
            " gold, or context_options, continuation and gold"
        )
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise UserError(f"{place}: gold {gold!r} must be an index, 0 to {len(choices) - 1}")
    if not all(choice.text for choice in choices):
        raise UserError(f"{place}: an empty choice or continuation cannot be scored")
    return Question(choices, gold)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
) -> tuple[list[Document], int]:
    """Return (context, continuation) pairs as documents, and how many were truncated.

    Only the continuation has labels. As in the harness, both are tokenised together; the context is
    tokenised alone as well, and its number of tokens is where the continuation starts. Spaces at
    the end of the context are moved to the continuation because tokenizers join a space to the word
    after it. (llm-foundry tokenises the two separately and drops the spaces.) A document begins as
    in training, see data/special_tokens.py; if that leaves an empty context without a token, it
    becomes the begin-of-text token. Documents above `max_length` tokens are cut from the left; the
    last token does not count because nothing is predicted from it.

    Raises:
        UserError: a continuation has no token, or more than `max_length`.
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped) :] + continuation))
    together = encode_prompts(tokenizer, [context + text for context, text in moved])
    contexts = encode_prompts(tokenizer, [context for context, _ in moved])
    start = start_token(tokenizer)
    documents, num_truncated = [], 0
    for (_, text), ids, context_ids in zip(moved, together, contexts, strict=True):
        ids, num_context = (ids, len(context_ids)) if context_ids else ([start, *ids], 1)
        num_scored = len(ids) - num_context
        if not 0 < num_scored <= max_length:
            raise UserError(
                f"the continuation {text[:60]!r} has {num_scored} tokens; between 1 and the"
                f" model's {max_length} can be scored"
            )
        loss_mask = np.arange(len(ids)) >= num_context
        num_truncated += len(ids) > max_length + 1
        end = slice(-(max_length + 1), None)
        documents.append(Document(input_ids=np.asarray(ids)[end], loss_mask=loss_mask[end]))
    return documents, num_truncated


class MultipleChoiceSet(TaskSet[MultipleChoiceSetConfig]):
    """A file of questions whose choices are encoded once."""

    def __init__(
        self,
        config: MultipleChoiceSetConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ):
        super().__init__(config, parse_question)
        pairs = [
            (before + choice.context, choice.continuation)
            for before, question in zip(self.few_shot, self.questions, strict=True)
            for choice in question.choices
        ]
        self.documents, num_truncated = encode(tokenizer, pairs, max_length=max_length)
        lengths = [len(document.input_ids) for document in self.documents]
        self.count("choices", lengths, num_truncated, max_length)
        self.capacity = max(PACK_TOKENS, *lengths)
        self.forest = plant(self.choices, self.documents, self.capacity)
        self.digest = self._digest()

    def _digest(self) -> str:
        """Return a digest of the encoded choices and the right answers, few-shot ones included."""
        answers = [
            (one.gold, [len(choice.text) for choice in one.choices]) for one in self.questions
        ]
        digest = hashlib.sha256(repr((answers, self.lengths)).encode())
        for document in self.documents:
            digest.update(document.input_ids.astype(np.int64).tobytes())
            digest.update(document.loss_mask.tobytes())
        return digest.hexdigest()[:16]

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseStates | None, shard: Shard
    ) -> list[Item]:
        """Return an item per choice of this rank's shard.

        Packs do not depend on the number of ranks, so a choice is always computed together with the
        same others and rounds alike.
        """
        name = self.config.name
        scores = score_forest(model, self.documents, self.forest, name=name, shard=shard)
        return [{"item": str(index), "logprob": log_prob} for index, log_prob in scores]

    @property
    def choices(self) -> list[range]:
        """Indices of each question's documents."""
        ends = np.cumsum([len(question.choices) for question in self.questions]).tolist()
        return [range(first, last) for first, last in pairwise([0, *ends])]

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """Join the choices of all ranks to one item per question."""
        log_probs = {int(item["item"]): item["logprob"] for item in gathered}
        items = []
        for item, question, indices in zip(self.items, self.questions, self.choices, strict=True):
            sums = [log_probs[index] for index in indices]
            normed = [
                value / len(choice.text)
                for value, choice in zip(sums, question.choices, strict=True)
            ]
            items.append(
                {
                    "item": str(item),
                    "gold": question.gold,
                    "logprobs": sums,
                    "logprobs_norm": normed,
                    "acc": int(np.argmax(sums) == question.gold),
                    "acc_norm": int(np.argmax(normed) == question.gold),
                    **({"logprob": sums[question.gold]} if self.config.logprob else {}),
                }
            )
        return items
