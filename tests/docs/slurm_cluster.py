"""A real Slurm on this machine: Debian's packages, unpacked into a folder and not installed."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = (
    *("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "libslurm38"),
    *("munge", "libmunge2", "libhwloc15"),
)
# Two partitions, of which the second one pre-empts the first. Nobody authenticates; all ports are
# on the loopback. The GPU that the script asks for does not exist: give sbatch GPUS.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
PluginDir={libraries}/slurm-wlm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=high Nodes=ALL State=UP PriorityTier=10
"""
GPUS = "--gpus-per-node=0"


def download(packages: tuple[str, ...], folder: Path) -> Path:
    """Unpack Debian's packages into `folder`/root and return that folder."""
    root = folder / "root"
    root.mkdir()
    subprocess.run(["apt-get", "download", "-qq", *packages], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    return root


class Cluster:
    """A controller and a node; `folder` holds the unpacked packages and the cluster's state."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = download(PACKAGES, folder)
        (libraries,) = self.root.glob("usr/lib/*-linux-gnu")
        ports = [_free_port(), _free_port()]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                user=subprocess.check_output(["id", "-un"], text=True).strip(),
                controller=ports[0],
                node=ports[1],
                folder=folder,
                libraries=libraries,
            ),
            encoding="utf-8",
        )
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'slurm-wlm'}",
            "PATH": f"{self.root / 'usr/bin'}:{os.environ['PATH']}",
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        programs = self.root / "usr/sbin"
        commands = (
            [programs / "slurmctld-wlm", "-D"],
            [programs / "slurmd-wlm", "-D", "-d", programs / "slurmstepd-wlm"],
        )
        daemons = []
        try:
            for command in commands:
                with (self.folder / f"{command[0].name}.log").open("wb") as log:
                    daemons.append(
                        subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
                    )
            end = time.monotonic() + 30
            while "idle" not in self.call("sinfo", "--noheader", "--format=%T"):
                assert time.monotonic() < end, "the cluster does not start"
                time.sleep(0.5)
            yield
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)

    def call(self, *command: str, folder: Path | None = None) -> str:
        """Return what a command of Slurm prints, of both outputs."""
        done = subprocess.run(
            command, cwd=folder, env=self.environment, text=True, stdout=-1, stderr=-2
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a state such as RUNNING."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return shown.partition("JobState=")[2].partition(" ")[0]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
