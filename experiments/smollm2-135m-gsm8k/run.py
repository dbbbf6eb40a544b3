"""Command of `make experiment-real`: prepares model and data, then runs the sweep of a stage.

    python experiments/smollm2-135m-gsm8k/run.py DATA --stage a

DATA is a folder with the benchmarks, or "hub" for the hub's weights and data. Finished runs are
copied to results/runs, and those in it are not run again.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from foundry_ext.cli.main import main as foundry_ext
from foundry_ext.utils.output import redact_output

HERE = Path("experiments/smollm2-135m-gsm8k")
SWEEPS = Path("outputs/smollm2-135m-gsm8k/sweeps")
RESULTS = HERE / "results" / "runs"
HUB = "hub"


def main(argv: Sequence[str] | None = None) -> int:
    stages = sorted(path.stem.removeprefix("stage-") for path in HERE.glob("stage-*.yaml"))
    parser = argparse.ArgumentParser(prog="run.py")
    parser.add_argument("data", metavar="DATA", help="a folder with the benchmarks, or hub")
    parser.add_argument("--stage", choices=stages, default="a")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, and start none")
    arguments = parser.parse_args(argv)
    # In a process of its own: the sweep forks its runs, so this one must not compute.
    prepare = [sys.executable, str(HERE / "prepare.py"), arguments.data]
    if code := subprocess.run(prepare, check=False).returncode:
        return code
    path = HERE / f"stage-{arguments.stage}.yaml"
    if arguments.data == HUB:
        path = with_hub(path)
    options = ["--parallel", str(min(os.cpu_count() or 1, 2)), "--yes", "--results", str(RESULTS)]
    command = ["sweep", str(path), *options, *(["--dry-run"] if arguments.dry_run else [])]
    print(f"foundry-ext {' '.join(command)}", flush=True)
    return foundry_ext(command)


def with_hub(path: Path) -> Path:
    """Write the sweep with the hub's weights and data, and return its path."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["name"] += "-hub"
    content["parameters"]["variables.weights"] = {"value": HUB}
    out = SWEEPS / f"{path.stem}-hub.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return out


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
