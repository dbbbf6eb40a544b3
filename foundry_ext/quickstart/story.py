"""The quickstart's runs: a base model, a grid of learning rates, the best with more seeds, a report.

Everything goes through what users have: `composer train.py`, sweep files, `foundry-ext compare`.
What is finished already is not run again, so an interrupted quickstart goes on where it stopped.
"""

import hashlib
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path("outputs/quickstart")
BASE_YAML = Path("yamls/quickstart/base.yaml")
SWEEP_YAML = Path("experiments/quickstart/sweep.yaml")
SEEDS = (17, 18, 19)
_STAMP = "made_from"


def train_base(folder: Path = FOLDER) -> None:
    """`composer train.py yamls/quickstart/base.yaml`, unless its result is there.

    A new base model makes the runs that started from another one worthless: they are removed.
    """
    base = folder / "base"
    stamp = _fingerprint(
        BASE_YAML, folder / "data" / "library_train.jsonl", folder / "tokenizer" / "tokenizer.json"
    )
    if (base / _STAMP).is_file() and (base / _STAMP).read_text() == stamp:
        print(f"{base}: there already, made by the same file from the same data")
        return
    for stale in ("base", "runs", "sweeps", "report"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    launcher = [sys.executable, "-m", "composer.cli.launcher", "train.py"]
    print(f"composer train.py {BASE_YAML}", flush=True)
    subprocess.run([*launcher, str(BASE_YAML)], check=True)
    (base / _STAMP).write_text(stamp)


def _fingerprint(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fine_tune(seeds: Sequence[int], *, fast: bool, folder: Path = FOLDER) -> list[Path]:
    """The folders of the runs: a grid under the first seed, then the best of it under the others.

    `fast`: the middle learning rate under the first seed alone.
    """
    from foundry_ext.compare.runs import best_learning_rate, load_runs

    grid = yaml.safe_load(SWEEP_YAML.read_text())
    rates = ["middle"] if fast else grid["parameters"]["variables.learning_rate"]["values"]
    configs = grid["parameters"]["config"]["values"]
    folders = _sweep("grid", configs, rates, seeds[:1], folder)
    if fast or len(seeds) == 1:
        return folders
    by_rate: dict[str, list[str]] = defaultdict(list)
    for config, rate in best_rates(folders).items():
        by_rate[rate].append(config)
    for rate, best in by_rate.items():
        folders += _sweep(f"seeds-{rate}", best, [rate], seeds[1:], folder)
    return folders
