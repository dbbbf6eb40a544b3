"""Runs on several ranks, over gloo on the CPU, by Composer's own launcher."""

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

ROOT = Path(__file__).parents[2]
# torch 2.7's FSDP2 over gloo adds gradients up over ranks, where later ones, and NCCL on GPUs,
# average (trap 39, pytorch#162338).
ADDS_UP = version("torch").startswith("2.7.")


def launch(world, folder, num_ranks, runs, *, nodes=1, **variables):
    """The results of `runs`, each a call of kit.run_config, on that many ranks.

    A key `world` of a run replaces paths of the world; for `spoil` see rank_worker.py. Several
    `nodes` are as many launchers, which know of one another by address and port alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(path) for name, path in asdict(world).items()}
    (folder / "job.json").write_text(json.dumps({"world": paths, "runs": runs}))
    worker = str(Path(__file__).with_name("rank_worker.py"))
    run_launchers([worker, str(folder)], folder, num_ranks, nodes=nodes, **variables)
    return torch.load(folder / "result.pt", weights_only=False)


def run_launchers(script, folder, num_ranks, *, nodes=1, **variables):
    """`composer -n NUM_RANKS SCRIPT`, spread over nodes; all must end well."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(num_ranks // nodes)]
    where = ["--world_size", str(num_ranks), "--master_addr", "127.0.0.1"]
    where += ["--master_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    logs = [folder / f"log{node}.txt" for node in range(nodes)]
    processes = []
    for node, log in enumerate(logs):
        more, here = [], ROOT
        if nodes > 1:
            # llm-foundry's ranks signal by a file in the working directory, of one name for all
            # nodes: in a shared one the second to remove it fails (0.22, build_tokenizer).
            more, here = [*where, "--node_rank", str(node)], folder / f"node{node}"
            here.mkdir()
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
    end = time.monotonic() + 400
    try:
        codes = [one.wait(max(1.0, end - time.monotonic())) for one in processes]
    finally:
        for one in processes:
            if one.poll() is None:
                one.send_signal(signal.SIGINT)  # on which it ends its ranks
                one.wait()
    text = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0] * nodes, text


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
