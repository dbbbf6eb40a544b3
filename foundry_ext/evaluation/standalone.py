"""Learning and forgetting of a finished model: a YAML's sets, measured on it and on its base."""

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
from foundry_ext.evaluation.config import EvalSetConfig, parse_sets
from foundry_ext.evaluation.measure import build_sets, measure
from foundry_ext.evaluation.metrics import Item, changes
from foundry_ext.models.compiled import fuse_evaluation
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.environment import why_no_kernels
from foundry_ext.utils.errors import UserError, one_line

# In a file of sets, in a run's YAML, in a run's record.
_SETS = ("sets", "callbacks.forgetting.sets", "config.callbacks.forgetting.sets")


class CheckpointEvaluation(NamedTuple):
    """Results of `evaluate_checkpoint`."""

    report: dict[str, Any]
    """{model, base, device, precision, metrics: {base, model}, learning, forgetting, data}.

    Without a base model, `base` and `metrics.base` are None, and learning and forgetting are left
    out.
    """
    items: list[Item]
    """Items as a run writes them; the base model is step 0, the model step 1."""


def read_sets(path: Path) -> list[EvalSetConfig]:
    """Return the sets of a YAML: its `sets`, or the `forgetting` callback's in a run's YAML.

    A run's record, which has the run's overrides too, does in place of its YAML.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is not a YAML or has no sets, or a set is impossible.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        found = (OmegaConf.select(config, place) for place in _SETS)
        node = next((node for node in found if node is not None), None)
        sets: Any = None if node is None else OmegaConf.to_container(node, resolve=True)
    # OmegaConf raises OSError and AssertionError for a YAML that is a single value; ValueError
    # comes from bytes that are not text.
    except (
        *(OmegaConfBaseException, YAMLError, AssertionError),
        *(OSError, ValueError, RecursionError),
    ) as error:
        raise UserError(f"{path}: {one_line(error) or 'not a mapping'}") from error
    if not isinstance(sets, Mapping):
        raise UserError(f"{path} has neither `sets` nor `callbacks.forgetting.sets`")
    return parse_sets(sets)


def evaluate_checkpoint(
    path: Path | str, sets: Path | str, *, base: str | None = None
) -> CheckpointEvaluation:
    """Measure a model, and with a base model also its learning, forgetting and KL.

    Args:
        path: a Hugging Face folder, an adapter folder or a Composer checkpoint.
        sets: a YAML with `sets`, or a run's own YAML or record.
        base: the base model, a folder or a hub name. By default the one that the adapter names, or
            that the record beside the checkpoint names.

    Raises:
        FileNotFoundError: the model, or a set's file, does not exist.
        UserError: a model or a set cannot be loaded.
    """
    path, configs = Path(path), read_sets(Path(sets))
    with as_folder(path) as folder:
        adapted = is_adapter(folder)
        known = base if base or adapted else recorded_base(path)
        before = base_name(folder, known) if adapted or known else None
        tokenizer = load_tokenizer(folder, before or str(folder))
        tuned = None if adapted else _load(str(folder))
        base_model = None if before is None else _load(before)
        shape = tuned or base_model
        assert shape is not None
        built = build_sets(configs, tokenizer, shape.config.max_position_embeddings)
        start: dict[str, float] | None = None
        base_items: list[Item] = []
        reference: BaseStates | None = None
        with _precision():
            # The base model comes first because an adapter is then loaded into it.
            if base_model is not None:
                reference = BaseStates(lambda: nullcontext(base_model))
                reference.itself = base_model
                start, base_items = measure(built, base_model, reference)
                reference.itself = None
            if tuned is None:
                assert base_model is not None
                peft_model = load_adapter(base_model, str(folder)).eval()
                tuned = _inner(peft_model)
                assert reference is not None
                reference.base = adapters_off(peft_model)
            now, tuned_items = measure(built, tuned, reference)
    report = {
        "model": str(path),
        "base": before,
        "device": tuned.device.type,
        "precision": "amp_bf16" if tuned.device.type == "cuda" else "fp32",
        "metrics": {"base": start, "model": now},
        **({} if start is None else changes(configs, start, now)),
        "data": {eval_set.config.name: eval_set.description for eval_set in built},
    }
    steps = enumerate((base_items, tuned_items))
    return CheckpointEvaluation(
        report, [{"step": step, **item} for step, items in steps for item in items]
    )


def _load(name: str) -> SmolLM2ForCausalLM:
    model = load_model(name, SmolLM2ForCausalLM)
    if not torch.cuda.is_available():
        return model
    fuse_evaluation(model, not why_no_kernels())
    return model.to("cuda")  # pyright: ignore[reportArgumentType]


def _inner(model: PeftModel) -> SmolLM2ForCausalLM:
    inner = model.get_base_model()
    assert isinstance(inner, SmolLM2ForCausalLM)
    return inner


def _precision() -> Any:
    """Return the context that runs train in: bf16 autocast on a GPU, fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()


def write_evaluation(evaluation: CheckpointEvaluation, out: Path) -> None:
    """Write `evaluation.json` and `items.jsonl` to the folder `out`."""
    write_text(out / "evaluation.json", json.dumps(evaluation.report, indent=1) + "\n")
    lines = "".join(json.dumps(item) + "\n" for item in evaluation.items)
    write_text(out / "items.jsonl", lines)


def format_evaluation(report: Mapping[str, Any]) -> str:
    """Return the report as a table for the terminal."""
    start, now = report["metrics"]["base"], report["metrics"]["model"]
    rows = [("", "base", "model")]
    for name, value in now.items():
        rows.append((name, "" if start is None else f"{start[name]:.4f}", f"{value:.4f}"))
    for role in ("learning", "forgetting"):
        rows += [(f"{role}/{name}", "", f"{x:+.4f}") for name, x in report.get(role, {}).items()]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}} {base:>10} {model:>10}" for name, base, model in rows]
    if start is None:
        lines.append("the base model is unknown: pass --base for KL, learning and forgetting")
    return "\n".join(lines)
