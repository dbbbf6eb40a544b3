"""Run records and items as four methods would leave them, drawn from a known truth.

A method learns most at its learning rate `peak`, and forgets with the square of what it learns. A
seed shifts a run, and an item has its own level and its own response, so that intervals over seeds
and over items both have something to cover.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SETS = {
    "target": {"role": "learning", "type": "documents"},
    "source": {"role": "forgetting", "type": "documents", "kl": True},
    "arc_challenge": {"role": "forgetting", "type": "multiple_choice", "metric": "acc_norm"},
}
BASE = {"target": 5.6, "source": 3.1}
NUM_ITEMS = 120
STEPS = (0, 40, 80)


@dataclass(frozen=True)
class Truth:
    """True behaviour of a method: `most` learned, `cost` forgotten per unit learned squared."""

    most: float
    peak: float
    cost: float
    rates: tuple[float, ...]
    lost: float
    """Share of items lost at the end of a run with the middle learning rate."""
    peft: dict[str, Any] | None
    trainable: int
    speed: float


_LORA = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
}
_RATES = (5e-3, 1e-2, 2e-2)
TRUTHS = {
    "full": Truth(4.9, 2e-3, 0.16, (5e-4, 1e-3, 2e-3), 0.20, None, 1_050_000, 9200),
    "lora": Truth(3.9, 1e-2, 0.12, _RATES, 0.08, _LORA, 42_000, 8100),
    "dora": Truth(3.9, 1e-2, 0.12, _RATES, 0.08, {**_LORA, "use_dora": True}, 45_000, 5300),
    "rslora": Truth(
        *(4.3, 5e-3, 0.14, (2.5e-3, 5e-3, 1e-2), 0.12),
        *({**_LORA, "use_rslora": True}, 42_000, 8050),
    ),
}


def write_run(
    folder: Path,
    method: str,
    rate: float,
    seed: int,
    *,
    truth: Truth | None = None,
    noise: float = 0.03,
    num_items: int = NUM_ITEMS,
    **changes: Any,
) -> Path:
    """Write folder/<run>/record.json and items.jsonl; `changes` replace keys of the record.

    Returns:
        The run's folder.
    """
    truth = truth or TRUTHS[method]
    rng = np.random.default_rng([seed, int(rate * 1e7), num_items, *method.encode()])
    shift = rng.normal(scale=noise)
    curves = []
    items = []
    for step in STEPS:
        share = 1 - np.exp(-4 * step / STEPS[-1])
        learned = (truth.most * np.exp(-0.2 * np.log(rate / truth.peak) ** 2) + shift) * share
        forgot = truth.cost * learned**2 * (1 + 0.15 * np.log10(rate / truth.rates[1]))
        forgot += rng.normal(scale=noise / 2) * (step > 0)
        lines = _items(learned, forgot, truth.lost * learned / truth.most, rng, step, num_items)
        items += lines
        curves.append(_evaluation(step, lines, curves))
    name = f"{method}_{rate:g}_s{seed}"
    record = _record(name, method, rate, seed, truth, curves) | changes
    target = folder / name
    target.mkdir(parents=True)
    (target / "record.json").write_text(json.dumps(record))
    (target / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in items))
    return target


def write_sweep(
    folder: Path, *, seeds: Sequence[int] = (17, 18, 19), methods: Sequence[str] = tuple(TRUTHS)
) -> list[Path]:
    """Write runs of every method at three learning rates with one seed, the best with all seeds."""
    written = []
    for method in methods:
        truth = TRUTHS[method]
        written += [write_run(folder, method, rate, seeds[0]) for rate in truth.rates]
        written += [write_run(folder, method, truth.peak, seed) for seed in seeds[1:]]
    return written


def _items(learned, forgot, lost, rng, step, num_items) -> list[dict[str, Any]]:
    fixed = np.random.default_rng(5)  # the items themselves: the same in every run
    tokens = fixed.integers(20, 60, size=num_items)
    level = fixed.normal(scale=0.4, size=num_items)
    ease = fixed.random(num_items)
    lines = []
    for i in range(num_items):
        own = rng.normal(scale=0.05) * (step > 0)
        loss = BASE["target"] + level[i] - learned * (1 + 0.1 * level[i]) + own
        lines.append(_document(step, "target", i, loss, tokens[i]))
        loss = BASE["source"] + level[i] + forgot * (1 + 0.2 * level[i]) + own
        line = _document(step, "source", i, loss, tokens[i])
        line["kl"] = float(0.8 * forgot * (1 + 0.2 * level[i]) * tokens[i]) if step else 0.0
        lines.append(line)
        margin = ease[i] - 0.6 - lost + (rng.normal(scale=0.03) if step else 0)
        right = int(margin > 0)
        lines.append(
            {
                "step": step,
                "set": "arc_challenge",
                "item": str(i),
                "gold": 1,
                "logprobs": [-9.0, -8.0 if right else -10.0],
                "logprobs_norm": [-0.9, -0.8 if right else -1.0],
                "acc": right,
                "acc_norm": right,
            }
        )
    return lines


def _document(step: int, name: str, item: int, loss: float, tokens: int) -> dict[str, Any]:
    return {
        "step": step,
        "set": name,
        "item": str(item),
        "loss": float(loss * tokens),
        "tokens": int(tokens),
    }


def _evaluation(step: int, lines: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict:
    metrics = {}
    for name in SETS:
        own = [line for line in lines if line["set"] == name]
        if "tokens" in own[0]:
            total = sum(line["tokens"] for line in own)
            for kind in ("loss", "kl"):
                if kind in own[0]:
                    metrics[f"{name}/{kind}"] = sum(line[kind] for line in own) / total
        else:
            for kind in ("acc", "acc_norm"):
                metrics[f"{name}/{kind}"] = sum(line[kind] for line in own) / len(own)
    start = before[0]["metrics"] if before else metrics
    lost = {
        f"arc_challenge_{kind}": start[f"arc_challenge/{kind}"] - metrics[f"arc_challenge/{kind}"]
        for kind in ("acc", "acc_norm")
    }
    return {
        "step": step,
        "real_tokens": step * 2000,
        "metrics": metrics,
        "learning": {"target_loss": start["target/loss"] - metrics["target/loss"]},
        "forgetting": {
            "source_loss": metrics["source/loss"] - start["source/loss"],
            "source_kl": metrics["source/kl"],
            **lost,
            "mean_accuracy": lost["arc_challenge_acc_norm"],
        },
    }


def _record(name, method, rate, seed, truth: Truth, curves) -> dict[str, Any]:
    peft = truth.peft
    loader = {
        "name": "problems",
        "revision": None,
        "fingerprint": "0123456789abcdef",
        "documents": 4000,
        "tokens": 200_000,
        "counts": {"kept": 4000},
    }
    model: dict[str, Any] = {"pretrained_model_name_or_path": "base"}
    if peft:
        model["peft_config"] = peft
    scale = None
    if peft:
        scale = peft["lora_alpha"] / (peft["r"] ** (0.5 if peft.get("use_rslora") else 1))
    trained = truth.trainable
    seconds = curves[-1]["real_tokens"] / truth.speed
    return {
        "schema_version": 1,
        "run_name": name,
        "status": "finished",
        "error": None,
        "started": "2026-01-01T00:00:00.000+00:00",
        "updated": "2026-01-01T00:01:00.000+00:00",
        "ended": "2026-01-01T00:01:00.000+00:00",
        "pid": 1,
        "experiment": "synthetic",
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "config": {
            "run_name": name,
            "seed": seed,
            "model": model,
            "optimizer": {"name": "decoupled_adamw", "lr": rate},
            "max_duration": "80ba",
            "callbacks": {"forgetting": {"sets": SETS}},
        },
        "environment": {
            "python": "3.11.2",
            "packages": {"torch": "2.7.0"},
            "commit": "0123456",
            "dirty": False,
            "device": "synthetic device",
            "device_kind": "cpu",
            "world_size": 1,
        },
        "data": {"train": loader, "eval": dict.fromkeys(("target", "source"), loader)},
        "model": {
            "name": "base",
            "parameters": 1_050_000 + (trained if peft else 0),
            "trainable_parameters": trained,
            "rank": peft["r"] if peft else None,
            "alpha": peft["lora_alpha"] if peft else None,
            "effective_scale": scale,
            "target_modules": peft["target_modules"] if peft else None,
            "init": "default" if peft else None,
        },
        "steps": STEPS[-1],
        "documents": 3200,
        "tokens": {"slots": 163_840, "real": curves[-1]["real_tokens"], "loss": 90_000},
        "time": {"wall_seconds": seconds * 1.4, "train_seconds": seconds},
        "peak_memory_bytes": None,
        "throughput": {
            "real_tokens_per_second": truth.speed,
            "loss_tokens_per_second": truth.speed / 2,
            "fill": 0.99,
            "mfu": None,
        },
        "evaluations": curves,
        "items": "items.jsonl",
    }
