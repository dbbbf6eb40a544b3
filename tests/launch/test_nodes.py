"""Two nodes, of one rank each, that were started with something different: both end at once.

The nodes are forked processes with the variables that Composer's launcher would set.
"""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from foundry_ext.launch import nodes
from foundry_ext.launch.train import main
from tests.system import preloaded
from tests.system.conftest import world
from tests.system.ranks import free_port, last_lines
from tests.training import kit

__all__ = ["world"]
SECONDS = 120


# Simulates a node that cannot read its tokenizer, which all nodes' YAML names alike.
WITHOUT_TOKENIZER = """
import os
import llmfoundry.utils.builders as builders

def refuse(*_, **__):
    raise OSError("no such tokenizer here")

if os.environ["NODE_RANK"] == "1":
    builders.AutoTokenizer.from_pretrained = refuse
"""


def train(path: str, *overrides: str) -> None:
    sys.exit(main("train.py", [path, *overrides]))


def run_nodes(folder: Path, configs, overrides=((), ()), **variables: str):
    """Return [(exit code, output)] of two nodes, each with its YAML in a folder of its own."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    started = []
    for rank, (config, given) in enumerate(zip(configs, overrides, strict=True)):
        here = folder / f"node{rank}"
        here.mkdir(exist_ok=True)
        OmegaConf.save(config, here / "run.yaml")
        log = here / "log.txt"
        process = preloaded.start(
            *(train, "run.yaml", *given),
            log=log,
            folder=here,
            **common,
            RANK=str(rank),
            NODE_RANK=str(rank),
        )
        started.append((process, log))
    for process, log in started:
        process.join(SECONDS)
        alive = process.exitcode is None
        for other, _ in started if alive else ():
            other.kill()
        assert not alive, f"waits: {last_lines([log for _, log in started])}"
    return [(process.exitcode, log.read_text()) for process, log in started]


def reasons(ends) -> list[str]:
    """Return what each node says, without its beginning `train.py: error on rank 1: run.yaml: `."""
    lines = [
        line.partition("run.yaml: ")[2]
        for code, text in ends
        for line in text.splitlines()
        if line.startswith("train.py: error")
    ]
    assert [code != 0 for code, _ in ends] == [True, True], ends
    assert len(lines) == 2 and "Traceback" not in ends[0][1] + ends[1][1], ends
    return lines


@pytest.fixture
def config(world, tmp_path):
    """Return a function for a node's YAML."""

    def make(**overrides):
        common = {"callbacks": {"guard": {}}, "loggers": {}, "max_duration": "2ba"}
        common |= {"global_train_batch_size": 4}
        return kit.run_config(world, tmp_path, **{**common, "save_folder": None, **overrides})

    return make


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=18"], "seed: 17 on rank 0 (node 0, "),
        (["optimizer.lr=0.02"], "optimizer.lr: 0.01 on rank 0 (node 0, "),
        (["callbacks.packed_throughput={}"], "callbacks.packed_throughput: 'nothing' on rank 0"),
        (["max_duration=1ba", "precision=amp_bf16"], "precision: 'fp32' on rank 0 (node 0, "),
    ],
    ids=["seed", "lr", "callback", "several"],
)
def test_another_setting_ends_both_nodes(config, tmp_path, overrides, says):
    ends = run_nodes(tmp_path, [config(), config()], ((), overrides))
    first, second = reasons(ends)
    assert first == second
    assert says in first and "on rank 1 (node 1, " in first
    assert "the same YAML and the same overrides" in first


@pytest.mark.parametrize("case", ["other rows", "fewer rows", "no file", "an empty file"])
def test_other_data_ends_both_nodes(config, world, tmp_path, case):
    (tmp_path / "node1").mkdir()
    other = tmp_path / "node1" / "rows.jsonl"
    lines = world.rows.read_text().splitlines(keepends=True)
    if case == "other rows":
        lines[7] = json.dumps({"prompt": "8 the bird", "response": "seven"}) + "\n"
    elif case == "fewer rows":
        lines = lines[:5]
    if case != "no file":
        other.write_text("" if case == "an empty file" else "".join(lines))
    configs = [config(), config(train_loader__dataset__hf_name=str(other))]
    first, second = reasons(run_nodes(tmp_path, configs))
    if case in ("other rows", "fewer rows"):
        assert "the data (digest)" in first and "40 documents" in first
        assert "on rank 1 (node 1, " in first and str(world.rows) in first
        assert str(other) in second
    else:
        assert str(other) in first and str(other) in second
        assert "rank 1 (node 1, " in first


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["seed=x"], "seed"),
        (["seed=x", "--traceback"], "seed"),
        (["callbacks.run_record={path: /proc/x/r.json, experiment: a}"], "/proc/x/r.json"),
        (["callbacks.gard={}"], "callbacks.gard"),
        # Gone while node 0 waits in a collective of llm-foundry's.
        pytest.param([], "no such tokenizer here", marks=pytest.mark.more),
    ],
    ids=["key", "traceback", "path", "name", "tokenizer"],
)
def test_what_one_node_refuses_ends_both(config, tmp_path, given, says):
    """It is found before, while or after the nodes compare."""
    first, second = config(), config()
    if not given:
        (tmp_path / "code.py").write_text(WITHOUT_TOKENIZER)
        first.code_paths = second.code_paths = [str(tmp_path / "code.py")]
    ends = run_nodes(tmp_path, [first, second], ((), given))
    assert [code != 0 for code, _ in ends] == [True, True], ends
    assert says in ends[0][1] and says in ends[1][1], ends
    assert "Traceback" not in ends[0][1], ends[0][1]
    assert "rank 1 (node 1, " in ends[0][1]


