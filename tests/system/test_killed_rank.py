"""If one rank is killed with SIGKILL, the others end within a minute, with a message.

No process remains. Composer's launcher does this; the test checks that our code does not delay it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from foundry_ext.checkpoints.files import damage
from tests.system.ranks import ROOT, fork_ranks
from tests.training import kit

LIMIT = 60  # seconds


def write_job(world, folder, fsdp, last=100_000):
    """Write a job to batch `last` for rank_worker.py, with evaluations, checkpoints, a record."""
    loader = kit.loader_config(world.rows, shuffle=True)
    settings = {
        "callbacks": {
            "spy": {},
            "guard": {"action": "skip"},
            "exact_resume": {},
            "packed_throughput": {},
            "run_record": {"path": str(folder / "record.json"), "experiment": "killed"},
        },
        "log_config": True,
        "global_train_batch_size": 4,
        "train_loader": {**loader, "num_workers": 1},
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
        "eval_interval": "3ba",
        "save_num_checkpoints_to_keep": 2,
        "save_folder": str(folder / "checkpoints"),
        "max_duration": f"{last}ba",
        "autoresume": True,
        **({"fsdp_config": {"state_dict_type": "full"}} if fsdp else {}),
    }
    paths = {name: str(path) for name, path in asdict(world).items()}
    (folder / "job.json").write_text(json.dumps({"world": paths, "runs": {"run": settings}}))


def start(folder, **variables):
    """Start Composer's launcher with two ranks on the job in the folder."""
    worker = str(Path(__file__).with_name("rank_worker.py"))
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", worker, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def batches_saved(folder):
    found = [path.stem.split("-")[1] for path in folder.glob("checkpoints/ep*-rank0.pt")]
    return max((int(name.removeprefix("ba")) for name in found), default=0)


@pytest.mark.parametrize(
    ("rank", "fsdp"),
    [
        pytest.param(rank, fsdp, marks=mark, id=f"{rank}-{'fsdp2' if fsdp else 'ddp'}")
        for rank, fsdp, mark in (
            (0, False, pytest.mark.slow),
            (0, True, pytest.mark.slow),
            (1, False, pytest.mark.more),
            (1, True, pytest.mark.slow),
        )
    ],
)
def test_a_killed_rank_ends_the_others(world, tmp_path, rank, fsdp):
    variables = {"FSDP_VERSION": "2"} if fsdp else {}
    write_job(world, tmp_path, fsdp)
    launcher = start(tmp_path, **variables)
    left = []
    try:
        end = time.monotonic() + 200
        while batches_saved(tmp_path) < 7:
            text = (tmp_path / "log").read_text()
            assert launcher.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        left = psutil.Process(launcher.pid).children(recursive=True)
        ranks = {one.environ().get("RANK"): one for one in left if one.ppid() == launcher.pid}
        assert len(ranks) == 2 and len(left) > 2, "ranks and their loaders' workers"
        killed = time.monotonic()
        ranks[str(rank)].send_signal(signal.SIGKILL)
        code = launcher.wait(LIMIT)
        seconds = time.monotonic() - killed
        _, alive = psutil.wait_procs(left, timeout=max(0.0, LIMIT - seconds))
        gone = time.monotonic() - killed
    finally:
        for one in [*left, launcher]:
            if isinstance(one, subprocess.Popen) or one.is_running():
                one.kill()
    text = (tmp_path / "log").read_text()
    print(f"rank {rank}, fsdp {fsdp}: launcher ended after {seconds:.1f} s, all by {gone:.1f} s")
    record = json.loads((tmp_path / "record.json").read_text())
    assert code != 0 and not alive
    assert f"Rank {rank} crashed with exit code -9" in text
    assert record["status"] == "failed" or rank == 0, "rank 0 writes it, if it lives to do so"
    # The same run, but that this one is to end.
    saved = batches_saved(tmp_path)
    assert damage(tmp_path / "checkpoints/latest-rank0.pt") is None
    write_job(world, tmp_path, fsdp, last=saved + 3)
    fork_ranks(tmp_path, 2, **variables)
    assert_went_on(tmp_path, saved)


def assert_went_on(folder, saved):
    (run,) = torch.load(folder / "result.pt", weights_only=False).values()
    assert 3 <= len(run["losses"]) <= 4, "the newest may not have been linked yet"
    assert batches_saved(folder) == saved + 3
    assert json.loads((folder / "record.json").read_text())["status"] == "finished"
