"""Adapters, checked and loaded; export of Composer checkpoints to Hugging Face folders."""

import json
import logging
import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
from composer.models.huggingface import HuggingFaceModel, filter_state_dict_peft
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from torch import nn
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.adapters import methods, pissa
from foundry_ext.checkpoints.model_card import weights_in, write_card
from foundry_ext.checkpoints.provenance import provenance_of_state
from foundry_ext.checkpoints.safe_load import describe_foreign, load_checkpoint
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError, naming, one_line

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")


def adaptable_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that peft can put an adapter on."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear | nn.Embedding)]


def load_adapter(model: PreTrainedModel, path: str) -> PeftModelForCausalLM:
    """Load an adapter strictly; PeftModelForCausalLM.from_pretrained only warns of missing weights.

    Raises:
        UserError: the adapter does not exist, is a pickle, is not supported, or does not fit.
    """
    if not Path(path).is_dir():
        _name_the_hub(path)
    elif not Path(path, "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter {path} holds no adapter_model.safetensors: a pickle (.bin) could run code"
            " when it is read; save it again with safe_serialization=True, or name another folder"
        )
    config = PeftConfig.from_pretrained(path)
    try:
        methods.check(config.to_dict(), adaptable_modules(model))
    except ValueError as error:
        raise UserError(f"adapter {path}: {error}") from error
    assert isinstance(config, LoraConfig)
    if config.init_lora_weights == "pissa":
        raise UserError(
            f"adapter {path} needs the residual of its own base model, which a saved PiSSA adapter"
            " does not hold; export its checkpoint with foundry-ext, which writes a LoRA"
        )
    config.inference_mode = False
    adapted = PeftModelForCausalLM(model, config)  # pyright: ignore[reportArgumentType]
    base = getattr(model.config, "_name_or_path", None)
    if config.base_model_name_or_path not in (None, "", base):
        log.warning(
            "adapter %s was trained on %s and continues here on %s: unless both have the same"
            " weights, it does not fit",
            *(path, config.base_model_name_or_path, base),
        )
    try:
        report = adapted.load_adapter(path, "default", is_trainable=True)
    except RuntimeError as error:  # another shape
        problem = shorten(str(error), 200, placeholder=" ...")
        raise UserError(
            f"adapter {path} does not fit the model {base}; name the one that it was trained on,"
            f" {config.base_model_name_or_path or 'which it does not name'} ({problem})"
        ) from error
    if report.missing_keys or report.unexpected_keys:
        raise UserError(
            f"adapter {path} does not fit the model: missing {report.missing_keys[:3]}, left over"
            f" {report.unexpected_keys[:3]}"
        )
    return adapted


def _name_the_hub(path: str) -> None:
    """Check that the hub, or its cache, has an adapter of this name without pickles."""
    try:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            huggingface_hub.hf_hub_download(path, name)
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"adapter {path} is not a folder here, and the hub does not give it; name a local"
            " folder with adapter_config.json and adapter_model.safetensors"
            f" ({type(error).__name__}: {shorten(str(error), 160, placeholder=' ...')})"
        ) from error


