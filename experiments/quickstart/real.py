"""SmolLM2-135M itself, two methods, a few minutes: `python -m experiments.quickstart --real`.

It shows that the real model trains and is measured here, and how its numbers read. It is far too
short for a conclusion about methods, and says so.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.quickstart.data import prepare
from experiments.quickstart.story import (
    foundry_ext,
    read_grid,
    run_sweep_file,
    write_with_rate,
)

CONFIGS = ("yamls/quickstart/full.yaml", "yamls/quickstart/lora.yaml")
# Usual ones for AdamW, not tuned: an adapter takes about ten times that of full fine-tuning.
RATES = {"full": 5e-5, "lora": 5e-4}
MODEL = Path("outputs/smollm2-135m-gsm8k/q4_1/model")
# Not the quickstart's, which removes what another base model made.
FOLDER = Path("outputs/quickstart-real")
# SmolLM2 has not been trained on the quickstart's problems of one step: it learns their form too.
FORGETTING = "library_loss"
# What differs from the quickstart's runs: the model, fewer steps, and fewer items, because this
# model is 130 times larger.
OVERRIDES = {
    "variables.quickstart": str(FOLDER),
    "model.pretrained_model_name_or_path": str(MODEL),
    "tokenizer.name": str(MODEL),
    "callbacks.run_record.experiment": "quickstart-real",
    "max_duration": "12ba",
    "eval_interval": "12ba",
    "save_interval": "6ba",
    "variables.pack_tokens": 1024,
    "callbacks.forgetting.sets.problems.max_documents": 64,
    "callbacks.forgetting.sets.one_step.max_documents": 64,
    "callbacks.forgetting.sets.library.max_documents": 16,
    "callbacks.forgetting.sets.problem_choice.max_items": 16,
    "callbacks.forgetting.sets.library_choice.max_items": 16,
}


def run() -> None:
    """Train, compare, and print what the runs show.

    Raises:
        ValueError: the weights cannot be made, or a run did not finish.
    """
    prepare(FOLDER)
    _make_model()
    records = _train()
    foundry_ext("compare", *records, "--out", FOLDER / "report", "--forgetting", FORGETTING)
    print("\n".join(conclusions(records)))


def _make_model() -> None:
    """Make the model's folder in a process of its own: the sweep forks its runs from this one."""
    command = [sys.executable, "experiments/smollm2-135m-gsm8k/weights.py", str(MODEL)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError("SmolLM2-135M's weights cannot be made, for the reason above")


def _train() -> list[Path]:
    print("\ntwo runs: about five minutes on two idle cores, 6 GB each", flush=True)
    folder = FOLDER / "sweeps" / "real"
    configs = [
        str(write_with_rate(Path(path), "real", RATES[Path(path).stem], folder, OVERRIDES))
        for path in CONFIGS
    ]
    parameters = {"config": {"values": configs}, "seed": {"values": [17]}}
    sweep = {**read_grid(), "parameters": parameters}
    return run_sweep_file(sweep, "quickstart-real", FOLDER, parallel=2)


def conclusions(records: Sequence[Path]) -> list[str]:
    """Return what these runs show and what they do not, as lines."""
    from foundry_ext.comparison.comparison import compare_runs
    from foundry_ext.comparison.report.wording import format_mean_and_interval
    from foundry_ext.comparison.runs import load_runs

    comparison = compare_runs(load_runs([str(path) for path in records]), forgetting=FORGETTING)
    lines = ["", "What these runs show, with 95 % intervals over items:"]
    for label, (run,) in comparison.chosen.items():
        changes = []
        for metric in (comparison.learning, comparison.forgetting):
            summary = comparison.summary(label, metric)
            value = format_mean_and_interval(metric, summary.mean, summary.interval)
            changes.append(f"{metric.role} on {metric.subject} {value} {metric.unit}")
        steps, rate = run.record["steps"], run.learning_rate
        lines.append(f"- {label} at {rate:g}, {steps} steps: {'; '.join(changes)}.")
    return [
        *lines,
        "What they do not show: which method is better. Each ran at one learning rate that was not",
        "tuned, under one seed, for a few steps, on generated problems and rounded weights. The",
        "report marks every such claim as one that cannot be told. experiments/smollm2-135m-gsm8k",
        "asks the question properly: make experiment-real DATA=FOLDER",
    ]
