"""Compares a stopped and resumed run with an uninterrupted one.

llm-foundry's own train command runs three times: uninterrupted, stopped halfway, and resumed from
that checkpoint by autoresume. Documents, weights, optimizer state and random numbers are hashed at
every step, so that the first difference can be named.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llmfoundry.registry
import torch
import xxhash
from composer.core import Callback
from composer.loggers import InMemoryLogger
from composer.utils import reproducibility
from llmfoundry.command_utils import train
from omegaconf import OmegaConf

from foundry_ext.preflight.verify.checks import Check, largest, relative_distance

# Tolerances on a GPU, which sums in an order of its own. On a CPU equality is bitwise.
LOSS = 1e-3  # relative
WEIGHTS = 1e-3  # norm of the difference over the norm
MOST_PACKS = 2  # per global batch
MOST_ROWS = 1000
# These write files, evaluate or generate, and do not change training.
LEFT_OUT = (
    *("run_record", "forgetting", "text_samples", "hf_export", "hf_checkpointer"),
    *("packed_throughput", "speed_monitor", "lr_monitor", "memory_monitor", "runtime_estimator"),
)
PARTS = ("documents", "weights", "optimizer", "random numbers")
_WATCH = "verify_watch"


class SimulatedCrash(Exception):
    """Ends a run as a power cut would."""


@dataclass
class Digests:
    """Digests of one run, kept after its trainer is gone."""

    stop_before: int | None = None
    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    """{step: {part: digest}}, taken as the step begins."""


class StateHasher(Callback):
    """The callback `verify_watch`, which hashes the state at every step."""

    recorded = Digests()

    def batch_start(self, state: Any, logger: Any) -> None:
        step = state.timestamp.batch.value
        if step == self.recorded.stop_before:
            raise SimulatedCrash
        optimizers = [optimizer.state for optimizer in state.optimizers]
        trained = [p for p in state.model.parameters() if p.requires_grad]
        content = (state.batch, trained, optimizers, reproducibility.get_rng_state())
        self.recorded.digests[step] = {
            part: digest(value) for part, value in zip(PARTS, content, strict=True)
        }


def digest(content: Any) -> str:
    """Return the hash of all tensors, numbers and texts in `content`, in order."""
    hasher = xxhash.xxh3_128()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            tensor = node.detach().cpu().contiguous()
            hasher.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(node, Mapping):  # an optimizer's keys are parameters
            for value in node.values():
                add(value)
        elif isinstance(node, list | tuple):
            for value in node:
                add(value)
        else:
            hasher.update(repr(node).encode())

    add(content)
    return hasher.hexdigest()


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run: loss per step, trained weights, digests per step."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    digests: dict[int, dict[str, str]]


def check_resume(
    config: dict[str, Any], notes: list[str], *, steps: int, most_tokens: int
) -> list[Check]:
    """Train three times for a few steps and compare the resumed run with the uninterrupted one."""
    llmfoundry.registry.callbacks.register(_WATCH, func=StateHasher)
    half = steps // 2
    config = shortened(config, notes, steps=steps, every=half, most_tokens=most_tokens)
    with (
        tempfile.TemporaryDirectory(prefix="foundry-ext-verify-") as folder,
        warnings.catch_warnings(),
    ):
        # A warm-up of a tenth of the run rounds to zero steps in one this short.
        warnings.filterwarnings("ignore", message=r"\s*The warmup duration is 0")
        complete = _run(config, Path(folder, "complete"))
        assert complete is not None
        _run(config, Path(folder, "stopped"), stop_before=half)
        resumed = _run(config, Path(folder, "stopped"))
    assert resumed is not None
    return compare(complete, resumed, half, steps)


def shortened(
    config: dict[str, Any], notes: list[str], *, steps: int, every: int, most_tokens: int
) -> dict[str, Any]:
    """Return the configuration for a few small steps that write nothing outside `save_folder`."""
    config = copy.deepcopy(config)
    callbacks = config.get("callbacks") or {}
    config |= {
        "callbacks": {k: v for k, v in callbacks.items() if k not in LEFT_OUT} | {_WATCH: {}},
        "loggers": {"inmemory": {}},
        "run_name": "verify",
        "max_duration": f"{steps}ba",
        "save_interval": f"{every}ba",
        "save_num_checkpoints_to_keep": -1,
        "autoresume": True,
        "save_overwrite": False,
        "eval_interval": 0,
        "eval_first": False,
        "progress_bar": False,
        "log_to_console": False,
        "log_config": False,
        "python_log_level": None,
    }
    for key in ("eval_loader", "variables", "icl_tasks", "eval_gauntlet", "code_paths"):
        config.pop(key, None)
    packs = config["global_train_batch_size"]
    if packs > MOST_PACKS:
        config["global_train_batch_size"] = MOST_PACKS
        notes.append(f"resumed runs use global batches of {MOST_PACKS} packs, not {packs}")
    config["train_loader"]["dataset"] = dataset = dict(config["train_loader"]["dataset"])
    _fewer_rows(dataset)
    capacity = dataset.get("pack_tokens") or dataset["max_seq_len"]
    if capacity > most_tokens:
        dataset["pack_tokens"] = most_tokens
        notes.append(f"resumed runs use packs of {most_tokens} tokens (--tokens), not {capacity}")
    if dataset["max_seq_len"] > most_tokens:
        dataset["max_seq_len"] = most_tokens
        for source in (dataset, *(dataset.get("datasets") or ())):
            if source.get("overlong") in ("error", "drop"):
                source["overlong"] = "truncate"
    return config


def _fewer_rows(dataset: dict[str, Any]) -> None:
    for source in (dataset, *(dataset.get("datasets") or ())):
        split = source.get("split")
        if source.get("hf_name") and split and "[" not in split:
            source["split"] = f"{split}[:{MOST_ROWS}]"


def _run(
    config: dict[str, Any], folder: Path, *, stop_before: int | None = None
) -> RunResult | None:
    """Train one run; return None if it was stopped."""
    StateHasher.recorded = Digests(stop_before)
    try:
        trainer = train(OmegaConf.create({**copy.deepcopy(config), "save_folder": str(folder)}))
    except SimulatedCrash:
        return None
    trainer.close()
    state: Any = trainer.state
    (memory,) = (log for log in trainer.logger.destinations if isinstance(log, InMemoryLogger))
    named = state.model.named_parameters()
    return RunResult(
        losses=[float(value) for _, value in memory.data["loss/train/total"]],
        weights={name: p.detach().cpu().clone() for name, p in named if p.requires_grad},
        digests=StateHasher.recorded.digests,
    )


def compare(complete: RunResult, resumed: RunResult, half: int, steps: int) -> list[Check]:
    """Compare the state at step `half`, the later losses and the final weights."""
    exact = not torch.cuda.is_available()
    name = f"resumed after step {half}, {', '.join(PARTS)} are unchanged"
    if min(resumed.digests, default=-1) != half:
        detail = f"it continued at step {min(resumed.digests, default='none')}, not at {half}"
        return [Check(name, False, detail)]
    first, again = complete.digests[half], resumed.digests[half]
    parted = [part for part in PARTS if first.get(part) != again.get(part)]
    if parted == ["random numbers"] and not _draws(complete, half):
        parted = []
    detail = f"{', '.join(parted)} differ at its first step" if parted else "bitwise"
    checks = [Check(name, not parted, detail)]
    losses = list(zip(range(half, steps), complete.losses[half:], resumed.losses, strict=True))
    tolerance = 0 if exact else LOSS
    wrong = [(step, a, b) for step, a, b in losses if not math.isclose(a, b, rel_tol=tolerance)]
    detail = f"{len(losses)} steps, {', '.join(f'{b:.6f}' for _, _, b in losses)}"
    if wrong:
        step, a, b = wrong[0]
        detail = f"step {step + 1} of {steps}: {b:.9g}, uninterrupted {a:.9g}"
    how = "bitwise equal" if exact else f"within {LOSS:.0e}"
    checks.append(Check(f"losses after resuming, {how}", not wrong, detail))
    distances = {
        key: relative_distance(value, resumed.weights[key])
        for key, value in complete.weights.items()
    }
    where, worst = largest(distances)
    how = "bitwise equal" if exact else f"within {WEIGHTS:.0e}"
    detail = f"{len(distances)} trained tensors, largest difference {worst:.1e}"
    detail += f", at {where}" if worst else ""
    passed = worst <= (0 if exact else WEIGHTS)
    return [*checks, Check(f"final weights, {how}", passed, detail)]


def _draws(run: RunResult, step: int) -> bool:
    """Return whether a training step draws random numbers, as dropout does."""
    later = run.digests.get(step + 1, {})
    return later.get("random numbers") != run.digests[step]["random numbers"]
