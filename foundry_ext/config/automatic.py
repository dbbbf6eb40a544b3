"""Settings whose value is `auto`: what the machine decides when a run starts.

Afterwards the configuration holds plain values, which the checkpoint and the record store. A run
that resumes keeps those of its checkpoint, see training/automatic_choices.py.
"""

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from foundry_ext.utils.environment import why_no_kernels

AUTO = "auto"
COMPILE, LOSS = "model.compile", "model.loss"
FIXED_SHAPE = "train_loader.dataset.fixed_shape"
# What runs did before there was `auto`, and what the model and the loader do without the key. For
# train.py, an absent key is `auto` too.
EARLIER: dict[str, Any] = {COMPILE: "none", LOSS: "chunked", FIXED_SHAPE: False}
_MIXED = ("amp_bf16", "amp_fp16")
# The others run as Python between two compiled halves of a layer.
_TRACED = (AUTO, "flash_attn", "torch_varlen")


def is_automatic(config: DictConfig, key: str) -> bool:
    """Return whether a key is `auto` or absent."""
    return OmegaConf.select(config, key, default=None) in (None, AUTO)


def in_effect(config: DictConfig, key: str) -> Any:
    """Return the value of one of these settings after `settle`."""
    found = OmegaConf.select(config, key, default=None)
    return EARLIER[key] if found is None else found


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Set a value; an absent key that would get the model's or the loader's default stays so."""
    if value != EARLIER[key] or OmegaConf.select(config, key, default=None) is not None:
        OmegaConf.update(config, key, value)


def automatic_keys(config: DictConfig) -> list[str]:
    """Return the settings that `settle` would decide."""
    return [key for key in EARLIER if _is_ours(config) and is_automatic(config, key)]


def _is_ours(config: DictConfig) -> bool:
    """Return whether our model trains on our packs, which is where these settings exist."""
    model, loader = (str(OmegaConf.select(config, f"{x}.name")) for x in ("model", "train_loader"))
    return model == "smollm2_packed" and loader.startswith("packed_")


def settle(config: DictConfig, *, has_gpu: bool) -> str:
    """Give automatic settings their values on this machine, in place.

    Compiled code needs packs of one shape, so the two come together: an explicit value of one
    decides the other. They are on for a GPU in half precision, whose attention torch.compile can
    trace, unless FSDP shards the model.

    Args:
        config: a run's configuration.
        has_gpu: whether the run trains on a GPU.

    Returns:
        A line for the log with what was chosen, and why; empty if nothing was automatic.
    """
    if not _is_ours(config):
        return ""
    automatic = automatic_keys(config)
    if not automatic:
        return ""
    reason = _why_not(config, has_gpu)
    fixed = OmegaConf.select(config, FIXED_SHAPE, default=None)
    if COMPILE in automatic:
        scope = "none" if reason or fixed is False else "layers"
        _set(config, COMPILE, scope)
        reason = reason or (f"{FIXED_SHAPE} is false" if fixed is False else "")
    compiles = in_effect(config, COMPILE) != "none"
    if FIXED_SHAPE in automatic:
        _set(config, FIXED_SHAPE, compiles)
    if LOSS in automatic:
        _set(config, LOSS, "compiled" if compiles and has_gpu else "chunked")
    values = (f"{key}: {in_effect(config, key)}" for key in automatic)
    because = reason or "a GPU; the first steps compile, which takes a minute or two"
    return f"auto chose {', '.join(values)} ({because if COMPILE in automatic else COMPILE})"


def compiles_on_gpu(config: DictConfig) -> bool:
    """Return whether a run of this configuration, before `settle`, would be compiled on a GPU."""
    there = copy.deepcopy(config)
    settle(there, has_gpu=True)
    return _is_ours(there) and in_effect(there, COMPILE) != "none"


def _why_not(config: DictConfig, has_gpu: bool) -> str:
    """Return why the model is better not compiled, or an empty string."""
    if not has_gpu:
        return "no GPU"
    if config.get("precision") not in _MIXED:
        return f"precision is {config.get('precision')}"
    backend = OmegaConf.select(config, "model.attention_backend", default=AUTO)
    if backend not in _TRACED:
        return f"attention_backend is {backend}"
    if config.get("fsdp_config"):
        return "fsdp_config"
    return why_no_kernels()
