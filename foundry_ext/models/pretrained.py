"""Pretrained weights and configurations, from the hub, a folder or this package."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.llama import LlamaConfig

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

CONFIG_FOLDER = Path(__file__).parent / "configs"

HUB_NAMES = {
    f"smollm2-{size.lower()}": f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")
}


def shipped_config(name: str) -> str | None:
    """Return the folder of a configuration shipped with the package, or None for other names."""
    return str(CONFIG_FOLDER / name) if name in HUB_NAMES else None


@contextlib.contextmanager
def naming_the_hub(path: str) -> Iterator[None]:
    """Explain errors of loading a configuration or weights from a folder or the hub.

    Raises:
        UserError: instead of an error of transformers, the hub's client or safetensors.
    """
    try:
        yield
    except Exception as error:
        problem = _problem(path, error)
        if problem is None:
            raise
        cause = shorten(str(error), 160, placeholder=" ...")
        raise UserError(
            f"pretrained_model_name_or_path: {path} {problem} ({type(error).__name__}: {cause})"
        ) from error


_NEEDED = (
    "; give a local folder with config.json and model.safetensors, or, with network access, a name"
    " on the hub"
)


def _problem(path: str, error: Exception) -> str | None:
    """Return what is wrong and the way out, or None for an unrelated error."""
    text, folder = str(error), Path(path)
    if "does not recognize this architecture" in text or "requires you to execute" in text:
        return (
            "has an architecture that transformers does not know without remote code, which is not"
            " run here; only Llama-shaped models run packed, use hf_causal_lm for others"
        )
    if type(error).__name__ == "SafetensorError":
        return "has corrupted weights" + _NEEDED
    # With an errno it is a problem of this machine, such as a full disk, and not of the path.
    if not isinstance(error, OSError) or error.errno is not None:
        return None
    if not folder.is_dir():
        return "is not a local folder, and the hub does not provide it" + _NEEDED
    if not (folder / "config.json").is_file():
        return "has no config.json" + _NEEDED
    if any(folder.glob("*.safetensors")):
        return "cannot be read" + _NEEDED
    pickles = ", ".join(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt")])
    if pickles:
        return (
            f"has no model.safetensors but {pickles}, a pickle, which could run code when loaded;"
            " save the model again with safe_serialization=True"
        )
    return "has no model.safetensors" + _NEEDED


def load_strictly(path: str, config: LlamaConfig, use_auth_token: bool) -> SmolLM2ForCausalLM:
    """Load a model, and fail if a weight is missing, unexpected or of another shape.

    transformers would only warn, and initialise missing weights randomly.

    Raises:
        UserError: the weights cannot be loaded, do not fit the configuration, or are not finite.
    """
    with naming_the_hub(path):
        loaded: Any = SmolLM2ForCausalLM.from_pretrained(
            path,
            config=config,
            torch_dtype=torch.float32,
            token=True if use_auth_token else None,
            use_safetensors=True,  # other formats are pickles, which could run code
            ignore_mismatched_sizes=True,  # reported below, with the other kinds of mismatch
            output_loading_info=True,
        )
    model, report = loaded
    problems = [
        f"{kind}: {', '.join(sorted(map(str, names))[:3])}"
        for kind, names in report.items()
        if names
    ]
    if problems:
        raise UserError(
            f"checkpoint {path} does not fit its configuration: {'; '.join(problems)}."
            " config_overrides must not change the shape of a pretrained model"
        )
    _check_finite(path, model)
    return model


def _check_finite(path: str, model: SmolLM2ForCausalLM) -> None:
    """Refuse weights that are not finite, which training would blame on its own steps."""
    # A sum is finite only if all of its terms are; it is read faster than isfinite() is written.
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    bad = [name for name, p in named if not p.sum().isfinite() and not p.isfinite().all()]
    if bad:
        raise UserError(
            f"pretrained_model_name_or_path: {path} has weights that are not finite, {len(bad)} of"
            f" its parameters ({', '.join(bad[:3])}); save the model again, or download it again"
        )


def load_generation_config(model: SmolLM2ForCausalLM, path: str) -> None:
    """Set the model's generation configuration from a folder or the hub, if it has one."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        log.info("%s has no generation_config.json; using the defaults", path)
