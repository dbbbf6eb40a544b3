"""W&B's service that dies and a server that stops answering: the run goes on and says so."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from composer.core import Callback

from foundry_ext.training.loggers import wandb_background
from foundry_ext.training.loggers.metrics_file import MetricsFile, read_metrics
from foundry_ext.training.loggers.wandb_background import BackgroundWandB
from foundry_ext.training.loggers.wandb_metrics import WandBMetrics
from tests.training import kit
from tests.training.loggers.test_wandb_metrics import offline_in, read_back, read_records, values


class Trouble(Callback):
    """Callback `trouble`: calls `make` after batch 4, with W&B's logger."""

    make: Callable[[WandBMetrics], None]

    def batch_end(self, state, logger):
        if state.timestamp.batch == 4:
            found = [one for one in logger.destinations if isinstance(one, WandBMetrics)]
            Trouble.make(found[0])


kit.llmfoundry.registry.callbacks.register("trouble", func=Trouble)


def train(world, folder: Path, trouble: Callable[[WandBMetrics], None], **init_kwargs):
    """Train, evaluate after the trouble, and return step -> loss of the file of metrics."""
    Trouble.make = staticmethod(trouble)
    samples = {"prompts": ["one bird"], "max_new_tokens": 2}
    kit.run(
        kit.run_config(
            world,
            folder,
            "lora",
            callbacks={"spy": {}, "text_samples": samples, "trouble": {}},
            loggers={
                "inmemory": {},
                "metrics_file": {"path": f"{folder}/metrics.jsonl"},
                "wandb_metrics": {"project": "p", "init_kwargs": init_kwargs},
            },
            eval_loader=kit.loader_config(world.eval_rows, eval_packs=1),
            eval_interval="6ba",
            save_folder=None,
        )
    )
    return read_metrics(folder / "metrics.jsonl")["loss/train/total"]


def losses(folder: Path, *, finished: bool = True) -> dict[int, float]:
    """Return step -> loss of a run's file."""
    (file,) = folder.glob("run-*.wandb")
    rows = [
        values(record.history.item)
        for record in (read_back(folder) if finished else read_records(file))
        if record.HasField("history")
    ]
    return {row["_step"]: row["loss/train/total"] for row in rows if "loss/train/total" in row}


def warnings_in(caplog) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name.endswith("wandb_background")
    ]


def kill(logger: WandBMetrics) -> None:
    assert logger._background is not None and logger._background.drain(60.0)
    assert logger._service is not None
    os.kill(logger._service.pid, signal.SIGKILL)
    logger._service.wait(60.0)  # so that every later call fails, and not only the second one


def test_a_run_outlives_w_and_b_s_service(world, tmp_path, caplog):
    expected = train(world, tmp_path, kill, **offline_in(tmp_path))
    assert len(expected) == 8
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=os.path.getmtime)
    logged = losses(second)
    assert logged == pytest.approx({step: expected[step] for step in logged})
    assert {5, 6, 7} <= logged.keys()
    assert losses(first, finished=False).keys() <= {0, 1, 2, 3}
    (said,) = warnings_in(caplog)
    assert str(second) in said and f"{tmp_path}/metrics.jsonl" in said
    assert "service" in said and "\n" not in said


def test_without_another_service_a_run_goes_on(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb_background, "RESTARTS", 0)
    assert len(train(world, tmp_path, kill, **offline_in(tmp_path))) == 8
    first, last = warnings_in(caplog)
    assert "metrics of step" in first and f"{tmp_path}/metrics.jsonl" in first
    assert "wandb sync" in last


def test_a_terminal_is_not_asked_for_a_key(tmp_path, caplog, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def ask(*_, **__):
        raise RuntimeError("a terminal was asked")

    monkeypatch.setattr("wandb.sdk.lib.apikey.prompt_choices", ask)
    monkeypatch.setattr("wandb.sdk.lib.apikey.isatty", lambda _stream: True)
    wandb_background.leave(0)
    logger = BackgroundWandB(project="p", init_kwargs={"dir": str(tmp_path)})
    logger.connect(SimpleNamespace(run_name="one"), SimpleNamespace(destinations=[]))
    logger.post_close()
    (said,) = warnings_in(caplog)
    assert "there is no key" in said and "wandb login" in said
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_a_service_that_is_gone_ends_no_start(tmp_path, caplog, monkeypatch):
    """Neither does a path with braces, which the warning names."""
    monkeypatch.setenv("WANDB_SERVICE", "2-99999-tcp-localhost-9")
    logger = BackgroundWandB(project="p", init_kwargs=offline_in(tmp_path))
    file = MetricsFile(f"{tmp_path}/{{run_name}}/{{x}}.jsonl")
    state, destinations = SimpleNamespace(run_name="one"), SimpleNamespace(destinations=[file])
    logger.connect(state, destinations)
    logger.post_close()
    assert logger._elsewhere == f"{tmp_path}/one/{{x}}.jsonl"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    (said,) = warnings_in(caplog)
    assert "continues offline" in said


def test_the_end_of_a_run_starts_no_other_service(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb_background, "CLOSE_SECONDS", 0.5)
    logger = BackgroundWandB(project="p", init_kwargs=offline_in(tmp_path))
    logger.connect(SimpleNamespace(run_name="one"), SimpleNamespace(destinations=[]))
    assert logger._background is not None and logger._background.drain(60.0)

    def call():
        assert logger._service is not None
        logger._service.wait(60.0)
        raise ConnectionError("the service is gone")

    logger.send("a table", call)
    logger.post_close()
    first, second, *_ = warnings_in(caplog)
    assert "has not sent everything" in first and "lacks a table (Conn" in second
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "test_a_table_that_the_server_loses_ends_no_run",
        "test_no_step_waits_for_a_server_that_stops_answering",
    ],
)
def test_with_a_server(name):
    """Run a test of with_a_server.py in a process that W&B has not been used in."""
    path = Path(__file__).with_name("with_a_server.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{path}::{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
