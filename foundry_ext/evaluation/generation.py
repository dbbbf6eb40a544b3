"""GSM8K: greedy answers, compared with the gold number strictly and flexibly.

Prompt, stop strings, extraction and comparison are those of lm-evaluation-harness's task `gsm8k`,
version 3; the solved examples are other rows of the same file, where the harness takes the training
split's.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.evaluation.config import GenerationSettings
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.rows import few_shot_prompt, fingerprint, read_rows
from foundry_ext.evaluation.scoring import Shard, evenly_spaced
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

BATCH_SIZE = 16  # prompts generated from at once
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
ANSWER_MARK = "#### "
INVALID = "[invalid]"

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(
    re.compile(pattern, flags)
    for pattern, flags in ((",", 0), (r"\$", 0), (".*#### ", re.DOTALL), (r"\.$", 0))
)


def strict_extract(output: str) -> str:
    """The first number behind `#### `, or "[invalid]"."""
    found = _STRICT.search(output)
    return found[1].strip() if found else INVALID


def flexible_extract(output: str) -> str:
    """The last thing that looks like a number, or "[invalid]"."""
    found = [match[0] for match in _NUMBER.finditer(output)]
    return found[-1].strip() if found else INVALID


def normalise(answer: str) -> str:
    """What is compared: without commas, dollar signs, all up to the last `#### `, a final dot."""
    for ignored in _IGNORED:
        answer = ignored.sub("", answer)
    return answer.lower()


@dataclass(frozen=True)
class Problem:
    prompt: str
    solution: str
    """As an example before other problems."""
    golds: tuple[str, ...]
    """Any of which is right, normalised."""


def parse_problem(row: dict[str, Any], place: str) -> Problem:
    """A row of GSM8K {question, answer} or of llm-foundry {context, answer, aliases,
    chain_of_thought}, the last two optional.

    Raises:
        UserError: neither form; names the place.
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


class _StopStrings(StoppingCriteria):
    """Ends a row once one of the strings is in its latest tokens, each of which is a byte or more;
    `output_text` cuts what stands behind."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_prompt: int):
        self.tokenizer, self.num_prompt = tokenizer, num_prompt
        self.window = max(len(text.encode()) for text in STOP_STRINGS)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        latest = input_ids[:, max(self.num_prompt, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(latest)
        stops = [any(stop in text for stop in STOP_STRINGS) for text in texts]
        return torch.tensor(stops, device=input_ids.device)


def output_text(text: str) -> str:
    """Up to the first stop string."""
    for stop in STOP_STRINGS:
        text = text.split(stop)[0]
    return text


@torch.no_grad()
def generate(
    model: SmolLM2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of prompts, padded on the left, whatever the model's own generation
    settings say."""
    assert tokenizer.eos_token_id is not None
    width = max(map(len, prompts))
    # Any id pads: the mask says where.
    ids = torch.full((len(prompts), width), cast(int, tokenizer.eos_token_id))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generated = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        stopping_criteria=StoppingCriteriaList([_StopStrings(tokenizer, width)]),
    )
    texts = tokenizer.batch_decode(cast(Tensor, generated)[:, width:], skip_special_tokens=True)
    return [output_text(text) for text in texts]


class GenerationSet:
    """A file of problems, their prompts encoded once."""

    def __init__(
        self, settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
    ):
        self.settings, self.tokenizer = settings, tokenizer
        rows = read_rows(settings.path)
        problems = [
            parse_problem(row, f"{settings.path}, row {number}") for number, row in enumerate(rows)
        ]
        self.items = [int(place) for place in evenly_spaced(len(rows), settings.max_items)]
        self.problems = [problems[item] for item in self.items]
        examples = [f"{problem.prompt} {problem.solution}" for problem in problems]
        texts = [
            few_shot_prompt(examples, item, settings.num_fewshot) + problem.prompt
            for item, problem in zip(self.items, self.problems, strict=True)
        ]
        room = max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"sets.{settings.name}.max_new_tokens: {settings.max_new_tokens} leaves no room for"
                f" a prompt in the model's {max_length} positions"
            )
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prompts = cast(list[list[int]], encoded)
        self.num_truncated = sum(len(prompt) > room for prompt in prompts)
        self.prompts = [prompt[-room:] for prompt in prompts]
        self.fingerprint = fingerprint([rows[item] for item in self.items])
        if self.num_truncated:
            log.warning(
                "%s: %d of %d prompts exceed %d tokens and were cut from the left",
                settings.name,
                self.num_truncated,
                len(self.prompts),
                room,
            )

    @property
    def description(self) -> dict[str, Any]:
        """For the run record: which data this was."""
        return {
            "name": self.settings.path,
            "revision": None,
            "fingerprint": self.fingerprint,
            "documents": len(self.problems),
            "tokens": sum(map(len, self.prompts)),
            "counts": {
                "kept": len(self.prompts) - self.num_truncated,
                "truncated": self.num_truncated,
            },
        }

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseModel | None, shard: Shard
    ) -> list[Item]:
        """A line a problem of this rank's shard."""
        # Alike in length, so that little is padding; the same batches on any number of ranks.
        order = np.argsort([len(prompt) for prompt in self.prompts], kind="stable")
        batches = [order[first : first + BATCH_SIZE] for first in range(0, len(order), BATCH_SIZE)]
        items = []
        for number in shard.of(len(batches)):
            prompts = [self.prompts[place] for place in batches[number]]
            outputs = generate(model, self.tokenizer, prompts, self.settings.max_new_tokens)
            for place, output in zip(batches[number], outputs, strict=True):
                items.append(self._item(int(place), output))
        return items

    def _item(self, place: int, output: str) -> Item:
        golds = self.problems[place].golds
        return {
            "item": str(self.items[place]),
            "gold": golds[0],
            "output": output,
            "strict_match": int(normalise(strict_extract(output)) in golds),
            "flexible_extract": int(normalise(flexible_extract(output)) in golds),
        }

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """The lines of all ranks in the file's order."""
        return sorted(gathered, key=lambda item: int(item["item"]))
