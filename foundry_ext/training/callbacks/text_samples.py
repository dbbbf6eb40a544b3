"""`text_samples`: continues a few prompts at every evaluation."""

import sys
from typing import Any

import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import ConsoleLogger, Logger
from composer.models import HuggingFaceModel
from composer.utils import dist, model_eval_mode

from foundry_ext.data.special_tokens import encode_prompts
from foundry_ext.models.padding import pad_left
from foundry_ext.training.meter import unwrapped
from foundry_ext.utils.errors import UserError

COLUMNS = ["step", "real_tokens", "prompt", "continuation"]


class TextSamples(Callback):
    """Callback that continues `prompts` greedily, prints the texts and logs them as a table.

    Composer's own Generate is not used: all its ranks generate the same texts, it does not run at
    step 0 or with evaluations, it writes nothing to the console, and it changes the tokenizer's pad
    token. Here rank 0 generates with the module inside DDP, which has no collectives, while the
    other ranks wait at their next one.

    Args:
        prompts: texts to continue, after the special tokens that begin every document; a chat
            template must be applied by the user.
        max_new_tokens: length of each continuation, which ends earlier at an end-of-text token.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 48):
        bad = [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt]
        if not prompts or isinstance(prompts, str) or bad:
            raise UserError(f"text_samples.prompts: {prompts!r}; must be a list of non-empty texts")
        if max_new_tokens < 1:
            raise UserError(
                f"text_samples.max_new_tokens: {max_new_tokens}; must be an integer of at least 1"
            )
        self.prompts, self.max_new_tokens = list(prompts), max_new_tokens

    def init(self, state: State, logger: Logger) -> None:
        if state.fsdp_config is not None:
            raise UserError(
                "text_samples: rank 0 cannot generate alone with a model that FSDP shards; leave"
                " out fsdp_config to train with DDP, or leave out the callback"
            )
        model = unwrapped(state)
        if not isinstance(model, HuggingFaceModel) or model.tokenizer is None:
            raise UserError(
                f"text_samples: {type(model).__name__} is not a Hugging Face model with a"
                " tokenizer; leave out the callback"
            )

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Sample at the end of `eval_first`."""
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
        # Quoted, so that control characters in the text do not reach the terminal.
        lines += [
            f"  {prompt!r} -> {text!r}" for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        rows = [[step, tokens, *pair] for pair in zip(self.prompts, texts, strict=True)]
        for destination in logger.destinations:
            # Composer's console would repeat the table, as JSON, with every later line of metrics.
            if not isinstance(destination, ConsoleLogger):
                destination.log_table(COLUMNS, rows, "text_samples", step)


def continuations(
    model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, device: torch.device
) -> list[str]:
    """Return greedy continuations, without the prompts and special tokens, all in one batch.

    A prompt is the beginning of a document, as in training, and a continuation ends as a document
    does. No random number is drawn.
    """
    # Any id can pad because the mask marks the padding.
    end_id = tokenizer.eos_token_id
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = pad_left(encode_prompts(tokenizer, prompts), pad_id)
    generated = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
