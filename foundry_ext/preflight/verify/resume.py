"""Stopped and resumed equals uninterrupted, by llm-foundry's own train command.

One run goes through; a second is thrown out of its half way, and a third, the same configuration
again, finds its checkpoint by autoresume. At every step documents, weights, the optimizer's state
and the random numbers leave a digest, so that where they part has a name.
"""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
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

from foundry_ext.preflight.verify.checks import Check

# Where not to the bit: a GPU adds up in an order of its own.
LOSS = 1e-3  # relative
WEIGHTS = 1e-3  # norm of the difference, of the norm
MOST_PACKS = 2  # of a global batch
MOST_ROWS = 1000
# They write files, evaluate or generate, and change nothing in training.
LEFT_OUT = (
    *("run_record", "forgetting", "text_samples", "hf_export", "hf_checkpointer"),
    *("packed_throughput", "speed_monitor", "lr_monitor", "memory_monitor", "runtime_estimator"),
)
PARTS = ("documents", "weights", "optimizer", "random numbers")
_WATCH = "verify_watch"


class Stopped(Exception):
    """Thrown where a power cut would come."""


@dataclass
class Watched:
    """What is seen of a run; one object outlives the trainers that write into it."""

    stop_before: int | None = None
    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    """step -> part -> digest, as the step begins."""


class Watch(Callback):
    """`verify_watch` in a configuration."""

    watched = Watched()

    def batch_start(self, state: Any, logger: Any) -> None:
        step = state.timestamp.batch.value
        if step == self.watched.stop_before:
            raise Stopped
        optimizers = [one.state for one in state.optimizers]
        trained = [p for p in state.model.parameters() if p.requires_grad]
        content = (state.batch, trained, optimizers, reproducibility.get_rng_state())
        self.watched.digests[step] = {
            part: digest(one) for part, one in zip(PARTS, content, strict=True)
        }


def digest(content: Any) -> str:
    """Of all tensors, numbers and texts in it, in order."""
    found = xxhash.xxh3_128()

    def add(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            tensor = one.detach().cpu().contiguous()
            found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(one, Mapping):  # an optimizer's keys are parameters
            for value in one.values():
                add(value)
        elif isinstance(one, list | tuple):
            for value in one:
                add(value)
        else:
            found.update(repr(one).encode())

    add(content)
    return found.hexdigest()


@dataclass(frozen=True)
class Ran:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    digests: dict[int, dict[str, str]]


def check_resume(
    config: dict[str, Any], notes: list[str], *, steps: int, most_tokens: int
) -> list[Check]:
    llmfoundry.registry.callbacks.register(_WATCH, func=Watch)
    half = steps // 2
    config = shortened(config, notes, steps=steps, every=half, most_tokens=most_tokens)
    with tempfile.TemporaryDirectory(prefix="foundry-ext-verify-") as folder, _quiet():
        whole = _run(config, Path(folder, "whole"))
        assert whole is not None
        _run(config, Path(folder, "stopped"), stop_before=half)
        resumed = _run(config, Path(folder, "stopped"))
    assert resumed is not None
    return compare(whole, resumed, half, steps)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of so few steps a warm-up that is a part of the run has none, which harms nothing here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*The warmup duration is 0")
        yield


def shortened(
    config: dict[str, Any], notes: list[str], *, steps: int, every: int, most_tokens: int
) -> dict[str, Any]:
    """The configuration for a few small steps that leave nothing behind."""
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
        notes.append(f"global batches of {MOST_PACKS} packs, not {packs}, where runs are resumed")
    config["train_loader"]["dataset"] = dataset = dict(config["train_loader"]["dataset"])
    _fewer_rows(dataset)
    capacity = dataset.get("pack_tokens") or dataset["max_seq_len"]
    if capacity > most_tokens:
        dataset["pack_tokens"] = most_tokens
        notes.append(f"packs of {most_tokens} tokens (--tokens), not {capacity}, there")
    if dataset["max_seq_len"] > most_tokens:
        dataset["max_seq_len"] = most_tokens
        for one in (dataset, *(dataset.get("datasets") or ())):
            if one.get("overlong") in ("error", "drop"):
                one["overlong"] = "truncate"
    return config


def _fewer_rows(dataset: dict[str, Any]) -> None:
    for one in (dataset, *(dataset.get("datasets") or ())):
        split = one.get("split")
        if one.get("hf_name") and split and "[" not in split:
            one["split"] = f"{split}[:{MOST_ROWS}]"


def _run(config: dict[str, Any], folder: Path, *, stop_before: int | None = None) -> Ran | None:
    """What a run was like; None where it was stopped."""
    Watch.watched = Watched(stop_before)
    try:
        trainer = train(OmegaConf.create({**copy.deepcopy(config), "save_folder": str(folder)}))
    except Stopped:
        return None
    trainer.close()
    state: Any = trainer.state
    (memory,) = (one for one in trainer.logger.destinations if isinstance(one, InMemoryLogger))
    named = state.model.named_parameters()
    return Ran(
        losses=[float(value) for _, value in memory.data["loss/train/total"]],
        weights={name: p.detach().cpu().clone() for name, p in named if p.requires_grad},
        digests=Watch.watched.digests,
    )


def compare(whole: Ran, resumed: Ran, half: int, steps: int) -> list[Check]:
    exact = not torch.cuda.is_available()
    name = f"resumed after step {half}, {', '.join(PARTS)} are as they were"
    if min(resumed.digests, default=-1) != half:
        said = f"it went on at step {min(resumed.digests, default='none')}, not at {half}"
        return [Check(name, False, said)]
    first, again = whole.digests[half], resumed.digests[half]
    parted = [part for part in PARTS if first.get(part) != again.get(part)]
    if parted == ["random numbers"] and not _draws(whole, half):
        parted = []
    said = f"{', '.join(parted)} differ at its first step" if parted else "to the bit"
    checks = [Check(name, not parted, said)]
    losses = list(zip(range(half, steps), whole.losses[half:], resumed.losses, strict=True))
    wrong = [one for one in losses if not _near(one[1], one[2], 0 if exact else LOSS)]
    said = f"{len(losses)} steps, {', '.join(f'{b:.6f}' for _, _, b in losses)}"
    if wrong:
        step, a, b = wrong[0]
        said = f"step {step + 1} of {steps}: {b:.9g}, uninterrupted {a:.9g}"
    how = "equal to the bit" if exact else f"within {LOSS:.0e}"
    checks.append(Check(f"losses after resuming, {how}", not wrong, said))
    apart = {key: _apart(value, resumed.weights[key]) for key, value in whole.weights.items()}
    worst = max(apart, key=lambda key: apart[key])
    how = "equal to the bit" if exact else f"within {WEIGHTS:.0e}"
    said = f"{len(apart)} trained tensors, {apart[worst]:.1e} apart at most" + (
        f", at {worst}" if apart[worst] else ""
    )
    passed = apart[worst] <= (0 if exact else WEIGHTS)
    return [*checks, Check(f"final weights, {how}", passed, said)]


def _draws(run: Ran, step: int) -> bool:
    """Whether a training step draws random numbers at all, as dropout does."""
    later = run.digests.get(step + 1, {})
    return later.get("random numbers") != run.digests[step]["random numbers"]


def _near(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance * abs(a)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return 0.0 if torch.equal(a, b) else float((a - b).norm() / a.norm().clamp(min=1e-9))
