"""The quickstart's runs: a base model, a grid of learning rates, more seeds, a report.

Everything uses what users have: `composer train.py`, sweep files, `foundry-ext compare`. Finished
runs are not repeated, so an interrupted quickstart continues where it stopped.
"""

import hashlib
import json
import os
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
RATE_KEY = "variables.learning_rate"
_BEGUN, _STAMP = "begun_from", "made_from"


def train_base(folder: Path = FOLDER) -> None:
    """Run `composer train.py yamls/quickstart/base.yaml`, unless its result is there.

    Training that was killed continues. A new base model or other data makes the existing runs
    worthless, so they are removed.

    Raises:
        ValueError: training failed or was stopped.
    """
    base = folder / "base"
    data = sorted((folder / "data").glob("*.jsonl"))
    stamp = _fingerprint(BASE_YAML, folder / "tokenizer" / "tokenizer.json", *data)
    if (base / _STAMP).is_file() and (base / _STAMP).read_text(encoding="utf-8") == stamp:
        print(f"{base}: already there, made by the same file from the same data")
        return
    begun = base / _BEGUN
    if not (begun.is_file() and begun.read_text(encoding="utf-8") == stamp):
        for name in ("base", "runs", "sweeps", "report*"):
            for stale in folder.glob(name):
                shutil.rmtree(stale)
        base.mkdir()
        begun.write_text(stamp, encoding="utf-8")
    launcher = [sys.executable, "-m", "composer.cli.launcher", "train.py", str(BASE_YAML)]
    # Without a terminal, a progress bar would print one line per step.
    bar = [] if sys.stderr.isatty() else ["progress_bar=false"]
    print(f"\ncomposer train.py {BASE_YAML}   (about three minutes on 2 cores)", flush=True)
    # Threads that spin while they wait make this ten times slower on a busy machine.
    patient = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = run_to_its_end([*launcher, *bar], patient)
    if code:
        raise ValueError(
            f"training the base model ended with exit code {code}, for the reason above; the same"
            " command continues where it stopped"
        )
    (base / _STAMP).write_text(stamp, encoding="utf-8")


def run_to_its_end(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit code, waiting for it even after Ctrl-C.

    A terminal's Ctrl-C reaches the command too, which saves before it ends. subprocess.run would
    kill it after a quarter of a second.
    """
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def _fingerprint(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fine_tune(seeds: Sequence[int], *, fast: bool, folder: Path = FOLDER) -> list[Path]:
    """Run the grid with the first seed, then its best with the others; return the runs' records.

    Args:
        fast: run only the middle learning rate with the first seed.

    Raises:
        ValueError: a run did not finish; the message names its log.
    """
    grid = read_grid()
    if fast:
        grid["parameters"][RATE_KEY] = {"values": ["middle"]}
    grid["parameters"]["seed"] = {"values": list(seeds[:1])}
    records = _sweep(grid, f"quickstart-grid-{seeds[0]}", folder)
    if fast or len(seeds) == 1:
        return records
    by_rate: dict[str, list[str]] = defaultdict(list)
    for config, rate in best_rates(records, grid["parameters"]["config"]["values"]).items():
        print(f"{config}: learns most at {RATE_KEY}={rate}; also run with seeds {seeds[1:]}")
        by_rate[rate].append(config)
    for rate, configs in sorted(by_rate.items()):
        again = {"config": configs, RATE_KEY: [rate], "seed": list(seeds[1:])}
        grid["parameters"] = {key: {"values": values} for key, values in again.items()}
        records += _sweep(grid, f"quickstart-{rate}-{'-'.join(map(str, seeds[1:]))}", folder)
    return records


def read_grid() -> dict[str, Any]:
    """Return the sweep file's content."""
    return yaml.safe_load(SWEEP_YAML.read_text(encoding="utf-8"))


def best_rates(records: Sequence[Path], configs: Sequence[str]) -> dict[str, str]:
    """Return for each YAML the learning rate that learned most, by its name in the YAML's grid."""
    from foundry_ext.comparison.learning_rates import best_learning_rate
    from foundry_ext.records.record import read_record

    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in records:
        record = read_record(path)
        by_method[record["method"]].append(record)
    best: dict[str, str] = {}
    for config in configs:
        grid = yaml.safe_load(Path(config).read_text(encoding="utf-8"))["variables"][
            "learning_rates"
        ]
        names = {float(value): name for name, value in grid.items()}
        best[config] = names[best_learning_rate(by_method[Path(config).stem]).learning_rate]
    return best


def _sweep(content: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Run `foundry-ext sweep` on the file, which is written beside the data for users to see."""
    from foundry_ext.sweeps.run import run_sweep

    path = folder / "sweeps" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "name": name}, sort_keys=False), encoding="utf-8")
    print(f"\nfoundry-ext sweep {path}", flush=True)
    outcomes = run_sweep(path, parallel=min(os.cpu_count() or 1, 4), retry_failed=True)
    unfinished = [outcome for outcome in outcomes if outcome.status != "finished"]
    if unfinished:
        logs = ", ".join(str(outcome.log) for outcome in unfinished)
        raise ValueError(f"{len(unfinished)} runs did not finish; see {logs}")
    return [outcome.record for outcome in outcomes]


def report(records: Sequence[Path], configs: Sequence[str], seed: int, out: Path) -> None:
    """Analyse each method's best run with `seed`, then compare all runs."""
    rates = best_rates(records, configs)
    names = {f"{Path(config).stem}-seed_{seed}-learning_rate_{rates[config]}" for config in configs}
    for record in records:
        if record.parent.name in names and not (record.parent / "analysis.json").is_file():
            _foundry_ext("analyse", record.parent / "hf")
    _foundry_ext("compare", *records, "--out", out)


def _foundry_ext(command: str, *arguments: Path | str) -> None:
    from foundry_ext.cli.main import main

    few = [*map(str, arguments[:1]), *(["..."] if len(arguments) > 4 else map(str, arguments[1:]))]
    print(f"\nfoundry-ext {command} {' '.join(few)}", flush=True)
    if main([command, *map(str, arguments)]) != 0:
        raise ValueError(f"{command} failed, for the reason above")


def show_base(folder: Path = FOLDER) -> None:
    """Print the base model's size, tokens, loss and throughput."""
    record = json.loads((folder / "base" / "record.json").read_text(encoding="utf-8"))
    losses = [
        next(value for name, value in entry["metrics"].items() if "CrossEntropy" in name)
        for entry in record["evaluations"]
    ]
    throughput, device = record["throughput"], record["environment"]["device"]
    print(
        f"base model: {record['model']['parameters'] / 1e6:.2f} M parameters,"
        f" {record['tokens']['real']:,} real tokens,"
        f" held-out loss {' -> '.join(f'{loss:.2f}' for loss in losses)} nats per token,"
        f" {throughput['real_tokens_per_second']:,.0f} real tokens/s on {device},"
        f" packs {100 * throughput['fill']:.2f} % full"
    )
