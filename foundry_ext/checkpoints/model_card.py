"""Model cards: the README.md of every Hugging Face folder that is written here.

A card says where the weights come from, how stock libraries load them, and what the run measured at
the very step of these weights. Its last line is a digest of the text before it, so that a card that
somebody edited is told from one that may be replaced.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from foundry_ext.adapters.methods import Method, method_of_config
from foundry_ext.checkpoints.card_results import results_of
from foundry_ext.checkpoints.provenance import Provenance
from foundry_ext.models.pretrained import HUB_NAMES
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.environment import describe_environment
from foundry_ext.utils.markdown import escape_markdown
from foundry_ext.utils.nested import get
from foundry_ext.utils.redaction import redact

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_SEAL = "<!-- Written by foundry_ext. SHA-256 of the text above: "
_PEFTS_OWN = "[More Information Needed]"  # in the card that peft writes beside an adapter
_NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "rslora": "rsLoRA",
    "dora_rslora": "DoRA with rsLoRA's scale",
}
_PACKAGES = ("foundry-ext", "torch", "transformers", "peft", "mosaicml", "llm-foundry")
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_PROMPT = "Question: What is 2 + 3?\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one folder."""

    place: Path
    """The folder as the reader finds it, not the one that is being filled."""
    method: Method
    base: str | None = None
    """The base model, if the weights themselves name it."""
    is_adapter: bool = False
    merged: str = ""
    """Description of the merge of an adapter into the weights; empty if none was merged."""
    has_patterns: bool = False
    """Whether some modules have another rank or alpha than the method's."""
    has_tokenizer: bool = True


def weights_in(folder: Path, *, place: Path, base: str | None = None) -> Weights:
    """Return the description of a full model or an adapter just written into `folder`.

    Args:
        folder: the folder.
        place: where it is going to be.
        base: the base model of a full one, if known; an adapter names its own.
    """
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return Weights(
        place=place,
        method=method_of_config(config),
        base=config["base_model_name_or_path"] if config else base,
        is_adapter=config is not None,
        has_patterns=has_patterns(config),
        has_tokenizer=has_tokenizer,
    )


def has_patterns(config: Mapping[str, Any] | None) -> bool:
    """Return whether a `peft_config` has ranks or alphas by pattern."""
    return bool(config and (config.get("rank_pattern") or config.get("alpha_pattern")))


def write_card(folder: Path, weights: Weights, provenance: Provenance) -> None:
    """Write the card of `weights` into `folder`, atomically and without secrets."""
    # Before it is escaped, which would hide a secret's form.
    record = redact(provenance.record)
    provenance = replace(provenance, record=record)
    weights = replace(weights, base=redact(weights.base), place=Path(redact(str(weights.place))))
    base, is_random = _base_of(weights, record)
    results = results_of(provenance, is_merged=bool(weights.merged))
    card = ModelCard.from_template(
        _card_data(weights, base if not is_random else None, record),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=escape_markdown(record["run_name"] if record else weights.place.absolute().name),
        summary=_summary(weights, base, is_random),
        loading=_loading(weights, base, is_random),
        code=_code(weights, base) if _can_load(weights, base, is_random) else "",
        training=[
            (name, escape_markdown(value))
            for name, value in _training(weights, base, is_random, provenance)
        ],
        record_note=_record_note(record),
        **results,
    )
    text = str(card).rstrip("\n") + "\n\n"
    write_text(folder / CARD, f"{text}{_SEAL}{_digest(text)} -->\n")


def may_be_replaced(card: Path) -> bool:
    """Return whether nobody has edited a card: it is as it was written here, or peft's own."""
    content = card.read_text(encoding="utf-8", errors="replace")
    text, seal, digest = content.rpartition(_SEAL)
    if not seal:
        return _PEFTS_OWN in content
    return digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    # As write_text encodes it.
    return hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()


def _card_data(weights: Weights, base: str | None, record: Any) -> ModelCardData:
    """Return the card's header, which the hub validates: names that are not the hub's stay out."""
    method = weights.method.name
    return ModelCardData(
        base_model=base if base and _is_hub_name(base) else None,
        datasets=_hub_datasets(record) or None,
        library_name="peft" if weights.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["foundry_ext", *([] if method == "full" else [method])],
    )


def _base_of(weights: Weights, record: Any) -> tuple[str | None, bool]:
    """Return the base model's name, and whether that names a shape with random weights."""
    base = weights.base or (record["model"]["name"] if record else None)
    is_random = base in HUB_NAMES or (
        record is not None and get(record["config"], "model.pretrained") is False
    )
    return base, is_random


def _hub_datasets(record: Any) -> list[str]:
    if record is None or record["data"]["train"]["revision"] is None:  # as local files have it
        return []
    names = (record["data"]["train"]["name"] or "").split(" + ")
    return [name for name in names if _is_hub_name(name)]


