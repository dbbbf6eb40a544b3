"""Where weights and shapes come from: the hub, a folder, or this package."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.llama import LlamaConfig

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

log = logging.getLogger(__name__)

CONFIG_FOLDER = Path(__file__).parent / "configs"

HUB_NAMES = {
    f"smollm2-{size.lower()}": f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")
}


def shipped_config(name: str) -> str | None:
    """The folder of a shape shipped with the package, by its name here."""
    if name not in HUB_NAMES:
        return None
    return str(CONFIG_FOLDER / name)


def load_strictly(path: str, config: LlamaConfig, use_auth_token: bool) -> SmolLM2ForCausalLM:
    """A missing or left-over weight would otherwise be a warning and a model half random."""
    loaded: Any = SmolLM2ForCausalLM.from_pretrained(
        path,
        config=config,
        torch_dtype=torch.float32,
        token=True if use_auth_token else None,
        ignore_mismatched_sizes=True,  # reported below
        output_loading_info=True,
    )
    model, report = loaded
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        shown = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items())
        raise ValueError(
            f"checkpoint {path} does not fit its configuration: {shown}. config_overrides may not"
            " change the shape of a pretrained model"
        )
    return model


def load_generation_config(model: SmolLM2ForCausalLM, path: str) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        log.info("%s has no generation_config.json; the defaults are used", path)
