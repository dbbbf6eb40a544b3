"""Runs on several ranks, over gloo on the CPU: forked, or started by Composer's own launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from tests.system import preloaded, rank_worker
from tests.system.preloaded import ROOT

TIMEOUT = 400  # seconds
# torch 2.7's FSDP2 over gloo adds gradients up over ranks, where later ones, and NCCL on GPUs,
# average (trap 39, pytorch#162338).
ADDS_UP = version("torch").startswith("2.7.")


def launch(world, folder, num_ranks, runs, *, nodes=1, by_launcher=False, **variables):
    """Return the results of `runs`, each a call of kit.run_config, on that many ranks.

    A key `world` of a run replaces paths of the world; for `spoil` see rank_worker.py. Ranks are
    forked, with the variables that Composer's launcher would set, or started `by_launcher`. With
    several `nodes` there is one launcher per node; they are connected only by address and port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(path) for name, path in asdict(world).items()}
    (folder / "job.json").write_text(json.dumps({"world": paths, "runs": runs}))
    if nodes == 1 and not by_launcher:
        fork_ranks(folder, num_ranks, **variables)
    else:
        worker = str(Path(__file__).with_name("rank_worker.py"))
        run_launchers([worker, str(folder)], folder, num_ranks, nodes=nodes, **variables)
    return torch.load(folder / "result.pt", weights_only=False)


def fork_ranks(folder, num_ranks, **variables):
    """Run rank_worker.py's `main(folder)` as that many forked ranks, which must all succeed."""
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "NODE_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    logs = [folder / f"log{rank}.txt" for rank in range(num_ranks)]
    ranks = [
        preloaded.start(
            *(rank_worker.main, folder),
            log=log,
            folder=folder,
            **common,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    codes = preloaded.wait(ranks, TIMEOUT)
    assert codes == [0] * num_ranks, last_lines(logs)


def last_lines(logs):
    return "\n".join(log.read_text()[-3000:] for log in logs)


def run_launchers(script, folder, num_ranks, *, nodes=1, **variables):
    """Run `composer -n NUM_RANKS SCRIPT`, spread over nodes, which must all succeed."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(num_ranks // nodes)]
    where = ["--world_size", str(num_ranks), "--master_addr", "127.0.0.1"]
    where += ["--master_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    logs = [folder / f"log{node}.txt" for node in range(nodes)]
    processes = []
    for node, log in enumerate(logs):
        # llm-foundry's ranks signal by a file in the working directory, of one name for all nodes
        # and runs: in a shared one the second to remove it fails (0.22, build_tokenizer).
        more, here = [], folder / f"node{node}"
        here.mkdir()
        if nodes > 1:
            more = [*where, "--node_rank", str(node)]
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*launcher, *more, *script],
                    cwd=here,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + TIMEOUT
    try:
        codes = [one.wait(max(1.0, end - time.monotonic())) for one in processes]
    finally:
        for one in processes:
            if one.poll() is None:
                one.send_signal(signal.SIGINT)  # on which it ends its ranks
                one.wait()
    assert codes == [0] * nodes, last_lines(logs)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