def _is_hub_name(name: str) -> bool:
    """Return whether it is OWNER/NAME and nothing on this disk."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    is_file = name.endswith(_DATA_SUFFIXES) or Path(name).exists()
    return name.count("/") == 1 and redact(name) == name and not is_file


def _summary(weights: Weights, base: str | None, is_random: bool) -> str:
    start = _shown_base(base, is_random)
    method = _NAMES.get(weights.method.name, weights.method.name)
    if weights.is_adapter:
        text = f"Adapter ({method}) of {start}"
    elif weights.merged:
        text = f"Adapter ({method}) merged into the weights of {start}"
    else:
        text = f"{method[0].upper()}{method[1:]} of {start}"
    return escape_markdown(f"{text}, trained with foundry_ext.")


def _shown_base(base: str | None, is_random: bool) -> str:
    if base is None:
        return "a base model that is not known here"
    return f"{base} with random weights" if is_random else base


def _can_load(weights: Weights, base: str | None, is_random: bool) -> bool:
    needs_base = weights.is_adapter or not weights.has_tokenizer
    return not needs_base or (base is not None and not is_random)


def _loading(weights: Weights, base: str | None, is_random: bool) -> str:
    if not _can_load(weights, base, is_random):
        return "These weights need their base model, which was random and not saved, or is unknown."
    library = "peft and transformers" if weights.is_adapter else "transformers"
    return (
        f"With {library} alone. Paths are relative to the folder in which the command ran; name"
        " this folder where you have it now, or its name on the hub."
    )


def _code(weights: Weights, base: str | None) -> str:
    """Return Python that loads the weights and continues a prompt."""
    start, tokenizer = ("base" if weights.is_adapter else "path"), "path"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if weights.is_adapter:
        lines.insert(0, "from peft import PeftModel")
    lines.append(f"path = {_quoted(str(weights.place))}")
    if weights.is_adapter or not weights.has_tokenizer:
        lines.append(f"base = {_quoted(base or '')}")
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({start})")
    if weights.is_adapter:
        lines.append("model = PeftModel.from_pretrained(model, path)")
    if not weights.has_tokenizer:
        tokenizer = "base"
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        "",
        f'prompt = tokenizer({_quoted(_PROMPT)}, return_tensors="pt")',
        "tokens = model.generate(",
        "    input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=32",
        ")",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return a Python string in double quotes, as ruff formats it."""
    return json.dumps(text, ensure_ascii=False)


def _training(
    weights: Weights, base: str | None, is_random: bool, provenance: Provenance
) -> Iterator[tuple[str, str]]:
    record = provenance.record
    yield "Base model", _shown_base(base, is_random)
    if record and get(record["config"], "load_path"):
        yield "Continued from", str(record["config"]["load_path"])
    yield from _method(weights, record)
    if record:
        yield "Trained parameters", f"{record['model']['trainable_parameters']:,}"
        yield "Data", _data(record["data"]["train"])
    if provenance.step is not None:
        others = record and record["steps"] > provenance.step
        after = f"; the run went on to {record['steps']:,}" if record and others else ""
        yield "Steps", f"{provenance.step:,}{after}"
    elif record:
        yield "Steps", f"not known; the run has {record['steps']:,}"
    if provenance.real_tokens is not None:
        yield "Real tokens", f"{provenance.real_tokens:,}, padding not counted"
    if record:
        yield "Learning rate", f"{record['learning_rate']:g} at its peak"
        yield "Seed", str(record["seed"])
    here = describe_environment(device_kind="cpu", world_size=1) if record is None else None
    environment: Any = here or (record and record["environment"])
    packages = environment["packages"]
    software = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    yield "Software", software + (", which wrote this folder" if here else "")
    if environment["commit"]:
        yield "Commit", environment["commit"] + (", with changes" if environment["dirty"] else "")


def _method(weights: Weights, record: Any) -> Iterator[tuple[str, str]]:
    method = weights.method
    yield "Method", _NAMES.get(method.name, method.name)
    if method.rank is None or method.effective_scale is None:
        return
    divisor = "sqrt(rank)" if "rslora" in method.name else "rank"
    scale = f"scale {method.effective_scale:g} (alpha / {divisor})"
    others = "; some modules have others (adapter_config.json)" if weights.has_patterns else ""
    text = f"rank {method.rank}, alpha {method.alpha:g}, {scale}, dropout {method.dropout:g}"
    yield "Adapter", text + others
    if record and record["model"]["init"] == "pissa":
        rank = record["model"]["rank"]
        yield "Initialisation", f"PiSSA of rank {rank}, written as a LoRA that is equal to it"
    targets = method.target_modules or ()
    yield "Target modules", targets if isinstance(targets, str) else ", ".join(targets)
    if weights.merged:
        yield "Merged", weights.merged


def _data(train: Any) -> str:
    text = str(train["name"])
    if train["revision"]:
        text += f" at revision {train['revision']}"
    if train["documents"] is not None and train["tokens"] is not None:
        text += f"; {train['documents']:,} documents with {train['tokens']:,} tokens per epoch"
    return text


def _record_note(record: Any) -> str:
    if record is None:
        return (
            "No record of the run was found, so its data, learning rate and results are not known"
            " here."
        )
    return "From the run's record, `record.json`, which has every setting."