def export_checkpoint(checkpoint: Path | str, out: Path | str) -> Path:
    """Write a Composer checkpoint as a folder that stock transformers, or peft, loads.

    A full model becomes config.json and model.safetensors in fp32 (the config says
    LlamaForCausalLM). An adapter becomes adapter_config.json and adapter_model.safetensors, to be
    loaded onto the base model that its configuration names. The tokenizer is included, and a model
    card, README.md, with the figures of the run's record if the checkpoint lies in a run's folder.

    Args:
        checkpoint: a file that Composer saved (`ep1-ba10-rank0.pt`, or its `latest` link).
        out: a new or empty folder.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: no such checkpoint.
        UserError: not a complete checkpoint of a smollm2_packed model, `out` in use, or weights
            that do not fit the saved configuration.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    refuse_folder_in_use(out)
    state = _load_state(checkpoint)
    try:
        saved, weights = state["integrations"]["huggingface"], state["model"]
        config = saved["model"]["config"]["content"]
    except KeyError as error:
        raise UserError(
            f"{checkpoint} has no {error}: it must be a checkpoint of a Hugging Face model"
        ) from error
    if config["model_type"] != "llama":
        raise UserError(f"{checkpoint} must be of a Llama-shaped model, not {config['model_type']}")
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    model = _build(saved["model"], weights, checkpoint)
    with replaced_folder(out, must_be_new=True) as scratch:
        write_folder(model, _saved_tokenizer(saved, scratch / "tokenizer"), scratch)
        write_card(scratch, weights_in(scratch, place=out), provenance_of_state(checkpoint, state))
    return out


def write_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write model or adapter, and tokenizer, for stock libraries; `weights` replace its own.

    peft adds a README.md of its own, which `write_card` replaces.
    """
    # Without it peft asks the hub whether the vocabulary has grown, which may be refused.
    adapter = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    with pissa.as_plain_lora(model, weights) as weights:
        options: dict[str, Any] = {"state_dict": weights, **adapter}
        model.save_pretrained(str(folder), **options)
    if adapter:
        _sort_targets(folder / "adapter_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _sort_targets(path: Path) -> None:
    """Sort what peft writes in the order of hashes, so that equal runs write equal files."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content["target_modules"], list):
        content["target_modules"].sort()
        path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def refuse_folder_in_use(out: Path) -> None:
    """Raise a UserError unless `out` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name another folder or remove it")


def in_run_folder(folder: Path) -> str:
    """Return what a run's folder holds of the model, as `RUN/hf or RUN/checkpoints/x.pt`.

    It is empty if the folder is not a run's, or holds neither.
    """
    exported = (folder / "hf" / name for name in ("adapter_config.json", "config.json"))
    found = [folder / "hf"] if any(path.is_file() for path in exported) else []
    found += sorted((folder / "checkpoints").glob("latest-rank0.pt"))
    return " or ".join(map(str, found))


def _load_state(checkpoint: Path) -> dict[str, Any]:
    if checkpoint.is_dir():
        files = sorted(file.name for file in checkpoint.glob("*.pt"))
        if files:
            way_out = f"name one of its files, {', '.join(files[-3:])}"
        elif any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json")):
            way_out = "it is a Hugging Face folder already"
        elif inside := in_run_folder(checkpoint):
            way_out = f"it is a run's folder; name {inside}"
        else:
            way_out = "if it is a sharded checkpoint, save with state_dict_type: full"
        raise UserError(f"{checkpoint} is a folder, not a Composer .pt file; {way_out}")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    try:
        content: Any = load_checkpoint(checkpoint)
        problem = describe_foreign(content)
        if problem:
            raise UserError(f"{checkpoint} {problem}; name a file that Composer saved")
        return content["state"]
    except ValueError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{checkpoint} is not a readable Composer checkpoint: {problem}") from error


def _build(
    saved: dict[str, Any], weights: dict[str, Any], source: Path
) -> SmolLM2ForCausalLM | PeftModel:
    """Return the model with exactly these weights; a missing one would stay random unnoticed."""
    adapter = saved.get("peft_config", {}).get("content")
    config: Any = LlamaConfig.from_dict(saved["config"]["content"])
    if adapter is not None:
        config.name_or_path = adapter["base_model_name_or_path"]
    model = SmolLM2ForCausalLM(config)
    if "generation_config" in saved:
        content = saved["generation_config"]["content"]
        model.generation_config = GenerationConfig.from_dict(content)
    expected: Any = model.state_dict()
    if adapter is not None:
        with naming(str(source)):  # an unsupported key may import a module by its name
            methods.check(adapter, adaptable_modules(model))
        # Not initialised as in training: PiSSA would decompose random matrices.
        peft_config = LoraConfig(**adapter | {"init_lora_weights": True})
        model = get_peft_model(model, peft_config)
        assert isinstance(model, PeftModel)
        peft_config.init_lora_weights = adapter["init_lora_weights"]
        if pissa.is_pissa(model):
            pissa.empty_initial_factors(model)
        # The base model is in the checkpoint only on request, and never in the export.
        expected, weights = (
            filter_state_dict_peft(names, peft_config, remove_adapter_names=False)
            for names in (model.state_dict(), weights)
        )
    wrong = sorted(expected.keys() ^ weights.keys())
    if wrong:
        raise UserError(
            f"{source} does not hold the weights of its own configuration: missing or left over"
            f" {', '.join(wrong[:3])}"
        )
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # another shape
        raise UserError(
            f"{source} does not fit its own configuration: {one_line(error)}"
        ) from error
    return model


def _saved_tokenizer(saved: dict[str, Any], scratch: Path) -> PreTrainedTokenizerBase | None:
    for name, content in (saved.get("tokenizer") or {}).items():
        # Composer writes files under these names, wherever they lead.
        if Path(name).name != name or content["file_extension"] not in _TOKENIZER_FILES:
            raise UserError(
                f"the checkpoint's tokenizer has a file {name!r}{content['file_extension']}, which"
                " no tokenizer needs: it could be code, or be written anywhere"
            )
    with naming("the checkpoint's tokenizer"):
        tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
            saved, trust_remote_code=False, tokenizer_save_dir=str(scratch)
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return tokenizer
