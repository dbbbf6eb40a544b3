"""Fine-tuned models and the base models they came from, loaded for merging and analysis."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.llama import LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.checkpoints.export import export_checkpoint, in_run_folder, load_adapter
from foundry_ext.checkpoints.provenance import record_above
from foundry_ext.models.pretrained import HUB_NAMES
from foundry_ext.records.record import read_record
from foundry_ext.utils.errors import UserError, naming, one_line

CERTIFICATE = "merge_certificate.json"
"""Name of what a merge writes beside its model."""

Model = TypeVar("Model", bound=PreTrainedModel)


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """Yield the Hugging Face folder of a model or adapter, or a temporary export of a checkpoint.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        UserError: it is neither a model, an adapter nor a checkpoint.
    """
    if path.is_dir():
        if not any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
            inside = in_run_folder(path)
            raise UserError(
                f"{path} holds neither adapter_config.json nor config.json; "
                + (
                    f"it is a run's folder; name {inside}"
                    if inside
                    else "give a Hugging Face model or adapter folder, or a Composer .pt file"
                )
            )
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield export_checkpoint(path, Path(scratch) / "export")


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def base_name(folder: Path, given: str | None) -> str:
    """Return the base model's name, as given or as the adapter names it.

    Raises:
        UserError: a full model, which names none, or a name that stands for random weights.
    """
    name = given
    if name is None and is_adapter(folder):
        path = folder / "adapter_config.json"
        with naming(str(path)):
            name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder} does not name its base model; pass --base")
    if name in HUB_NAMES:
        raise UserError(
            f"{name} is a shape without weights, so the base model was random and was not saved;"
            " pass the base model by --base"
        )
    return name


def load_model(
    name: str,
    kind: type[Model] = LlamaForCausalLM,
    *,
    way_out: str = "name another by --base",
) -> Model:
    """Return a Llama-shaped model in fp32 and evaluation mode.

    Args:
        name: a folder or a name on the hub.
        kind: the class to load.
        way_out: what an error advises.

    Raises:
        UserError: it cannot be loaded, has another architecture, or its weights do not match.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != "llama":
            raise UserError(f"{name} must be a Llama-shaped model, not {config.model_type}")
        loaded: Any = kind.from_pretrained(
            name, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model {name} cannot be loaded; {way_out}: {one_line(error)}") from error
    model, report = loaded
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise UserError(f"model {name} does not fit its configuration: {wrong}")
    return model.eval()


def recorded_base(path: Path) -> str | None:
    """Return the base model that a merge's certificate names, or the record of the run.

    None if neither is near.
    """
    certificate = path / CERTIFICATE
    if certificate.is_file():
        with naming(str(certificate), (ValueError, KeyError)):  # no JSON, or another one
            return json.loads(certificate.read_text(encoding="utf-8"))["base"]
    record = record_above(path)
    if record is None:
        return None
    model = read_record(record)["config"].get("model", {})
    return model.get("pretrained_model_name_or_path") if model.get("pretrained", True) else None


def load_tuned(folder: Path, base: str, kind: type[Model] = LlamaForCausalLM) -> Model | PeftModel:
    """Return the tuned model in fp32 and evaluation mode, its adapter not merged."""
    if is_adapter(folder):
        with naming(str(folder), (ValueError, TypeError)):  # of peft, about adapter_config.json
            return load_adapter(load_model(base, kind), str(folder)).eval()
    return load_model(str(folder), kind)


def load_tokenizer(folder: Path, base: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with the tuned model, else the base model's."""
    is_saved = (folder / "tokenizer_config.json").is_file()
    try:
        # Without it, transformers would ask at the terminal whether to run code of the folder.
        return AutoTokenizer.from_pretrained(
            str(folder) if is_saved else base, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"no tokenizer in {folder} or {base}: {one_line(error)}") from error
