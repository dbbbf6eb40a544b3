"""What the model writes: continuations of a few prompts, at every evaluation."""

import sys
from typing import Any

import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import ConsoleLogger, Logger
from composer.models import HuggingFaceModel
from composer.utils import dist, model_eval_mode

from foundry_ext.training.meter import unwrapped
from foundry_ext.utils.errors import UserError

COLUMNS = ["step", "real_tokens", "prompt", "continuation"]


class TextSamples(Callback):
    """Continues `prompts` greedily, adapters included; prints them and logs a table `text_samples`,
    which W&B shows by step.

    Composer's own Generate has all ranks generate the same, knows no step 0 and no evaluation,
    writes nothing a console can show, and leaves the tokenizer with another pad token; so little of
    it would be left that this one stands alone. Rank 0 generates on the module without DDP around
    it, in which there is no collective, while the others wait at their next one.

    Args:
        prompts: texts to be continued, as they are: a chat template is yours to apply.
        max_new_tokens: of each continuation, which ends earlier at an end-of-text token.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 48):
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt]
        if not prompts or isinstance(prompts, str) or wrong:
            raise UserError(f"text_samples.prompts: {prompts!r}; give a list of texts, none empty")
        if max_new_tokens < 1:
            raise UserError(f"text_samples.max_new_tokens: {max_new_tokens} is below 1")
        self.prompts, self.max_new_tokens = list(prompts), max_new_tokens

    def init(self, state: State, logger: Logger) -> None:
        if state.fsdp_config is not None:
            raise UserError(
                "text_samples: one rank alone cannot generate with a model that FSDP shards; leave"
                " fsdp_config out, which trains with DDP, or leave the callback out"
            )
        model = unwrapped(state)
        if not isinstance(model, HuggingFaceModel) or model.tokenizer is None:
            raise UserError(
                f"text_samples: {type(model).__name__} is no Hugging Face model with a tokenizer;"
                " leave the callback out"
            )

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """What `eval_first` ends with."""
        self._sample(state, logger)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._sample(state, logger)

    def _sample(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        model: Any = unwrapped(state)
        with model_eval_mode(model), get_precision_context(state.precision):
            texts = continuations(
                model.model,
                model.tokenizer,
                self.prompts,
                max_new_tokens=self.max_new_tokens,
                device=next(model.parameters()).device,
            )
        step, tokens = state.timestamp.batch.value, state.timestamp.token.value
        lines = [f"text samples at step {step}:"]
        # Quoted, so that no control character of a young model's reaches the terminal.
        lines += [
            f"  {prompt!r} -> {text!r}" for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        rows = [[step, tokens, *pair] for pair in zip(self.prompts, texts, strict=True)]
        for destination in logger.destinations:
            # Composer's console would repeat the table as JSON with every later line of metrics.
            if not isinstance(destination, ConsoleLogger):
                destination.log_table(COLUMNS, rows, "text_samples", step)


def continuations(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, device: torch.device
) -> list[str]:
    """Greedy continuations, without the prompts and special tokens; draws no random number.

    One batch [B, S], padded left: positions to be continued must be the last ones.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, encoded))
    # Any id will do where the mask is 0.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    gaps = [longest - len(ids) for ids in encoded]
    input_ids = [[pad] * gap + ids for gap, ids in zip(gaps, encoded, strict=True)]
    mask = [[0] * gap + [1] * len(ids) for gap, ids in zip(gaps, encoded, strict=True)]
    generated = model.generate(
        input_ids=torch.tensor(input_ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
