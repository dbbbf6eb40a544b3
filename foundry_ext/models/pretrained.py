"""Where weights and shapes come from: the hub, a folder, or this package."""

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
    """The folder of a shape shipped with the package, by its name here."""
    if name not in HUB_NAMES:
        return None
    return str(CONFIG_FOLDER / name)


@contextlib.contextmanager
def naming_the_hub(path: str) -> Iterator[None]:
    """Configuration or weights that are not there, or cannot be read: which, and what would do.

    Raises:
        UserError: in place of what transformers, the hub's client and safetensors raise.
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
    "; give a local folder with config.json and model.safetensors, or a name on the hub where that"
    " can be reached"
)


def _problem(path: str, error: Exception) -> str | None:
    """In words; None for an error of another kind."""
    text, folder = str(error), Path(path)
    if "does not recognize this architecture" in text or "requires you to execute" in text:
        return (
            "is of an architecture that transformers does not know without code of its own, which"
            " is not run here; only Llama-shaped models run packed, use hf_causal_lm for others"
        )
    if type(error).__name__ == "SafetensorError":
        return "holds damaged weights" + _NEEDED
    if not isinstance(error, OSError) or error.errno is not None:  # of this machine, not the name
        return None
    if not folder.is_dir():
        return "is no folder here, and the hub does not give it" + _NEEDED
    if not (folder / "config.json").is_file():
        return "holds no config.json" + _NEEDED
    if any(folder.glob("*.safetensors")):
        return "cannot be read" + _NEEDED
    pickles = ", ".join(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt")])
    if pickles:
        return (
            f"holds no model.safetensors but {pickles}, a pickle, which could run code when it is"
            " read; save the model anew with safe_serialization=True"
        )
    return "holds no model.safetensors" + _NEEDED


def load_strictly(path: str, config: LlamaConfig, use_auth_token: bool) -> SmolLM2ForCausalLM:
    """A missing or left-over weight would otherwise be a warning and a model half random."""
    with naming_the_hub(path):
        loaded: Any = SmolLM2ForCausalLM.from_pretrained(
            path,
            config=config,
            torch_dtype=torch.float32,
            token=True if use_auth_token else None,
            use_safetensors=True,  # others are pickles, which could run code
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    model, report = loaded
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        shown = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items())
        raise UserError(
            f"checkpoint {path} does not fit its configuration: {shown}. config_overrides may not"
            " change the shape of a pretrained model"
        )
    return model


def load_generation_config(model: SmolLM2ForCausalLM, path: str) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        log.info("%s has no generation_config.json; the defaults are used", path)
