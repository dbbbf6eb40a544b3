"""Chat answers that the base model itself generates: text that it knows by construction.

Answers are sampled at temperature 0.5. At temperature 1 a model of this size drifts into nonsense,
and greedily it repeats itself. They are computed in fp64 with a seeded generator per prompt. The
same model therefore gives the same answers on another machine too, unless two tokens are equal to
rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = Path(__file__).with_name("prompts.txt")
MAX_NEW_TOKENS = 160
TEMPERATURE = 0.5
SEED = 21
REPLAY_EVERY = 4  # of the prompts, every fourth is for replay and is not measured


def read_prompts() -> list[str]:
    """Return the prompts, which were written for this experiment."""
    return PROMPTS.read_text(encoding="utf-8").split("\n")[:-1]


def is_for_replay(index: int) -> bool:
    return index % REPLAY_EVERY == REPLAY_EVERY - 1


def generate(model_folder: Path, prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Return a chat per prompt, whose answer the model has sampled."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, padding_side="left", trust_remote_code=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float64, trust_remote_code=False
    ).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(
        **given,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        logits_processor=[_Gumbel(len(prompts))],
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[:, given["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        [*chat, {"role": "assistant", "content": answer.strip()}]
        for chat, answer in zip(chats, answers, strict=True)
    ]


class _Gumbel:
    """A logits processor that makes the greedy choice a sample: logit / T + Gumbel noise."""

    def __init__(self, num_prompts: int):
        self.generators = [np.random.default_rng([SEED, index]) for index in range(num_prompts)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        noise = np.stack([rng.gumbel(size=scores.shape[1]) for rng in self.generators])
        return scores.double() / TEMPERATURE + torch.from_numpy(noise)