@pytest.mark.parametrize("case", ["damaged", "seen by one node"])
def test_a_checkpoint_that_cannot_be_continued_ends_both_nodes(config, tmp_path, case):
    folder = tmp_path / "node0" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "ep0-ba1-rank0.pt"
    if case == "damaged":
        path.write_bytes(b"no checkpoint")
        says, place = "ep0-ba1-rank0.pt does not begin as a checkpoint", str(folder)
    else:
        torch.save({"state": {}}, path)
        says, place = "save_folder: node 1 does not see checkpoints/ep0-ba1-rank0.pt", "checkpoints"
    callbacks = {"guard": {}, "exact_resume": {}}
    saving = {"save_folder": place, "save_num_checkpoints_to_keep": 2, "autoresume": True}
    given = config(callbacks=callbacks, **saving, dist_timeout=60)
    first, second = reasons(run_nodes(tmp_path, [given, given]))
    assert first == second and says in first


def test_a_port_in_use_says_how_to_name_another(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "node0").mkdir()
        OmegaConf.save(config(), tmp_path / "node0" / "run.yaml")
        ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        process = preloaded.start(
            *(train, "run.yaml"),
            log=tmp_path / "log.txt",
            folder=tmp_path / "node0",
            **ranks,
            **{"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        process.join(SECONDS)
    text = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 1, text
    assert f"port {port} is in use by another program" in text and "--master_port" in text
    assert "Traceback" not in text


def test_each_node_has_signals_of_its_own(monkeypatch):
    """Composer's name for them is that of node 0 on every node."""
    from composer.utils import dist

    monkeypatch.setattr(dist, "get_node_signal_file_name", lambda rng=None: "._signal_file_node0_x")
    names = set()
    for node in (0, 1):
        monkeypatch.setenv("NODE_RANK", str(node))
        with nodes.signals_per_node():
            names.add(dist.get_node_signal_file_name())
    assert len(names) == 2
    assert dist.get_node_signal_file_name() == "._signal_file_node0_x"


@pytest.mark.more
def test_paths_may_differ_and_two_nodes_share_a_working_directory(config, world, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(world.rows.read_text())
    other = config(
        train_loader__dataset__hf_name=str(copy),
        train_loader__prefetch_factor=3,
        loggers={"metrics_file": {"path": "elsewhere/metrics.jsonl"}},
    )
    here = config(loggers={"metrics_file": {"path": "metrics.jsonl"}})
    for node in (0, 1):
        (tmp_path / f"node{node}").symlink_to(tmp_path, target_is_directory=True)
    # One folder, two YAMLs: the second node's overrides are its own YAML.
    differing = [f"train_loader.dataset.hf_name={copy}", "train_loader.prefetch_factor=3"]
    differing.append("loggers.metrics_file.path=elsewhere/metrics.jsonl")
    assert OmegaConf.merge(here, OmegaConf.from_dotlist(differing)) == other
    ends = run_nodes(tmp_path, [here, here], ((), differing))
    assert [code for code, _ in ends] == [0, 0], ends
    assert not list(tmp_path.glob("._signal*"))


def test_what_is_compared():
    settings = {
        "seed": 17,
        "save_folder": "/node0/outputs",
        "variables": {"x": 1},
        "train_loader": {
            "num_workers": 2,
            "dataset": {
                "hf_name": "/node0/a.jsonl",
                "hf_kwargs": {
                    "token": "hf_x",
                    "name": "n",
                    "data_dir": "/node0",
                    "cache_dir": "/a",
                },
            },
        },
        "callbacks": {
            "run_record": {"path": "/node0/record.json", "experiment": "a"},
            "forgetting": {"sets": {"arc.easy": {"path": "/node0/arc.jsonl", "limit": 9}}},
        },
        "loggers": {"wandb_metrics": {"init_kwargs": {"dir": "/node0", "mode": "offline"}}},
        "load_path": "/node0/last-rank{rank}.pt",
    }
    assert nodes.comparable(settings) == {
        "seed": 17,
        "train_loader.dataset.hf_kwargs.token": "[redacted]",
        "train_loader.dataset.hf_kwargs.name": "n",
        "callbacks.run_record.experiment": "a",
        "callbacks.forgetting.sets.arc.easy.limit": 9,
        "loggers.wandb_metrics.init_kwargs.mode": "offline",
        "load_path": "/node0/last-rank{rank}.pt",
    }


def test_code_is_compared_by_content(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("a = 1\n")
    first = nodes.comparable({"code_paths": [str(path)]})
    path.write_text("a = 2\n")
    assert nodes.comparable({"code_paths": [str(path)]}) != first
    assert list(first) == ["code_paths[0] (content)"]
