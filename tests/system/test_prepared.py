"""Runs on prepared data: on two ranks as on one, and killed as if they had not been."""

import json
import os
import signal
import time
from itertools import chain

import pytest
from transformers import AutoTokenizer

from foundry_ext.cli.main import main as foundry_ext
from foundry_ext.data.prepared.preparing import prepare
from tests.system import preloaded, test_kill
from tests.system.ranks import launch
from tests.training import kit

pytestmark = pytest.mark.more
NUM_DOCUMENTS = 300
COMMON = {
    "global_train_batch_size": 4,
    "algorithms": {},
    "callbacks": {"spy": {"keep_gradients": True}},
    "save_folder": None,
}


@pytest.fixture(scope="module")
def loader(world, tmp_path_factory, make_rows):
    """Return a loader's section of prepared data, with epochs of several windows."""
    folder = tmp_path_factory.mktemp("prepared")
    path = folder / "train.jsonl"
    rows = make_rows(NUM_DOCUMENTS, seed=3, longest=12)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = kit.loader_config(path, shuffle=True, shuffle_seed=3)
    tokenizer = AutoTokenizer.from_pretrained(world.tokenizer)
    prepare(
        section["dataset"],
        tokenizer,
        name=section["name"],
        tokenizer_name="tiny",
        out=str(folder / "shards"),
        workers=1,
        shard_bytes=1000,
    )
    section["dataset"] |= {"prepared": str(folder / "shards"), "window": 60}
    return section


def test_two_ranks_train_as_one(world, loader, tmp_path):
    run = {**COMMON, "train_loader": loader}
    alone = kit.run(kit.run_config(world, tmp_path / "alone", **run))
    found = launch(world, tmp_path, 2, {"full": run})["full"]
    assert found["losses"] == pytest.approx(alone.losses, rel=2e-5)
    theirs = [sorted(ids.tolist() for ids, _ in kit.documents_of(b)) for b in alone.spy.batches]
    together = [sorted(chain(*batches)) for batches in zip(*found["documents"], strict=True)]
    assert together == theirs
    assert found["clock"][0] == 2 * NUM_DOCUMENTS  # two epochs


def test_killed_some_times(world, loader, tmp_path, monkeypatch):
    settings = test_kill.settings

    def prepared_settings(*arguments):
        return {**settings(*arguments), "train_loader": loader}

    monkeypatch.setattr(test_kill, "settings", prepared_settings)
    test_kill.run(world, tmp_path / "reference", "lora", 0)
    kills = ["save", 0.3, "start", "save"]
    met = test_kill.run(world, tmp_path / "run", "lora", 0, kills)
    assert met["attempts"] == 5
    test_kill.assert_same_end(tmp_path / "run", tmp_path / "reference")
    batches = list(test_kill.documents_by_batch(tmp_path / "run").values())
    documents = sorted(chain(*batches))
    assert documents[::2] == documents[1::2] and len(set(documents)) == NUM_DOCUMENTS


# --- the command ---------------------------------------------------------------------------------


def run_command(arguments: list[str]) -> None:
    raise SystemExit(foundry_ext(arguments))


@pytest.fixture
def yaml(world, tmp_path, make_rows):
    """Return a run's YAML on rows that take some seconds to prepare."""
    path = tmp_path / "texts.jsonl"
    rows = make_rows(60_000, seed=1)
    path.write_text(
        "".join(json.dumps({"text": row["response"]}) + "\n" for row in rows), encoding="utf-8"
    )
    section = kit.loader_config(path)
    section["name"] = "packed_text"
    config = kit.run_config(world, tmp_path / "run", train_loader=section)
    from omegaconf import OmegaConf

    file = tmp_path / "run.yaml"
    OmegaConf.save(OmegaConf.create(config), file)
    return file


def start(tmp_path, yaml, out):
    arguments = ["prepare", str(yaml), "--out", out, "--workers", "2", "--shard-size", "200kb"]
    return preloaded.start(run_command, arguments, log=tmp_path / "log", folder=tmp_path)


def test_killed_preparation_goes_on(yaml, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert preloaded.wait([start(tmp_path, yaml, "whole")], 300) == [0], log_of(tmp_path)
    num_shards = len(list((whole / "shards").iterdir()))
    assert num_shards >= 8
    process = start(tmp_path, yaml, "out")
    made = 0
    while made < num_shards // 2:
        made = len([one for one in out.glob("shards/*") if one.suffix != ".part"])
        assert process.exitcode is None, log_of(tmp_path)
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(2)  # its workers notice that they are alone
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*/about.json")}
    assert len(before) >= made
    assert preloaded.wait([start(tmp_path, yaml, "out")], 300) == [0], log_of(tmp_path)
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written, "a finished shard was made again"
    assert not list(out.glob("shards/*.part"))
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes(), path


def log_of(tmp_path) -> str:
    return (tmp_path / "log").read_text(encoding="utf-8")[-3000:]
