"""Composer checkpoint -> Hugging Face folder, for full models and adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from composer.models.huggingface import HuggingFaceModel
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, PreTrainedTokenizerBase

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

_ADAPTER_MARK = ".default."  # peft's adapter name inside Composer's parameter names


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Writes a Composer checkpoint as a folder that stock transformers, or peft, loads.

    A full model becomes config.json and model.safetensors in fp32 (config says LlamaForCausalLM); an
    adapter becomes adapter_config.json and adapter_model.safetensors, to be loaded onto the base
    model that its configuration names. The tokenizer comes along.

    Args:
        checkpoint: a file that Composer saved (`ep1-ba10-rank0.pt`, or its `latest` link).
        out: a new or empty folder.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a full Composer checkpoint of a smollm2_packed model, `out` in use, or weights
            that do not fit the saved configuration.
    """
    state = _load_state(checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name another folder or remove it")
    try:
        saved = state["integrations"]["huggingface"]
        weights, config = state["model"], saved["model"]["config"]["content"]
    except KeyError as error:
        raise ValueError(
            f"{checkpoint} holds no {error} and so is no whole checkpoint of a Hugging Face model;"
            " a sharded one must be saved with state_dict_type: full"
        ) from error
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    model = SmolLM2ForCausalLM(LlamaConfig.from_dict(config))
    adapter = saved["model"].get("peft_config")
    scratch = out.with_name(out.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if adapter is None:
        _load_full(model, weights, checkpoint)
        model.save_pretrained(scratch)
    else:
        _load_adapter(model, weights, adapter["content"], checkpoint).save_pretrained(scratch)
    tokenizer = _saved_tokenizer(saved, scratch / "tokenizer")
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    scratch.rename(out)  # whole or not at all
    return out


def _load_state(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    try:
        # Composer's checkpoints hold timestamps and metrics, not tensors alone.
        return torch.load(checkpoint, map_location="cpu", weights_only=False)["state"]
    except Exception as error:
        raise ValueError(f"{checkpoint} is not a readable Composer checkpoint: {error}") from error


def _load_full(model: SmolLM2ForCausalLM, weights: dict[str, Any], source: Path) -> None:
    """All or nothing: a part left random would be a model that looks whole."""
    # A model trained with an adapter, saved whole, is not a plain decoder.
    wrapped = [name for name in weights if "lora_" in name]
    if wrapped:
        raise ValueError(
            f"{source} was saved whole with an adapter ({wrapped[0]}); train with"
            " should_save_peft_only: true, its default"
        )
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit its own configuration: {error}") from error


def _load_adapter(
    model: SmolLM2ForCausalLM, weights: dict[str, Any], config: dict[str, Any], source: Path
) -> PeftModelForCausalLM:
    peft_config = LoraConfig(**config)
    peft_model = get_peft_model(model, peft_config)
    adapter = {name: value for name, value in weights.items() if "lora_" in name}
    expected = {name for name in peft_model.state_dict() if "lora_" in name}
    missing = sorted(expected - adapter.keys()) + sorted(adapter.keys() - expected)
    if missing:
        raise ValueError(f"{source}: adapter weights do not match its peft_config: {missing[:3]}")
    stripped = {name.replace(_ADAPTER_MARK, "."): value for name, value in adapter.items()}
    set_peft_model_state_dict(peft_model, stripped)
    loaded = peft_model.state_dict()
    assert all(torch.equal(loaded[name], adapter[name]) for name in expected), "adapter not loaded"
    assert isinstance(peft_model, PeftModelForCausalLM)
    return peft_model


def _saved_tokenizer(saved: dict[str, Any], scratch: Path) -> PreTrainedTokenizerBase | None:
    tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
        saved, tokenizer_save_dir=str(scratch)
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return tokenizer


def describe_export(out: Path) -> str:
    """One line: what was written, to be loaded with what."""
    adapter = out / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        return f"{out}: adapter; PeftModel.from_pretrained(base, path), base model {base!r}"
    return f"{out}: full model; AutoModelForCausalLM.from_pretrained(path)"
