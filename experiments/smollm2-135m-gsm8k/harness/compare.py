"""ARC-challenge and WinoGrande by `foundry-ext eval` beside lm-evaluation-harness, item by item.

    python experiments/smollm2-135m-gsm8k/harness/compare.py DATA

DATA is a folder with arc_challenge.jsonl and winogrande.jsonl, itself or in its eval/. What
outputs/ already has of either tool is not measured again. Writes items.jsonl and results.json
beside this file (numbers only), and prints the tables of README.md.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundry_ext.evaluation.rows import read_rows
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError

HERE = Path(__file__).parent
OUTPUTS = Path("outputs/smollm2-135m-gsm8k")
OUT = OUTPUTS / "harness"  # sets.yaml and tasks/ name it too
METRICS = {"arc_challenge": ("acc", "acc_norm"), "winogrande": ("acc",)}
PACKAGES = ("lm_eval", "torch", "transformers")

Item = Mapping[str, Any]
"""{set, item, gold, characters, ours, harness}: the lengths of the choices, and the log-probability
of each choice by either tool, in nats."""


def write_rows(data: Path) -> None:
    """Write the rows of both tools: the harness reads DATA's own, and its tasks add "Answer:".

    Raises:
        UserError: DATA does not have a file.
    """
    for task in METRICS:
        paths = [data / f"{task}.jsonl", data / f"eval/{task}.jsonl"]
        source = next((path for path in paths if path.is_file()), None)
        if source is None:
            raise UserError(f"{paths[0]} does not exist; ../data.py says where it comes from")
        for folder in ("rows", "ours"):
            (OUT / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, OUT / "rows" / source.name)
        rows = map(with_answer, read_rows(str(source)))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(OUT / "ours" / source.name, text)


def with_answer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a question as the experiment's runs word it (../data.py), other rows as they are."""
    return {**row, "query": f"{row['query']}\nAnswer:"} if "query" in row else row


