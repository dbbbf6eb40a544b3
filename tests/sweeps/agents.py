"""`wandb sweep` and `wandb agent` in processes of their own, with a server on this machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.sweeps.kit import ROOT
from tests.system.test_sweep_killed import descendants
from tests.training.loggers.wandb_server import Server


class Agents:
    """The commands as a user of `folder` calls them."""

    def __init__(self, folder: Path, server: Server):
        self.folder = folder
        # The agent starts `python`, or `composer`, as the path finds it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40, "HOME": str(folder)}
        self.environment = {**os.environ, **own, "PATH": path, "PYTHONPATH": str(ROOT)}
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
            self.environment.pop(name, None)

    def sweep(self, path: Path) -> str:
        """Return the address that `wandb sweep` names to its agents."""
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", "--project", "trials", path.name],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = re.search(r"wandb agent (\S+)", done.stderr)
        assert done.returncode == 0 and found, done.stderr
        return found[1]

    def start(self, address: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "wandb", "agent", address],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def kill(agent: subprocess.Popen[str]) -> None:
    """Kill an agent and its run, as if its machine had lost power."""
    for pid in [agent.pid, *descendants(agent.pid)]:
        os.kill(pid, signal.SIGKILL)
    agent.communicate()
