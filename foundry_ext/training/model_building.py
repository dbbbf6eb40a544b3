"""Parts that `smollm2_packed` is built of: configuration, decoder, adapter."""

from pathlib import Path
from typing import Any, cast

import torch
from llmfoundry.models.utils import init_empty_weights
from llmfoundry.utils.config_utils import set_config_overrides
from peft import PeftModelForCausalLM, PeftType
from torch import nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llama import LlamaConfig

from foundry_ext.adapters import pissa
from foundry_ext.adapters.casts import leave_casts_to_autocast
from foundry_ext.adapters.fast import use_fast_linears
from foundry_ext.adapters.frozen import hold_frozen_in_bf16
from foundry_ext.models.decoder import SmolLM2DecoderLayer
from foundry_ext.models.pretrained import load_strictly, naming_the_hub, shipped_config
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError, naming


def read_config(name: str, overrides: dict[str, Any], *, use_auth_token: bool) -> LlamaConfig:
    """Return a model's configuration with overrides; a shipped shape needs no network.

    Raises:
        UserError: the configuration cannot be read, or is not a Llama-shaped model's.
    """
    source = shipped_config(name) or name
    with naming_the_hub(source):
        if Path(source).is_dir() and not Path(source, "config.json").is_file():
            # transformers would answer with a list of every architecture it knows.
            raise OSError("config.json is missing")
        config = AutoConfig.from_pretrained(
            source,
            trust_remote_code=False,  # never needed: the model's code is this package's
            token=True if use_auth_token else None,
            torch_dtype=torch.float32,
        )
    if not isinstance(config, LlamaConfig):
        raise UserError(
            f"smollm2_packed: {name} is a {config.model_type} model; only Llama-shaped ones run"
            " packed, use hf_causal_lm for others"
        )
    if overrides.keys() & {"hidden_size", "num_attention_heads"} and "head_dim" not in overrides:
        # transformers derived head_dim when it read the file; derive it from the overrides.
        hidden, heads = (
            overrides.get(key, getattr(config, key))
            for key in ("hidden_size", "num_attention_heads")
        )
        overrides = {**overrides, "head_dim": hidden // heads}
    with naming("config_overrides"):
        set_config_overrides(config, overrides)
    config._name_or_path = name  # for a shipped shape not its path on this machine
    return config


def build_decoder(
    name: str, config: LlamaConfig, device: str, *, pretrained: bool, use_auth_token: bool
) -> SmolLM2ForCausalLM:
    """Return the decoder on `device`, cpu or meta; with `pretrained`, the weights must fit exactly.

    On meta there are no weights yet: FSDP sends those of rank 0, or initialises them.

    Raises:
        UserError: a weight is missing or left over, or the device is another one.
    """
    if device not in ("cpu", "meta"):
        raise UserError(f"init_device: {device!r}; choose cpu, meta or mixed")
    if device == "cpu":
        if pretrained:
            return load_strictly(name, config, use_auth_token)
        return SmolLM2ForCausalLM(config)
    with init_empty_weights(include_buffers=False):
        model = SmolLM2ForCausalLM(config)
    if config.tie_word_embeddings:
        # llm-foundry builds us inside its own init_empty_weights, which would copy a parameter that
        # is set as an attribute and so untie the head. Hence through `_parameters`.
        tied = cast(nn.Parameter, model.model.embed_tokens.weight)
        model.lm_head._parameters["weight"] = tied
    return model


def prepare_adapter(model: PeftModelForCausalLM, frozen_dtype: str) -> None:
    """Make an adapter, new or loaded, fit for training and Composer's checkpoints, in place."""
    for config in model.peft_config.values():
        # Composer makes it a plain string, which peft 0.16 cannot save.
        config.peft_type = PeftType(config.peft_type)
    if pissa.is_pissa(model):
        pissa.remember_initial_factors(model)
    if frozen_dtype == "bf16":
        hold_frozen_in_bf16(model)
    use_fast_linears(model)
    leave_casts_to_autocast(model)


def is_decoder_layer(module: nn.Module) -> bool:
    """Return whether FSDP should shard, and checkpointing recompute, this module as a unit."""
    return isinstance(module, SmolLM2DecoderLayer)
