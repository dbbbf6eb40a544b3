"""The quickstart's runs: a base model, a grid of learning rates, matched learning, a report.

Everything uses what users have: `composer train.py`, sweep files, `foundry-ext compare`. Finished
runs are not repeated, so an interrupted quickstart continues where it stopped.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from foundry_ext.comparison.learning_rates import learning_metric
from foundry_ext.comparison.matched_rates import match_learning_rates
from foundry_ext.records.record import read_record
from foundry_ext.utils.nested import put

FOLDER = Path("outputs/quickstart")
BASE_YAML = Path("yamls/quickstart/base.yaml")
SWEEP_YAML = Path("experiments/quickstart/sweep.yaml")
RATE_KEY = "variables.learning_rate"
# Of the learning of the method that learns least. Every rate learns the form of an answer, which is
# most of the learning; at 0.9 the rates would be so low that nothing is forgotten.
SHARE = 0.97
LINE_SETS = ("problems", "one_step")
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
        if base.exists():
            print(f"{folder}: made by another version or from other data; everything is made anew")
        for name in ("base", "runs", "sweeps", "report*"):
            for stale in folder.glob(name):
                shutil.rmtree(stale)
        base.mkdir()
        begun.write_text(stamp, encoding="utf-8")
    launcher = [sys.executable, "-m", "composer.cli.launcher", "train.py", str(BASE_YAML)]
    # Without a terminal, a progress bar would print one line per step.
    bar = [] if sys.stderr.isatty() else ["progress_bar=false"]
    print(f"composer train.py {BASE_YAML}", flush=True)
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


def run_grid(seed: int, *, fast: bool, folder: Path = FOLDER) -> list[Path]:
    """Run every method at every learning rate of its grid with one seed; return the runs' records.

    Args:
        seed: the runs' seed.
        fast: run only the middle learning rate.
        folder: the quickstart's folder.

    Raises:
        ValueError: a run did not finish; the message names its log.
    """
    grid = read_grid()
    if fast:
        grid["parameters"][RATE_KEY] = {"values": ["middle"]}
    grid["parameters"]["seed"] = {"values": [seed]}
    return run_sweep_file(grid, f"quickstart-grid-{seed}{'-fast' if fast else ''}", folder)


def run_matched(grid: Sequence[Path], seeds: Sequence[int], folder: Path = FOLDER) -> list[Path]:
    """Run every method with all seeds at the learning rate at which all methods learn the same.

    The rates come from the grid's runs. Each method's YAML is written again with its rate, so that
    one sweep runs all of them.

    Args:
        grid: records of the runs of the grid, with one seed.
        seeds: seeds to run, the grid's first.
        folder: the quickstart's folder.

    Raises:
        ValueError: no common level lies on the grids, or a run did not finish.
    """
    level, rates = match_learning_rates(_points(grid), share=SHARE)
    print(f"\nevery method learns {level:.3f} nats per token at these learning rates:")
    sweep = read_grid()
    configs = []
    for path in map(Path, sweep["parameters"]["config"]["values"]):
        rate = float(f"{rates[path.stem]:.3g}")
        print(f"  {path.stem}: {rate:g}")
        configs.append(
            write_with_rate(path, "matched", rate, folder / "sweeps" / f"matched-{seeds[0]}")
        )
    values = {"config": list(map(str, configs)), "seed": list(seeds)}
    sweep["parameters"] = {key: {"values": value} for key, value in values.items()}
    return run_sweep_file(sweep, f"quickstart-matched-{'-'.join(map(str, seeds))}", folder)


def write_with_rate(
    path: Path, name: str, rate: float, folder: Path, others: Mapping[str, Any] | None = None
) -> Path:
    """Write a method's YAML into `folder` with one learning rate, of this name; return its path.

    Args:
        path: the YAML.
        name: of the rate, and in the run's name.
        rate: the learning rate.
        folder: where to write.
        others: dotted key -> value of what else differs.
    """
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["variables"] |= {"learning_rates": {name: rate}, "learning_rate": name}
    config["run_name"] = f"{path.stem}-{name}_{rate:g}"
    for key, value in (others or {}).items():
        config = put(config, key, value)
    out = folder / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return out


def read_grid() -> dict[str, Any]:
    """Return the content of the sweep of the grid."""
    return yaml.safe_load(SWEEP_YAML.read_text(encoding="utf-8"))


def _points(paths: Sequence[Path]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each method, without runs that diverged."""
    records = [read_record(path) for path in paths]
    metric = learning_metric(records)
    points: dict[str, list[tuple[float, float]]] = {record["method"]: [] for record in records}
    for record in records:
        learned = record["evaluations"][-1]["learning"][metric]
        if isfinite(learned):
            points[record["method"]].append((float(record["learning_rate"]), learned))
    return {method: sorted(found) for method, found in points.items()}


def run_sweep_file(
    content: dict[str, Any], name: str, folder: Path, *, parallel: int = 4
) -> list[Path]:
    """Run `foundry-ext sweep` on the file, which is written beside the data for users to see."""
    from foundry_ext.sweeps.run import run_sweep

    path = folder / "sweeps" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "name": name}, sort_keys=False), encoding="utf-8")
    print(f"foundry-ext sweep {path}", flush=True)
    outcomes = run_sweep(path, parallel=min(os.cpu_count() or 1, parallel), retry_failed=True)
    unfinished = [outcome for outcome in outcomes if outcome.status != "finished"]
    if unfinished:
        logs = ", ".join(str(outcome.log) for outcome in unfinished)
        raise ValueError(f"{len(unfinished)} runs did not finish; see {logs}")
    return [outcome.record for outcome in outcomes]


def report(grid: Sequence[Path], matched: Sequence[Path], seed: int, out: Path) -> None:
    """Analyse the weights of one run per method, then compare all runs.

    The runs analysed have this seed, at the matched rates or, without such runs, at the grid's one.
    """
    for record in matched or grid:
        folder = record.parent
        if read_record(record)["seed"] == seed and not (folder / "analysis.json").is_file():
            foundry_ext("analyse", folder / "hf", "--sets", _write_line_sets(out.parent))
    at_matched = ["--matched", *matched] if matched else []
    foundry_ext("compare", *grid, "--out", out, *at_matched)


def _write_line_sets(folder: Path) -> Path:
    """Write the two sets measured between base and tuned weights: the losses of the trade-off."""
    config = OmegaConf.load(read_grid()["parameters"]["config"]["values"][0])
    sets: Any = OmegaConf.select(config, "callbacks.forgetting.sets")
    kept: dict[str, Any] = {
        name: OmegaConf.to_container(sets[name], resolve=True) for name in LINE_SETS
    }
    path = folder / "sweeps" / "line.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"sets": kept}, sort_keys=False), encoding="utf-8")
    return path


def foundry_ext(command: str, *arguments: Path | str) -> None:
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
