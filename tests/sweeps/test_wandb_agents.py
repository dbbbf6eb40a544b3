"""A sweep of W&B's with two agents, of which one is killed, and `foundry-ext sweep` after it."""

from pathlib import Path

import pytest

from tests.sweeps.agents import Agents, kill
from tests.sweeps.kit import enter, lines, names, run, wait_for, write_sweep
from tests.system.test_sweep_killed import descendants
from tests.training.loggers.wandb_server import serving
from tests.training.loggers.wandb_store import Store

pytestmark = pytest.mark.more
RUNS = [f"a-seed_{seed}-seconds_3" for seed in (17, 18, 19)]


def test_the_other_agent_goes_on_and_foundry_ext_finishes_the_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = enter(tmp_path, monkeypatch)
    parameters = {
        "config": {"value": "a.yaml"},
        "seed": {"values": [17, 18, 19]},
        "variables.seconds": {"value": 3},
    }
    path = write_sweep(folder, parameters)
    with serving(Store()) as server:
        wandb = Agents(folder, server)
        address = wandb.sweep(path)
        assert address == "me/trials/abcd1234" and len(server.waiting) == 3
        agents = [wandb.start(address) for _ in range(2)]
        wait_for(lambda: lines(folder, RUNS[0], "starts"), seconds=60)
        run_id = int(lines(folder, RUNS[0], "starts")[0].split()[0])
        agents.sort(key=lambda agent: run_id in descendants(agent.pid))
        other, killed = agents
        kill(killed)
        out, _ = other.communicate(timeout=120)
    assert server.num_agents == 2 and other.returncode == 0, out
    assert names(folder) == RUNS
    assert [len(lines(folder, name, "ends")) for name in RUNS] == [0, 1, 1]
    statuses, _ = run(path)
    assert statuses == dict.fromkeys(RUNS, "finished")
    assert [len(lines(folder, name, "starts")) for name in RUNS] == [2, 1, 1]
    for name in RUNS:
        assert len(lines(folder, name, "ends")) == 1 and lines(folder, name, "overlaps") == []
