"""The files for rented machines, and a stand-in for a run that a signal stops."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/how-to/rented"
SLURM, SKY, MODAL = FOLDER / "slurm.sh", FOLDER / "sky.yaml", FOLDER / "modal_train.py"

# Saves at the first signal, as a run does, and ends at once at a second one. A process that has
# inherited SIGINT as ignored saves nothing.
COMMAND = """#!/bin/bash
mkdir -p outputs/run/checkpoints
echo $$ > pid
echo started >> outputs/run/metrics.jsonl
if [ -e outputs/run/checkpoints/ba1.pt ]; then echo continued >> outputs/run/metrics.jsonl; exit; fi
save() {
  trap 'exit 9' INT TERM
  for _ in $(seq 8); do sleep 0.1; done
  echo 1 > outputs/run/checkpoints/partial-ba1.pt
  cp outputs/run/checkpoints/partial-ba1.pt outputs/run/checkpoints/ba1.pt
  ln -s ba1.pt outputs/run/checkpoints/latest.pt
  exit $1
}
trap 'save 130' INT
trap 'save 143' TERM
for _ in $(seq 600); do sleep 0.1 || true; done
"""


def project(folder: Path) -> Path:
    """Return `folder` with what the files expect of a project, and the stand-in `command`."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    (folder / "Makefile").write_text("install:\n\t@true\n", encoding="utf-8")
    program(folder / "command", COMMAND)
    return folder


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def wait_for(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def sky_sections() -> tuple[str, str]:
    """Return the `setup` and `run` of the SkyPilot file."""
    task = yaml.safe_load(SKY.read_text(encoding="utf-8"))
    return task["setup"], task["run"]


def check_kept(folder: Path, rsync: Path) -> None:
    """Check that `run` of the SkyPilot file keeps a stopped command, which a new machine continues.

    Args:
        folder: an empty one.
        rsync: the folder of a program of that name.
    """
    kept, text = folder / "kept", sky_sections()[1]
    assert text.count("sleep 30") == 1 and text.count("/kept/$RUN") == 4
    text = text.replace("/kept/$RUN", f"{kept}/$RUN").replace("sleep 30", "sleep 0.2")
    environment = {
        **os.environ,
        **{"COMMAND": "./command", "RUN": "one", "PATH": f"{rsync}:{os.environ['PATH']}"},
    }

    def start(machine: Path) -> subprocess.Popen[bytes]:
        command = ["bash", "-c", text]
        return subprocess.Popen(command, cwd=machine, env=environment, start_new_session=True)

    metrics = kept / "one/run/metrics.jsonl"
    first = start(project(folder / "first"))
    wait_for(lambda: lines(metrics) == ["started"])  # copied while the command runs
    first.terminate()
    assert first.wait(20) == 143
    (checkpoint,) = (kept / "one/run/checkpoints").iterdir()
    assert checkpoint.name == "ba1.pt", "neither the link nor the partial checkpoint"
    assert lines(metrics) == ["started"]

    assert start(project(folder / "second")).wait(20) == 0
    assert lines(metrics) == ["started", "started", "continued"]