def check_inputs(model: Path) -> dict[str, str]:
    """Return the digests of model and rows.

    Raises:
        UserError: what outputs/ has was measured on others.
    """
    files = [model / "model.safetensors", *sorted((OUT / "rows").glob("*.jsonl"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    known = OUT / "inputs.json"
    if not known.is_file():
        write_text(known, json.dumps(digests, indent=1) + "\n")
    elif json.loads(known.read_text(encoding="utf-8")) != digests:
        raise UserError(f"{OUT} was measured on another model or other rows; remove it")
    return digests


def measure(model: Path) -> None:
    """Run both tools over all items in fp32 on the CPU, each unless its results are there."""
    commands = {
        "ours/items.jsonl": [
            *("foundry_ext.cli", "eval", str(model)),
            *("--sets", str(HERE / "sets.yaml"), "--out", str(OUT / "ours")),
        ],
        "lm_eval/*/results_*.json": [
            *("lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"),
            *("--model_args", f"pretrained={model},dtype=float32"),
            *("--tasks", ",".join(f"{task}_local" for task in METRICS)),
            *("--include_path", str(HERE / "tasks")),
            *("--log_samples", "--output_path", str(OUT / "lm_eval")),
        ],
    }
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for pattern, command in commands.items():
        if found := sorted(OUT.glob(pattern)):
            print(f"{found[-1]} is there; remove it to measure again", flush=True)
        elif subprocess.run([sys.executable, "-m", *command], env=no_gpu, check=False).returncode:
            raise UserError(f"{command[0]} failed, for the reason above")


def read_items() -> list[Item]:
    """Return the items of both tools, joined.

    Raises:
        UserError: one of them has other items, or another right answer.
    """
    measured = read_rows(str(OUT / "ours/items.jsonl"))
    items = []
    for task in METRICS:
        ours = [item for item in measured if item["set"] == task]
        samples = sorted(read_rows(str(_samples(task))), key=lambda sample: sample["doc_id"])
        rows = read_rows(str(OUT / "rows" / f"{task}.jsonl"))
        golds = [[int(each["gold"]) for each in some] for some in (ours, rows)]
        golds.append([int(sample["doc"]["gold"]) for sample in samples])
        if not golds[0] == golds[1] == golds[2]:
            raise UserError(f"{OUT}: the items of {task} are not of the same rows; remove it")
        for index, (item, sample, row) in enumerate(zip(ours, samples, rows, strict=True)):
            # WinoGrande's options share the scored text.
            texts = row.get("choices") or [row["continuation"]] * len(row["context_options"])
            theirs = [float(response[0][0]) for response in sample["resps"]]
            items.append(
                {
                    **{"set": task, "item": index, "gold": row["gold"]},
                    "characters": [len(text) for text in texts],
                    "ours": [round(value, 6) for value in item["logprobs"]],
                    "harness": [round(value, 6) for value in theirs],
                }
            )
    return items


def _samples(task: str) -> Path:
    """Return the harness's newest file of a task's items."""
    return max((OUT / "lm_eval").glob(f"*/samples_{task}_local_*.jsonl"))


def summarise(items: Sequence[Item]) -> dict[str, Any]:
    """Return {set: items, differences in nats, and per metric what each tool finds}."""
    summary = {}
    for task, metrics in METRICS.items():
        chosen = [item for item in items if item["set"] == task]
        differences = np.concatenate([np.subtract(i["ours"], i["harness"]) for i in chosen])
        summary[task] = {
            "items": len(chosen),
            "choices": len(differences),
            "largest_difference": round(float(np.abs(differences).max()), 6),
            "mean_difference": round(float(np.abs(differences).mean()), 7),
            **{metric: _accuracies(chosen, metric) for metric in metrics},
        }
    return summary


def _accuracies(items: Sequence[Item], metric: str) -> dict[str, Any]:
    """Return each tool's accuracy, and how often they choose otherwise.

    The smallest margin between an item's two best choices says how far a decision is from changing.
    Choices of one text tie exactly, and both tools then take the first.
    """
    choices, margins = {}, []
    for tool in ("ours", "harness"):
        divisors = [item["characters"] if metric == "acc_norm" else 1 for item in items]
        scores = [np.array(item[tool]) / by for item, by in zip(items, divisors, strict=True)]
        choices[tool] = np.array([each.argmax() for each in scores])
        margins.append([float(np.diff(np.sort(each)[-2:])[0]) for each in scores])
    golds = np.array([item["gold"] for item in items])
    shares = {tool: float(np.mean(chosen == golds)) for tool, chosen in choices.items()}
    variance = shares["harness"] * (1 - shares["harness"]) / len(items)
    return {
        **{tool: round(share, 6) for tool, share in shares.items()},
        "standard_error": round(variance**0.5, 6),
        "differing_choices": int(np.sum(choices["ours"] != choices["harness"])),
        "ties": sum(margin == 0 for margin in margins[0]),
        "smallest_margin": round(min(margin for margin in np.ravel(margins) if margin > 0), 8),
    }


def tables(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of README.md's tables."""
    lines = [
        "| | `foundry-ext eval` | harness | standard error | other choice | least margin | ties |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, metrics in METRICS.items():
        for metric in metrics:
            found = summary[task][metric]
            shares = (f"{100 * found[key]:.2f} %" for key in ("ours", "harness", "standard_error"))
            lines.append(
                f"| {task}, `{metric}` | {' | '.join(shares)} | {found['differing_choices']} of"
                f" {summary[task]['items']} | {found['smallest_margin']:.1e} | {found['ties']} |"
            )
    lines += ["", "| log-probabilities | choices | largest difference, nats | mean difference |"]
    lines.append("|---|---|---|---|")
    for task in METRICS:
        found = summary[task]
        sizes = (f"{found[key]:.1e}" for key in ("largest_difference", "mean_difference"))
        lines.append(f"| {task} | {found['choices']} | {' | '.join(sizes)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare.py")
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder with the two files")
    parser.add_argument("--model", type=Path, default=OUTPUTS / "q4_1/model", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        write_rows(arguments.data)
        digests = check_inputs(arguments.model)
        measure(arguments.model)
        items = read_items()
    except (UserError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    summary = summarise(items)
    results = {
        "sha256": digests,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "chat_template": False,
        **summary,
    }
    write_text(
        HERE / "items.jsonl",
        "".join(json.dumps(item, separators=(",", ":")) + "\n" for item in items),
    )
    write_text(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    print("\n".join(tables(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
