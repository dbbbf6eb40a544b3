"""Sweeps of stand-in programs, which write records like runs in a tenth of a second."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundry_ext.config.run_name import SWEEP_VARIABLES
from foundry_ext.sweeps.run import run_sweep

ROOT = Path(__file__).parents[2]
RUN_YAML = """
variables:
  folder: outputs/${run_name}
  learning_rates: {low: 1.0e-4, high: 1.0e-3}
  learning_rate: low
  seconds: 0.1
  behaviour: good
run_name: NAME
seed: 17
max_seq_len: 32
model: {name: smollm2_packed, pretrained_model_name_or_path: smollm2-135m}
tokenizer: {name: tok}
train_loader: {name: packed_finetuning, dataset: {pack_tokens: 64}}
optimizer: {name: decoupled_adamw, lr: "${variables.learning_rates.${variables.learning_rate}}"}
scheduler: {name: constant}
max_duration: 10ba
global_train_batch_size: 4
device_train_microbatch_size: 1
callbacks:
  run_record: {path: "${variables.folder}/record.json", experiment: stand-in}
  forgetting: {sets: {source: {role: forgetting}, target: {role: learning}}}
"""
# Says in `starts` that it runs and in `ends` that it finished; in `overlaps` if another one of its
# run is there too. Behaviours: good, old (a record of an earlier version), fail (until the file
# `mended` is there), silent (no record), refused, stubborn (deaf to Ctrl-C).
PROGRAM = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
from omegaconf import OmegaConf
from foundry_ext.config.loading import load_config, record_path, split_arguments

files, overrides = split_arguments(sys.argv[1:])
config = load_config(files[0], overrides)
path = record_path(config)
path.parent.mkdir(parents=True, exist_ok=True)

def note(name, text=""):
    with (path.parent / name).open("a") as stream:
        print(os.getpid(), text, file=stream)

def record(status, **more):
    content = {"schema_version": 1, "status": status, "pid": os.getpid(),
               "config": OmegaConf.to_container(config, resolve=True), **more}
    if behaviour != "old":  # records of earlier versions do not have it
        content["defaults"] = {"optimizer.weight_decay": 1e-5, "seed": 17}
    path.with_suffix(".tmp").write_text(json.dumps(content))
    path.with_suffix(".tmp").replace(path)

alone = (path.parent / "alone").open("w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("overlaps")
note("starts", json.dumps({k: v for k, v in os.environ.items()
                           if k in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK")}))
note("attention", os.environ.get("FOUNDRY_EXT_CPU_ATTENTION"))
behaviour = config.variables.behaviour
print("the log of", config.run_name)
if behaviour == "refused":
    sys.exit("train.py: error: a.yaml: unknown key, optimizer.lrr")
if behaviour == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if behaviour != "silent":
    record("running")
try:
    time.sleep(config.variables.seconds)
except KeyboardInterrupt:
    record("failed", error="KeyboardInterrupt: ")
    raise
if behaviour == "fail" and not Path("mended").exists():
    record("failed", error="ValueError: planted")
    sys.exit(3)
if behaviour != "silent":
    note("ends")
    record("finished", time={"wall_seconds": 2.0}, tokens={"real": 1000}, evaluations=[
        {"metrics": {"target/loss": 1.25}}])
"""
LIGHT = "import os; os.write(1, b'ready')"  # a fork server's preloaded.py
CODE = """
import sys
from foundry_ext.cli.main import main
from foundry_ext.sweeps.fork_launcher import ForkLauncher
ForkLauncher.PRELOAD = "preloaded"
{more}
sys.exit(main("sweep sweep.yaml --launcher {launcher} --parallel 2 --yes".split()))
"""


def write_sweep(folder: Path, parameters: dict[str, Any], **more: Any) -> Path:
    """Write a.yaml, b.yaml, train.py and a sweep over them; return the sweep's path."""
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text(RUN_YAML.replace("NAME", name))
    (folder / "train.py").write_text(textwrap.dedent(PROGRAM))
    content = {
        "program": "train.py",
        "method": "grid",
        "name": "stand-in",
        "command": ["${interpreter}", "${program}", "${args_no_hyphens}"],
        "parameters": {"config": {"values": ["a.yaml", "b.yaml"]}, **parameters},
        **more,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the current folder, outside of any sweep and with all devices."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in (*SWEEP_VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def start_sweep(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start `foundry-ext sweep sweep.yaml ...` in `folder`, with its output as text."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "foundry_ext.cli.main", "sweep", "sweep.yaml", *options],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_light(folder: Path, launcher: str = "fork", more: str = "") -> subprocess.Popen[str]:
    """`foundry-ext sweep sweep.yaml --launcher fork --parallel 2 --yes`, with the light server."""
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(launcher=launcher, more=more)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def server_of(sweep: int) -> int:
    children = Path(f"/proc/{sweep}/task/{sweep}/children").read_text().split()
    (server,) = [
        int(pid) for pid in children if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return server


def lines(folder: Path, run: str, name: str) -> list[str]:
    """Return the lines that a run's stand-in wrote to the file `name`."""
    path = folder / "outputs" / run / name
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def run_and_kill(
    folder: Path, start: Callable[[], subprocess.Popen[str]], victims: Callable[[int], list[int]]
) -> None:
    """Start the sweep and kill it and its `victims` after its first output, five times. Then let it
    end, which must succeed.
    """
    state = folder / "outputs/sweeps/stand-in/state.json"
    rng = random.Random(5)
    out, kills = "", 0
    while True:
        before = changed_at(state)
        sweep = start()
        if kills < 5:
            wait_for(lambda p=sweep, t=before: p.poll() is not None or changed_at(state) > t)
        try:
            out, _ = sweep.communicate(timeout=rng.uniform(0, 0.5) if kills < 5 else 60)
            break
        except subprocess.TimeoutExpired:
            for pid in [sweep.pid, *victims(sweep.pid)]:
                os.kill(pid, signal.SIGKILL)
            sweep.communicate()
            kills += 1
    assert sweep.returncode == 0, out
    assert "6 of 6 runs finished" in out
    assert kills >= 2


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def names(folder: Path) -> list[str]:
    """Return the names of the runs that have a folder."""
    found = (folder / "outputs").glob("*")
    return sorted(path.name for path in found if path.name != "sweeps")


class Said(list[str]):
    """Lines that a sweep printed."""

    def __call__(self, line: str) -> None:
        self.append(line)


def run(path: Path, **settings: Any) -> tuple[dict[str, str], Said]:
    """Run a sweep of subprocesses; return {run: status} and what was printed."""
    said = Said()
    outcomes = run_sweep(path, launcher="subprocess", echo=said, **settings)
    return {outcome.name: outcome.status for outcome in outcomes}, said
