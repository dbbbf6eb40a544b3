"""Learning and forgetting of a finished model: the sets of a YAML, on the base and on it."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import PeftModel
from yaml import YAMLError

from foundry_ext.checkpoints.export import load_adapter
from foundry_ext.checkpoints.loading import (
    as_folder,
    base_name,
    is_adapter,
    load_model,
    load_tokenizer,
    recorded_base,
)
from foundry_ext.evaluation.base_model import adapters_off
from foundry_ext.evaluation.config import SetSettings, parse_sets
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.evaluation.metrics import Item, changes
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError


class Afterwards(NamedTuple):
    """What `evaluate` found.

    `report`: {model, base, device, precision, metrics: {base, model}, learning, forgetting, data};
    without a base its parts are None. `items`: lines as of a run, the base as step 0, the model as
    step 1.
    """

    report: dict[str, Any]
    items: list[Item]


def read_sets(path: Path) -> list[SetSettings]:
    """`sets` of a YAML, or those of its `forgetting` callback: a run's own YAML will do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, no sets in it, or a set that cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        node = OmegaConf.select(config, "sets")
        if node is None:
            node = OmegaConf.select(config, "callbacks.forgetting.sets")
        sets: Any = None if node is None else OmegaConf.to_container(node, resolve=True)
    # OmegaConf has OSError and AssertionError for a lone value; ValueError: bytes that are no text.
    except (
        *(OmegaConfBaseException, YAMLError, AssertionError),
        *(OSError, ValueError, RecursionError),
    ) as error:
        raise UserError(f"{path}: {' '.join(str(error).split()) or 'not a mapping'}") from error
    if not isinstance(sets, Mapping):
        raise UserError(f"{path} has neither `sets` nor `callbacks.forgetting.sets`")
    return parse_sets(sets)


def evaluate(path: Path, settings: list[SetSettings], base: str | None = None) -> Afterwards:
    """Measures a Hugging Face folder, an adapter folder or a Composer checkpoint.

    Against the base model (as given, an adapter's own, or that of the run's record beside it) it
    also tells what was learned and forgotten, and the KL.

    Raises:
        FileNotFoundError, ValueError: a model or a set that cannot be loaded.
    """
    with as_folder(path) as folder:
        adapted = is_adapter(folder)
        known = base if base or adapted else recorded_base(path)
        before = base_name(folder, known) if adapted or known else None
        tokenizer = load_tokenizer(folder, before or str(folder))
        tuned = None if adapted else _load(str(folder))
        base_model = None if before is None else _load(before)
        shape = tuned or base_model
        assert shape is not None
        sets = build_sets(settings, tokenizer, shape.config.max_position_embeddings)
        start: dict[str, float] | None = None
        items: list[Item] = []
        reference: BaseModel | None = None
        with _precision():
            if base_model is not None:
                reference = lambda: nullcontext(base_model)  # noqa: E731
                start, items = measure(sets, base_model, reference)
            if tuned is None:
                assert base_model is not None
                peft_model = load_adapter(base_model, str(folder)).eval()
                tuned, reference = _inner(peft_model), adapters_off(peft_model)
            now, tuned_items = measure(sets, tuned, reference)
    report = {
        "model": str(path),
        "base": before,
        "device": tuned.device.type,
        "precision": "amp_bf16" if tuned.device.type == "cuda" else "fp32",
        "metrics": {"base": start, "model": now},
        **({} if start is None else changes(settings, start, now)),
        "data": {one.settings.name: one.description for one in sets},
    }
    lines = [{"step": step, **item} for step, of in ((0, items), (1, tuned_items)) for item in of]
    return Afterwards(report, lines)


def _load(name: str) -> SmolLM2ForCausalLM:
    model = load_model(name, SmolLM2ForCausalLM)
    return model.to("cuda") if torch.cuda.is_available() else model  # pyright: ignore[reportArgumentType]


def _inner(model: PeftModel) -> SmolLM2ForCausalLM:
    inner = model.get_base_model()
    assert isinstance(inner, SmolLM2ForCausalLM)
    return inner


def _precision() -> Any:
    """As runs train: bf16 autocast on a GPU, fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()


def write(found: Afterwards, out: Path) -> None:
    """`evaluation.json` and `items.jsonl` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(found.report, indent=1) + "\n")
    lines = "".join(json.dumps(item) + "\n" for item in found.items)
    (out / "items.jsonl").write_text(lines)


def describe(report: Mapping[str, Any]) -> str:
    """A table for the terminal."""
    start, now = report["metrics"]["base"], report["metrics"]["model"]
    rows = [("", "base", "model")]
    for name, value in now.items():
        rows.append((name, "" if start is None else f"{start[name]:.4f}", f"{value:.4f}"))
    for role in ("learning", "forgetting"):
        rows += [(f"{role}/{name}", "", f"{x:+.4f}") for name, x in report.get(role, {}).items()]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}} {a:>10} {b:>10}" for name, a, b in rows]
    if start is None:
        lines.append("no base model is known: give it by --base for KL, learning and forgetting")
    return "\n".join(lines)
