"""Two processes build uncached loaders at once: neither hangs, and both agree."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from streaming import MDSWriter

from tests.data.kit import build, split_documents, walk
from tests.system.two_ranks import STOP_AFTER

pytestmark = pytest.mark.more
ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds; a rank that waits for ever is ended
# A line in a file for each row that was tokenised, by whichever process.
FORMATTING = """
import os
from pathlib import Path

def formatting(row):
    with Path(__file__).with_name("calls.txt").open("a") as file:
        file.write("x")
    return {"prompt": row["prompt"], "response": row["response"]}
"""
LOADERS = ("rows", "text", "streams", "remote", "mixture")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(folder: Path, tokenizer_folder: Path, loaders: dict, **variables: str):
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", **variables}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-m", "tests.system.two_ranks"]
    command += [str(tokenizer_folder), json.dumps(loaders), str(folder / "out")]
    command += [str(folder / "bucket")]
    logs = [folder / f"log{rank}.txt" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        # Hash seeds differ, so that nothing they agree on may come of one.
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONHASHSEED": str(rank + 1)}
        env = {**os.environ, **common, **own}
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file))
    end = time.monotonic() + TIMEOUT
    try:
        # A failed rank leaves the other one waiting.
        while time.monotonic() < end and {rank.poll() for rank in ranks} <= {None, 0}:
            if all(rank.poll() == 0 for rank in ranks):
                break
            time.sleep(0.1)
    finally:
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"out.rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def datasets(work: Path, make_rows) -> dict[str, dict]:
    rows = make_rows(60)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "bucket").mkdir()
    for path in (work / "train.jsonl", work / "bucket" / "train.jsonl"):
        path.write_text(lines)
    texts = "".join(json.dumps({"text": row["response"]}) + "\n" for row in rows)
    (work / "text.jsonl").write_text(texts)
    (work / "two_ranks_formatting.py").write_text(FORMATTING)
    with MDSWriter(
        out=str(work / "mds"), columns={"prompt": "str", "response": "str"}, size_limit=2000
    ) as out:
        for row in rows:
            out.write(row)
    own = {
        "rows": {
            "hf_name": str(work / "train.jsonl"),
            "preprocessing_fn": "two_ranks_formatting:formatting",
        },
        "text": {"hf_name": str(work / "text.jsonl")},
        "streams": {"remote": str(work / "mds"), "local": str(work / "local")},
        "remote": {"hf_name": "s3://bucket"},
        "mixture": {
            "datasets": [
                {"hf_name": str(work / "train.jsonl"), "split": "train"},
                {
                    "hf_name": str(work / "text.jsonl"),
                    "split": "train",
                    "text_key": "text",
                    "share": 0.3,
                },
            ]
        },
    }
    common = {"max_seq_len": 128, "pack_tokens": 130, "shuffle": True}
    splits = {name: {"split": "train"} for name in ("rows", "text", "remote")}
    return {name: {**own[name], **splits.get(name, {}), **common} for name in own}


@pytest.fixture(scope="module")
def ranks(work: Path, datasets, tokenizer_folder) -> list[dict]:
    """Return the results of rank 0 and rank 1, by loader."""
    loaders = {
        name: {
            "name": "packed_text" if name == "text" else "packed_finetuning",
            "dataset": dataset,
            "num_workers": 0,
        }
        for name, dataset in datasets.items()
    }
    path = os.pathsep.join([str(ROOT), str(work)])
    return run_ranks(work, tokenizer_folder, loaders, PYTHONPATH=path)


@pytest.mark.parametrize("name", LOADERS)
def test_both_ranks_have_the_same_plan(ranks, name: str):
    first, second = (rank[name] for rank in ranks)
    for key in ("length", "fingerprint", "plan", "num_documents"):
        assert first[key] == second[key], key
    assert len(first["batches"]) == len(second["batches"]) == first["length"] > STOP_AFTER


@pytest.fixture
def alone(work, datasets, tokenizer, monkeypatch):
    """Return a function that builds one rank's loader for the same global batch."""
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)

    def build_alone(name: str):
        builder = "packed_text" if name == "text" else "packed_finetuning"
        return build(tokenizer, datasets[name], 4, name=builder)

    return build_alone


# The same rows, wherever they lie.
SAME_ROWS = {name: name for name in LOADERS} | {"streams": "rows", "remote": "rows"}


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_take_the_packs_in_turn(ranks, alone, name: str):
    spec = alone(SAME_ROWS[name])
    assert spec.dataloader.dataset.fingerprint == ranks[0][name]["fingerprint"]
    together = zip(*(rank[name]["batches"] for rank in ranks), strict=True)
    for batch, batches in zip(walk(spec, epoch=1), together, strict=True):
        packs = [pack for packs in zip(*batches, strict=True) for pack in packs]
        assert packs == [split_documents(pack) for pack in batch]


def test_each_document_is_on_one_rank_once(ranks):
    documents = Counter(
        tuple(ids) for rank in ranks for b in rank["rows"]["batches"] for pack in b for ids in pack
    )
    assert set(documents.values()) == {1}  # prompts are numbered, so no two rows are equal
    assert len(documents) == ranks[0]["rows"]["num_documents"] == 60


def test_a_row_is_tokenised_once_in_all(ranks, work, alone):
    """Local rank 0 tokenises; the other rank and any later process use the cache."""
    calls = work / "calls.txt"
    assert len(calls.read_text()) == 60
    alone("rows")
    assert len(calls.read_text()) == 60


def test_no_signal_is_left_behind(ranks, work):
    assert not list(work.glob("._signal*"))


@pytest.mark.parametrize("name", ["rows", "streams"])
def test_one_rank_goes_on_where_two_stopped(ranks, alone, work, name: str):
    state = torch.load(work / f"out.{name}.rank0.pt", weights_only=False)
    spec = alone("rows")
    spec.dataloader.dataset.load_state_dict(state)
    rest = [
        sorted(ids for pack in batch for ids in split_documents(pack))
        for batch in walk(spec, epoch=1)
    ]
    together = zip(*(rank[name]["batches"][STOP_AFTER:] for rank in ranks), strict=True)
    assert rest == [
        sorted(ids for batch in batches for pack in batch for ids in pack) for batches in together
    ]
    # Each rank has a random state of its own, and goes on with that one.
    first, second = (torch_state["torch"] for torch_state in state["rng"])
    assert torch.equal(torch.get_rng_state(), first)
    assert not torch.equal(first, second)
