"""Multiple choice: each choice a document, all of them packed; the gold one should be likeliest.

Scores are defined as in lm-evaluation-harness: `acc` takes the largest summed log-probability of
the continuation's tokens, `acc_norm` the largest sum divided by the choice's length in characters.
llm-foundry decides otherwise, by the lowest perplexity, which is the mean over tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.evaluation.config import MultipleChoiceSettings
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.rows import few_shot_prompt, fingerprint, read_rows
from foundry_ext.evaluation.scoring import Shard, evenly_spaced, score_documents
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.collator import Document, PackCollator
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

# Tokens of a pack: fills a GPU, and fits where a training pack does.
PACK_TOKENS = 8192


@dataclass(frozen=True)
class Choice:
    """What is read, and the continuation of it that is scored.

    A question's choices share the context; those of a schema task share the continuation.
    """

    context: str
    text: str
    """The choice, or the shared continuation, without the space before it."""

    @property
    def continuation(self) -> str:
        return self.text if self.text[:1].isspace() else f" {self.text}"


@dataclass(frozen=True)
class Question:
    choices: tuple[Choice, ...]
    gold: int

    @property
    def solved(self) -> str:
        """As an example before other questions."""
        return self.choices[self.gold].context + self.choices[self.gold].continuation


def parse_question(row: dict[str, Any], place: str) -> Question:
    """A row of either form: {query, choices, gold} or {context_options, continuation, gold}.

    Raises:
        UserError: neither form, or a gold that is no index of a choice; names the place.
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
        raise UserError(f"{place}: gold {gold!r} is no index of its {len(choices)} choices")
    if not all(choice.text for choice in choices):
        raise UserError(f"{place}: an empty choice or continuation cannot be scored")
    return Question(choices, gold)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
) -> tuple[list[Document], int]:
    """(context, continuation) pairs -> documents whose continuation alone has labels.

    As the harness does: both together are tokenised, and the context alone, whose number of tokens
    is where the continuation starts; spaces at the context's end go to the continuation, for
    tokenizers put a space before a word. llm-foundry instead tokenises the two apart and drops the
    spaces. An empty context becomes the begin-of-text token. What is above `max_length`, the last
    token not counted since nothing is predicted from it, is cut from the left.

    Returns:
        (documents, how many were cut).

    Raises:
        UserError: a continuation without a token, or longer than `max_length`.
    """
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped) :] + continuation))
    whole, alone = (
        _token_ids(tokenizer, texts) for texts in ([a + b for a, b in moved], [a for a, _ in moved])
    )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    documents, num_truncated = [], 0
    for (_, text), ids, context_ids in zip(moved, whole, alone, strict=True):
        ids, num_context = (ids, len(context_ids)) if context_ids else ([start, *ids], 1)
        num_scored = len(ids) - num_context
        if not 0 < num_scored <= max_length:
            raise UserError(
                f"the continuation {text[:60]!r} has {num_scored} tokens; between 1 and the"
                f" model's {max_length} can be scored"
            )
        loss_mask = np.arange(len(ids)) >= num_context
        num_truncated += len(ids) > max_length + 1
        kept = slice(-(max_length + 1), None)
        documents.append(Document(input_ids=np.asarray(ids)[kept], loss_mask=loss_mask[kept]))
    return documents, num_truncated


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Not verbose: texts above the tokenizer's model_max_length are no mistake here.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


class MultipleChoiceSet:
    """A file of questions, encoded once."""

    def __init__(
        self,
        settings: MultipleChoiceSettings,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ):
        self.settings = settings
        rows = read_rows(settings.path)
        questions = [
            parse_question(row, f"{settings.path}, row {number}") for number, row in enumerate(rows)
        ]
        self.items = [int(place) for place in evenly_spaced(len(rows), settings.max_items)]
        self.questions = [questions[item] for item in self.items]
        examples = [question.solved for question in questions]
        pairs = []
        for item, question in zip(self.items, self.questions, strict=True):
            prompt = few_shot_prompt(examples, item, settings.num_fewshot)
            pairs += [(prompt + one.context, one.continuation) for one in question.choices]
        self.documents, self.num_truncated = encode(tokenizer, pairs, max_length=max_length)
        self.lengths = np.asarray([len(document.input_ids) for document in self.documents])
        self.capacity = max(PACK_TOKENS, int(self.lengths.max()))
        self.collator = PackCollator(max_seq_len=max_length + 1, pack_tokens=self.capacity)
        self.fingerprint = fingerprint([rows[item] for item in self.items])
        if self.num_truncated:
            log.warning(
                "%s: %d of %d choices exceed %d tokens and were cut from the left",
                settings.name,
                self.num_truncated,
                len(self.documents),
                max_length,
            )

    @property
    def description(self) -> dict[str, Any]:
        """For the run record: which data this was."""
        kept = len(self.documents) - self.num_truncated
        return {
            "name": self.settings.path,
            "revision": None,
            "fingerprint": self.fingerprint,
            "documents": len(self.questions),
            "tokens": int(self.lengths.sum()),
            "counts": {"kept": kept, "truncated": self.num_truncated},
        }

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseModel | None, shard: Shard
    ) -> list[Item]:
        """A line a choice of this rank's shard: choices of a question may be on several ranks, so
        that `complete` makes questions of them."""
        scores = score_documents(
            model,
            np.arange(len(self.documents)),
            self.lengths,
            lambda chosen: self.collator([self.documents[index] for index in chosen]),
            capacity=self.capacity,
            base=None,
            shard=shard,
        )
        return [{"item": str(score.index), "logprob": score.log_prob} for score in scores]

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """The choices of all ranks -> a line a question."""
        found = {int(one["item"]): one["logprob"] for one in gathered}
        items, first = [], 0
        for item, question in zip(self.items, self.questions, strict=True):
            last = first + len(question.choices)
            sums = [found[index] for index in range(first, last)]
            normed = [
                value / len(one.text) for value, one in zip(sums, question.choices, strict=True)
            ]
            items.append(
                {
                    "item": str(item),
                    "gold": question.gold,
                    "logprobs": sums,
                    "logprobs_norm": normed,
                    "acc": int(int(np.argmax(sums)) == question.gold),
                    "acc_norm": int(int(np.argmax(normed)) == question.gold),
                }
            )
            first = last
        return items
