"""W&B's server loses a table, or stops answering: the run goes on and says so.

test_wandb_trouble.py runs this file in a process of its own. The package wandb keeps an API object
and a session per process, and a call that a run gave up leaves a thread that asks for days: after
other tests, both may hold another server's address.
"""

from pathlib import Path

import pytest

from foundry_ext.training.loggers import wandb_background
from tests.training.loggers.test_wandb_trouble import losses, train, warnings_in
from tests.training.loggers.wandb_server import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(wandb_background, "CALL_SECONDS", 2.0)
    monkeypatch.setattr(wandb_background, "CLOSE_SECONDS", 6.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        yield server


def check(folder: Path, expected: dict[int, float], said: list[str]) -> None:
    """Check that the run's folder, which is named, holds the losses of all steps."""
    (folder,) = (folder / "wandb").glob("run-*")
    assert len(expected) == 8 and any(f"wandb sync {folder}" in line for line in said), said
    logged = losses(folder, finished=False)
    assert logged == pytest.approx({step: expected[step] for step in logged})
    assert set(range(7)) <= logged.keys()  # W&B writes a step when the next one begins


def test_a_table_that_the_server_loses_ends_no_run(world, tmp_path, caplog, server, monkeypatch):
    monkeypatch.setattr(wandb_background, "CALL_SECONDS", 60.0)
    monkeypatch.setattr(wandb_background, "CLOSE_SECONDS", 60.0)
    expected = train(world, tmp_path, lambda _: None, mode="online", dir=str(tmp_path))
    said = warnings_in(caplog)
    assert "text_samples of step 6" in said[0] and "ValueError" in said[0]
    check(tmp_path, expected, said)


def test_no_step_waits_for_a_server_that_stops_answering(world, tmp_path, caplog, server):
    def stop(_):
        server.silent.set()

    expected = train(world, tmp_path, stop, mode="online", dir=str(tmp_path))
    said = warnings_in(caplog)
    assert "text_samples of step 6" in said[0] and f"{tmp_path}/metrics.jsonl" in said[0]
    check(tmp_path, expected, said)
