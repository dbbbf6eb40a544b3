"""Records of W&B runs, in an offline run's folder and on a server with a stand-in Api."""

import json
from pathlib import Path

import pytest
import wandb

from foundry_ext.comparison.wandb_runs import fetch_record, is_local, is_online, local_record
from foundry_ext.records.record import items_path, new_record, read_items, read_record, write_record

ITEM = {"step": 0, "set": "target", "item": "1", "loss": 1.0, "tokens": 2}


class File:
    def __init__(self, name: str, content: str):
        self.name, self.content = name, content

    def download(self, root: str, replace: bool):
        path = Path(root, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.content)


class Run:
    def __init__(self, files: dict[str, str]):
        self.all_files = files

    def files(self, names):
        return [File(name, self.all_files[name]) for name in names if name in self.all_files]


class Api:
    """Stand-in for the parts of wandb.Api that are used."""

    def __init__(self, runs: dict[str, dict[str, str]]):
        self.runs = runs

    def run(self, path: str) -> Run:
        if path not in self.runs:
            raise wandb.errors.CommError(f"Could not find run {path}")
        return Run(self.runs[path])


@pytest.fixture
def record(tmp_path):
    loader = {"name": None, "revision": None, "fingerprint": None, "documents": 1, "tokens": 1}
    return new_record(
        run_name="one",
        experiment="trial",
        method="lora",
        seed=1,
        learning_rate=1.0,
        config={},
        environment={
            **{"python": "3", "packages": {}, "commit": None, "dirty": None, "device": "a CPU"},
            **{"device_kind": "cpu", "world_size": 1},
        },
        data={"train": {**loader, "counts": {}}, "eval": {}},
        model={
            **{"name": "m", "parameters": 1, "trainable_parameters": 1, "rank": None},
            **{"alpha": None, "effective_scale": None, "target_modules": None, "init": None},
        },
        items="items.jsonl",
    )


def test_record_and_items_are_downloaded(record, tmp_path):
    files = {"record.json": json.dumps(record), "items.jsonl": json.dumps(ITEM) + "\n", "x": ""}
    api = Api({"team/project/ab12": files})
    path = fetch_record("team/project/ab12", tmp_path, api=api)
    assert path.is_relative_to(tmp_path) and read_record(path) == record
    found = items_path(path, record)
    assert found is not None and read_items(found) == [ITEM]
    assert sorted(one.name for one in path.parent.iterdir()) == ["items.jsonl", "record.json"]


def test_no_name_from_a_record_leaves_its_folder(record, tmp_path):
    record["items"] = "../../items.jsonl"
    files = {"record.json": json.dumps(record), record["items"]: "planted"}
    with pytest.raises(ValueError, match=r"items: .*record's folder"):
        fetch_record("a/b/c", tmp_path / "deep" / "er", api=Api({"a/b/c": files}))
    assert not (tmp_path / "items.jsonl").exists() and not (tmp_path / "deep/items.jsonl").exists()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"a/b/c: this W&B run has no record\.json"):
        fetch_record("a/b/c", tmp_path, api=Api({"a/b/c": {"config.yaml": ""}}))
    with pytest.raises(ValueError, match="a/b/d: W&B says Could not find run"):
        fetch_record("a/b/d", tmp_path, api=Api({}))
    for reference in ("a/b", "../b/c", "a/../c", "https://wandb.ai/a/b/c"):
        with pytest.raises(ValueError, match="give entity/project/run_id"):
            fetch_record(reference, tmp_path, api=Api({}))


def test_an_offline_run_s_folder(record, tmp_path):
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-ab12"
    folder.mkdir(parents=True)
    assert is_local(folder) and not is_local(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no record"):
        local_record(folder)
    write_record(folder / "files" / "record.json", record)
    assert read_record(local_record(folder)) == record


def test_references_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_online("team/project/ab12")
    for reference in ("outputs/run", "/a/b/c", "a/b/c/d", "./b/c"):
        assert not is_online(reference)
    Path("outputs/sweep/one").mkdir(parents=True)
    assert not is_online("outputs/sweep/one")
