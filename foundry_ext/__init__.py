"""Packed fine-tuning and pretraining of SmolLM2 on llm-foundry and Composer.

The names in `__all__` are the public API; everything else is internal and may move. A name is
imported when it is first used, so `import foundry_ext` is quick and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that defines it
_PUBLIC = {
    "pack": "packing.algorithm",
    "Document": "packing.collator",
    "PackCollator": "packing.collator",
    "SmolLM2ForCausalLM": "models.smollm2",
    "load_config": "config.loading",
    "plan_run": "preflight.runs",
    "inspect_run": "preflight.runs",
    "verify_run": "preflight.runs",
    "run_sweep": "sweeps.run",
    "read_record": "records.record",
    "load_runs": "comparison.runs",
    "compare_runs": "comparison.comparison",
    "write_report": "comparison.report.report",
    "evaluate_checkpoint": "evaluation.standalone",
    "merge_adapter": "checkpoints.merge",
    "export_checkpoint": "checkpoints.export",
    "analyse_weights": "analysis.weights",
}

__all__ = [
    "Document",
    "PackCollator",
    "SmolLM2ForCausalLM",
    "analyse_weights",
    "compare_runs",
    "evaluate_checkpoint",
    "export_checkpoint",
    "inspect_run",
    "load_config",
    "load_runs",
    "merge_adapter",
    "pack",
    "plan_run",
    "read_record",
    "run_sweep",
    "verify_run",
    "write_report",
]

if TYPE_CHECKING:
    from foundry_ext.analysis.weights import analyse_weights
    from foundry_ext.checkpoints.export import export_checkpoint
    from foundry_ext.checkpoints.merge import merge_adapter
    from foundry_ext.comparison.comparison import compare_runs
    from foundry_ext.comparison.report.report import write_report
    from foundry_ext.comparison.runs import load_runs
    from foundry_ext.config.loading import load_config
    from foundry_ext.evaluation.standalone import evaluate_checkpoint
    from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
    from foundry_ext.packing.algorithm import pack
    from foundry_ext.packing.collator import Document, PackCollator
    from foundry_ext.preflight.runs import inspect_run, plan_run, verify_run
    from foundry_ext.records.record import read_record
    from foundry_ext.sweeps.run import run_sweep


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
