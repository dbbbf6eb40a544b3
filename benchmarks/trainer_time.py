"""Overhead of Composer per step: a shipped YAML through the trainer against its bare core.

    python -m benchmarks.trainer_time --yaml yamls/smollm2_full.yaml

The YAML trains as it is, except for what needs a network; see offline.py. Between its steps, the
core (only forward, backward and the same optimizer) trains a second model, built from the same
YAML, on the same packs. The two alternate, A B A B, and the overhead is computed pair by pair. On a
CPU, time is the process's CPU time and the precision is fp32. On a GPU, it is wall time between
synchronisations. `key=value` arguments override the YAML, as for train.py. On a CPU, keep the packs
small.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import llmfoundry.registry
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from llmfoundry.command_utils import train
from llmfoundry.utils.builders import build_composer_model, build_optimizer, build_tokenizer
from omegaconf import OmegaConf

from benchmarks.machine import as_line, describe_machine
from benchmarks.measure import STEPS_A_SAMPLE, synchronize
from benchmarks.offline import offline_config
from benchmarks.trainer_parts import CORE, HostWaits, Parts
from benchmarks.workloads import LENGTHS
from foundry_ext.packing.batch import Pack, split_batch
from foundry_ext.training.loggers.metrics_file import read_metrics

YAML = Path("yamls/smollm2_full.yaml")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[Sequence[Pack]], None]


class Core:
    """The YAML's model and optimizer without a trainer; a call takes one optimizer step."""

    def __init__(self, config: dict[str, Any]):
        config = deepcopy(config)
        torch.manual_seed(config["seed"])
        tokenizer = build_tokenizer(config["tokenizer"]["name"], config["tokenizer"]["kwargs"])
        model, optimizer = config["model"], config["optimizer"]
        self.built: Any = build_composer_model(model.pop("name"), model, tokenizer)
        self.keys = self.built.model_forward_args
        self.model = self.built.to(DEVICE).train().model
        self.optimizer = build_optimizer(self.built, optimizer.pop("name"), optimizer)
        self.microbatch = config["device_train_microbatch_size"]
        self.bf16 = config["precision"] == "amp_bf16"

    def __call__(self, packs: Sequence[Pack]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(pack["num_loss_tokens"] for pack in packs)
        for pack in split_batch(packs, self.microbatch):
            given = {
                key: value.to(DEVICE, non_blocking=True) if torch.is_tensor(value) else value
                for key, value in pack.items()
                if key in self.keys
            }
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
                loss = self.model(**given).loss
            (loss * (pack["num_loss_tokens"] / total)).backward()
        self.optimizer.step()


class Probe(Callback):
    """Callback that times blocks of the trainer's steps, and then the core's on the same packs.

    The first block is a warm-up. The last step is not timed; its waits are counted.
    """

    core: Step
    block: int
    steps: int

    def __init__(self):
        self.parts = Parts(_clock)
        self.waits = HostWaits(DEVICE)
        self.packs: list[Sequence[Pack]] = []
        self.blocks: list[dict[str, float]] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self.parts.watch(state, logger, leave_out=self)
        self._go_on()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Count the step and, at a block's end, time the core; this is the step's last event."""
        done = state.timestamp.batch.value
        if done > self.block + self.steps:
            self.waits.__exit__(None, None, None)
            return
        self.packs.append(state.batch)
        if len(self.packs) < self.block:
            return
        synchronize(DEVICE)
        took = {"trainer": _clock() - self.clock, "wall": time.perf_counter() - self.wall}
        self.parts.on = False
        start = _clock()
        for packs in self.packs:
            self.core(packs)
        synchronize(DEVICE)
        took["core"] = _clock() - start
        took["tokens"] = sum(pack["num_tokens"] for packs in self.packs for pack in packs)
        self.blocks.append(took)
        self.packs, self.parts.on = [], True
        if done == self.block:
            self.parts.seconds.clear()  # kernels loaded and compiled
        if done == self.block + self.steps:
            self.parts.restore()
            self.waits.__enter__()
        self._go_on()

    def _go_on(self) -> None:
        self.clock, self.wall = _clock(), time.perf_counter()


def _clock() -> float:
    return time.perf_counter() if DEVICE == "cuda" else time.process_time()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    block = STEPS_A_SAMPLE[DEVICE]
    steps = -(-options.steps // block) * block
    config = offline_config(
        options.yaml,
        folder,
        model=options.model,
        lengths=options.lengths,
        steps=block + steps + 1,
        overrides=options.overrides,
        keep_wandb=options.wandb,
    )
    if options.wandb:
        os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(folder))
    config["callbacks"]["probe"] = {}
    made = type("Measured", (Probe,), {"core": Core(config), "block": block, "steps": steps})
    llmfoundry.registry.callbacks.register("probe", func=made)
    trainer = train(OmegaConf.create(config))
    (probe,) = [one for one in trainer.state.callbacks if isinstance(one, Probe)]
    trainer.close()
    window = config["callbacks"]["packed_throughput"].get("window_size", 20)
    logged = read_metrics(folder / "metrics.jsonl")["throughput/real_tokens_per_sec"]
    return {
        "yaml": str(options.yaml),
        "overrides": options.overrides,
        "model": config["model"]["pretrained_model_name_or_path"],
        "precision": config["precision"],
        "lengths": options.lengths,
        "steps": steps,
        "machine": describe_machine(DEVICE),
        **summary(probe, window=window, logged=logged[block + steps]),
    }


def summary(probe: Probe, *, window: int, logged: float) -> dict[str, Any]:
    """Return the figures; `logged` is the callback's tokens/s over its last `window` batches."""
    timed, block = probe.blocks[1:], probe.block
    # The callback ignores the process's first batch, which is the first block if blocks have one.
    same = (timed if block == 1 else probe.blocks)[-(window // block) :]
    counted = sum(one["tokens"] for one in same) / sum(one["wall"] for one in same)
    ratios = sorted(one["trainer"] / one["core"] - 1 for one in timed)
    trainer, core = (
        statistics.median(one[name] / block for one in timed) for name in ("trainer", "core")
    )
    parts = {name: seconds / probe.steps for name, seconds in probe.parts.seconds.items()}
    whole = sum(one["trainer"] for one in timed) / probe.steps
    parts["Composer's loop, all else"] = whole - sum(parts.values())
    return {
        "seconds": {"trainer": trainer, "core": core},
        "tokens_per_step": sum(one["tokens"] for one in timed) / probe.steps,
        "overhead": {
            "median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]
        },
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "outside_the_core": 1 - sum(parts.get(name, 0.0) for name in CORE) / whole,
        "throughput": {"logged": logged, "counted": counted, "ratio": logged / counted},
        "host_waits": dict(probe.waits.places.most_common()),
    }  # fmt: skip


def as_markdown(result: dict[str, Any]) -> str:
    seconds, overhead, throughput = (result[key] for key in ("seconds", "overhead", "throughput"))
    kind = "waits for the GPU" if DEVICE == "cuda" else "reads of a tensor's value"
    lines = [
        f"{as_line(result['machine'])}; {Path(result['yaml']).name}, {result['model']},"
        f" {result['precision']}, {result['tokens_per_step']:,.0f} tokens per step,"
        f" {result['steps']} steps",
        "",
        "| trainer, ms per step | core, ms per step | overhead (least-most of the pairs) |"
        " not in forward, backward, optimizer | callback's tokens/s over the benchmark's |",
        "|---|---|---|---|---|",
        f"| {1000 * seconds['trainer']:,.1f} | {1000 * seconds['core']:,.1f} |"
        f" {100 * overhead['median']:.1f} % ({100 * overhead['least']:.1f} to"
        f" {100 * overhead['most']:.1f}) | {100 * result['outside_the_core']:.1f} % |"
        f" {throughput['logged']:,.1f} / {throughput['counted']:,.1f} ="
        f" {throughput['ratio']:.3f} |",
        "",
        "| part | ms per step | |",
        "|---|---|---|",
    ]
    whole = sum(result["parts"].values())
    for name, took in result["parts"].items():
        lines.append(f"| {name} | {1000 * took:.2f} | {100 * took / whole:.2f} % |")
    lines += ["", f"{sum(result['host_waits'].values())} {kind} per step:", ""]
    lines += [f"- {count} x {place}" for place, count in result["host_waits"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("--yaml", type=Path, default=YAML)
    parser.add_argument("--model", help="a shipped shape instead of the YAML's model")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--lengths", default="a", choices=sorted(LENGTHS))
    parser.add_argument("--wandb", action="store_true", help="log to W&B too, offline")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(as_markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
