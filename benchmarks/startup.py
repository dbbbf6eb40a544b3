"""Seconds from the command to the first step, part by part, in fresh processes.

    python -m benchmarks.startup --yaml yamls/smollm2_lora.yaml

This does what `python train.py YAML` does, in the same order, and times the parts. The YAML runs as
it is, except for what needs a network; see offline.py. A first process fills the caches and does
not count. Tokenisation then comes from its cache, as in every run on a data set except the first.
CPU seconds are those of the process and its threads, without the data loader's workers.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
YAML = Path("yamls/smollm2_lora.yaml")
LAUNCH = "foundry_ext.launch.train, YAML read and checked"
# In the order of the table; True for our own code.
PARTS = {
    "Python": False,
    LAUNCH: True,
    "import torch": False,
    "import composer": False,
    "import llmfoundry": False,
    "import foundry_ext": True,
    "tokenizer": False,
    "train loader: rows, tokens, plan": True,
    "model": True,
    "optimizer": False,
    "Trainer()": False,
    "fit to the end of the first step": False,
    "llm-foundry's train, all else": False,
}
_BUILDERS = {
    "build_tokenizer": "tokenizer",
    "build_dataloader": "train loader: rows, tokens, plan",
    "build_composer_model": "model",
    "build_optimizer": "optimizer",
    "Trainer": "Trainer()",
}


class Marks:
    """Wall and CPU seconds of consecutive parts, in the order in which they end."""

    def __init__(self, started: float):
        self.found: dict[str, list[float]] = {}
        self.last = started, 0.0

    def mark(self, part: str) -> None:
        now = time.perf_counter(), time.process_time()
        spent = self.found.setdefault(part, [0.0, 0.0])
        for index in range(2):
            spent[index] += now[index] - self.last[index]
        self.last = now

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            self.mark("llm-foundry's train, all else")
            result = function(*arguments, **keywords)
            self.mark(part)
            return result

        return wrapper


def child(path: Path, started: float) -> dict[str, list[float]]:
    """Start one run in this process and return [wall, CPU] seconds by part.

    Args:
        started: perf_counter of the parent just before it started this process; on Linux, all
            processes share this clock.
    """
    marks = Marks(started)
    marks.mark("Python")
    from foundry_ext.launch.train import check_all

    ((_, config),), _ = check_all([path], [])
    marks.mark(LAUNCH)
    import torch  # noqa: F401

    marks.mark("import torch")
    import composer

    marks.mark("import composer")
    # By name, because `llmfoundry.command_utils.train` as an attribute is the function.
    module = importlib.import_module("llmfoundry.command_utils.train")
    marks.mark("import llmfoundry")
    _import_registered(config)
    marks.mark("import foundry_ext")
    for name, part in _BUILDERS.items():
        setattr(module, name, marks.timed(part, getattr(module, name)))
    fit = composer.Trainer.fit

    def first_step(trainer: Any) -> None:
        marks.mark("llm-foundry's train, all else")
        fit(trainer)
        marks.mark("fit to the end of the first step")

    composer.Trainer.fit = first_step  # pyright: ignore
    trainer = module.train(config)
    trainer.close()
    return marks.found


def _import_registered(config: Any) -> None:
    """Import our modules that this YAML names, which the first builder would import otherwise."""
    from importlib.metadata import entry_points

    sections = ("callbacks", "loggers", "algorithms")
    names = {config.model.name, config.train_loader.name, config.optimizer.name}
    names |= {str(name) for section in sections for name in config.get(section) or ()}
    kinds = ("models", "dataloaders", "callbacks", "callbacks_with_config", "loggers", "optimizers")
    for kind in kinds:
        for entry in entry_points(group=f"llmfoundry_{kind}"):
            if entry.name in names and entry.value.startswith("foundry_ext."):
                entry.load()


def measure(path: Path, runs: int) -> dict[str, dict[str, float]]:
    """Return the medians of each part's wall and CPU seconds over fresh processes."""
    found = [_start(path) for _ in range(runs + 1)][1:]
    return {
        part: {
            clock: statistics.median(one.get(part, [0.0, 0.0])[index] for one in found)
            for index, clock in enumerate(("wall", "cpu"))
        }
        for part in PARTS
    }


def _start(path: Path) -> dict[str, list[float]]:
    code = "import sys; from benchmarks.startup import answer; answer(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(path), str(time.perf_counter())]
    result = path.with_suffix(".json")
    for name in ("record.json", "metrics.jsonl"):  # of the start before, which none may replace
        path.with_name(name).unlink(missing_ok=True)
    done = subprocess.run(
        [*command, str(result)], cwd=ROOT, env=os.environ, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"the start failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def answer(path: str, started: str, result: str) -> None:
    """Write the seconds of one start as JSON; called in the child process."""
    Path(result).write_text(json.dumps(child(Path(path), float(started))), encoding="utf-8")


def as_markdown(parts: dict[str, dict[str, float]]) -> str:
    lines = ["| part | wall s | CPU s | ours |", "|---|---|---|---|"]
    for part, spent in parts.items():
        mine = "yes" if PARTS[part] else ""
        lines.append(f"| {part} | {spent['wall']:.2f} | {spent['cpu']:.2f} | {mine} |")
    for label, chosen in (
        ("**all**", list(parts)),
        ("**of that ours**", [part for part in parts if PARTS[part]]),
    ):
        sums = [sum(parts[part][clock] for part in chosen) for clock in ("wall", "cpu")]
        lines.append(f"| {label} | {sums[0]:.2f} | {sums[1]:.2f} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("--yaml", type=Path, default=YAML)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    from omegaconf import OmegaConf

    from benchmarks.machine import as_line, describe_machine
    from benchmarks.offline import offline_config

    with tempfile.TemporaryDirectory() as folder:
        config = offline_config(
            options.yaml, Path(folder), steps=1, overrides=options.overrides
        )  # fmt: skip
        path = Path(folder, "run.yaml")
        OmegaConf.save(OmegaConf.create(config), path)
        parts = measure(path, options.runs)
    machine = describe_machine("cpu")
    print(f"{as_line(machine)}; {options.yaml.name} {' '.join(options.overrides)}\n")
    print(as_markdown(parts))
    if options.json:
        found = {"machine": machine, "yaml": str(options.yaml), "parts": parts}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
