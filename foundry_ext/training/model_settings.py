"""Checks of the settings of `smollm2_packed`, made before the slow parts of building a model.

Each raises a UserError that names the key, its value and the way out.
"""

import logging
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.llama import LlamaConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.models.pretrained import HUB_NAMES, shipped_config
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


def check_unsupported(
    *, use_train_metrics: bool, load_in_8bit: bool, trust_remote_code: bool
) -> None:
    """Refuse arguments of `hf_causal_lm` that are impossible here."""
    if use_train_metrics:
        raise UserError(
            "use_train_metrics: true needs logits, which training does not compute; set it to false"
            " (the training loss is logged anyway)"
        )
    if load_in_8bit:
        raise UserError("load_in_8bit: true is for inference only; leave it out")
    if trust_remote_code:
        log.warning(
            "trust_remote_code: true has no effect here: the model's code is this package's, and"
            " code that comes with the weights is never run"
        )


def check_adapter(
    peft_config: Mapping[str, Any] | None, saved: str | None, *, allow_embedding_resizing: bool
) -> None:
    """Refuse a new and a saved adapter together, and an adapter on embeddings that grow."""
    if saved is not None and peft_config is not None:
        raise UserError(
            f"pretrained_lora_id_or_path: {saved} brings its own configuration; leave out"
            " peft_config"
        )
    if allow_embedding_resizing and (saved is not None or peft_config is not None):
        raise UserError(
            "allow_embedding_resizing: true would add random rows that stay frozen and that no"
            " adapter checkpoint holds; leave it out, or train without an adapter"
        )


def check_pretrained(name: str, device: str, init_device: str) -> None:
    """Refuse pretrained weights for a shape without any, or if every rank is on meta."""
    if device == "meta" and init_device != "mixed":
        raise UserError("init_device: meta holds no weights; use cpu or mixed with pretrained")
    if shipped_config(name):
        raise UserError(
            f"pretrained_model_name_or_path: {name} is a shape without weights; set pretrained:"
            f" false, or name the hub's checkpoint {HUB_NAMES[name]}"
        )


def check_heads(config: LlamaConfig, stored: LlamaConfig) -> None:
    """Refuse other attention heads than the stored ones; the weights may fit nevertheless."""
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        if getattr(config, key) != getattr(stored, key):
            raise UserError(
                f"config_overrides.{key}: {getattr(config, key)} for a model pretrained with"
                f" {getattr(stored, key)}; leave it out"
            )


def check_embeddings(num_tokens: int, vocabulary: int) -> None:
    """Refuse a tokenizer that has ids without an embedding."""
    if num_tokens > vocabulary:
        raise UserError(
            f"tokenizer: its {num_tokens} tokens are more than the model's {vocabulary}; name the"
            " model's own tokenizer, or set allow_embedding_resizing: true for new rows that"
            " training has to fill"
        )


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a tokenizer that has far fewer tokens than the model.

    A few fewer are usual because vocabularies are rounded up.
    """
    vocabulary = config.vocab_size
    if len(tokenizer) < 0.9 * vocabulary:
        log.warning(
            "the tokenizer %s has %d tokens, the model %s %d: unless the model was trained with"
            " that tokenizer, every id means something else to it; name the model's own",
            *(tokenizer.name_or_path, len(tokenizer), config.name_or_path, vocabulary),
        )
