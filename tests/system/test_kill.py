"""A run that is killed with -9 many times ends bit for bit like one that never was.

It is killed in its middle, around the ends of epochs, while it starts, and while it writes a
checkpoint. Every document is used once per epoch, in the same batch in all attempts. (Traps 31, 40,
41.)
"""

import json
import random
from dataclasses import asdict, replace
from itertools import chain

import pytest
import torch

from foundry_ext.records.record import read_items, read_record
from tests.system import kill_server, preloaded
from tests.training import kit

pytestmark = pytest.mark.more
NUM_DOCUMENTS = 300
TIMEOUT = 1500  # seconds for all attempts of a run


@pytest.fixture(scope="session")
def longer(world, tmp_path_factory, make_rows):
    """Return a world with epochs of some 30 batches."""
    path = tmp_path_factory.mktemp("longer") / "train.jsonl"
    rows = make_rows(NUM_DOCUMENTS, seed=3, longest=12)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(world, rows=path)


def settings(world, folder, method, workers):
    """Return settings as in the shipped YAMLs, with a checkpoint after every batch."""
    evaluated = kit.loader_config(world.eval_rows, eval_packs=1)
    target = {"role": "learning", "type": "documents", "loader": evaluated}
    return {
        "method": method,
        "run_name": "killed",
        "train_loader": {
            **kit.loader_config(world.rows, shuffle=True, shuffle_seed=3),
            "num_workers": workers,
        },
        "eval_loader": evaluated,
        "eval_interval": "7ba",
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0},
        "callbacks": {
            "spy": {},
            "diary": {"path": str(folder / "diary.jsonl")},
            "run_record": {"path": str(folder / "record.json"), "experiment": "killed"},
            "forgetting": {"items": str(folder / "items.jsonl"), "sets": {"target": target}},
            "guard": {},
            "exact_resume": {},
            "hf_export": {"folder": str(folder / "hf")},
        },
        "loggers": {"inmemory": {}, "metrics_file": {"path": str(folder / "metrics.jsonl")}},
        "log_config": True,
        "autoresume": True,
        "save_num_checkpoints_to_keep": 2,
    }


def run(world, folder, method, workers, kills=(), seed=0):
    """Run kill_server.py; return its counts of attempts, and of kills during a save or start."""
    folder.mkdir()
    paths = {name: str(path) for name, path in asdict(world).items()}
    job = {
        "world": paths,
        "settings": settings(world, folder, method, workers),
        "kills": list(kills),
        "seed": seed,
    }
    (folder / "job.json").write_text(json.dumps(job))
    log = folder / "server_log"
    server = preloaded.start(kill_server.main, folder, log=log, folder=folder)
    assert preloaded.wait([server], TIMEOUT) == [0], log.read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["code"] == 0, (folder / "log").read_text()[-5000:]
    return result


def read_lines(path):
    """Return the complete lines of a file, even after one that was cut off."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def documents_by_batch(folder):
    """Return the documents of each batch over all attempts, which must agree."""
    found: dict[int, list[str]] = {}
    for line in read_lines(folder / "diary.jsonl"):
        assert found.setdefault(line["batch"], line["documents"]) == line["documents"]
    return found


def losses_by_batch(folder):
    """Return the loss of each batch over all attempts, which must agree to the last bit."""
    found: dict[int, float] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        if (loss := line.get("loss/train/total")) is not None:
            assert found.setdefault(line["batch"], loss) == loss, line["batch"]
    return found


def assert_same_end(folder, reference):
    assert documents_by_batch(folder) == documents_by_batch(reference)
    assert losses_by_batch(folder) == losses_by_batch(reference)
    weights, expected = (torch.load(one / "weights.pt") for one in (folder, reference))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    (left, right) = (optimizer_state(one) for one in (folder, reference))
    assert left.keys() == right.keys() and left
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    exports = [
        {path.name: path.read_bytes() for path in (one / "hf").iterdir()}
        for one in (folder, reference)
    ]
    for export, one in zip(exports, (folder, reference), strict=True):
        text, _, _ = export["README.md"].rpartition(b"<!-- ")  # without the digest of the place
        export["README.md"] = text.replace(str(one).encode(), b"RUN")
    assert exports[0] == exports[1]
    record, other = (read_record(one / "record.json") for one in (folder, reference))
    assert record["status"] == other["status"] == "finished"
    for key in ("evaluations", "steps", "tokens"):
        assert without_seconds(record[key]) == without_seconds(other[key]), key
    assert read_items(folder / "items.jsonl") == read_items(reference / "items.jsonl")
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == sorted(path.name for path in (reference / "checkpoints").iterdir())


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


def optimizer_state(folder):
    latest = folder / "checkpoints" / "latest-rank0.pt"
    (optimizer,) = torch.load(latest, weights_only=False)["state"]["optimizers"].values()
    return {
        (name, key): value
        for name, state in optimizer["state"].items()
        for key, value in state.items()
    }


@pytest.fixture(scope="session")
def uninterrupted(longer, tmp_path_factory):
    """Return uninterrupted(method, workers): the folder of a run that was never killed."""
    made = {}

    def get(method, workers):
        if (method, workers) not in made:
            folder = tmp_path_factory.mktemp("kill") / "reference"
            run(longer, folder, method, workers)
            made[method, workers] = folder
        return made[method, workers]

    return get


def test_each_document_once_an_epoch(uninterrupted):
    """The uninterrupted run, which the others are compared with, has each document once."""
    batches = list(documents_by_batch(uninterrupted("lora", 0)).values())
    half = len(batches) // 2
    first, second = (list(chain(*part)) for part in (batches[:half], batches[half:]))
    assert len(first) == NUM_DOCUMENTS and sorted(first) == sorted(second) and first != second


def test_killed_some_times(longer, uninterrupted, tmp_path):
    kills = ["save", 0.3, "start", "save"]
    met = run(longer, tmp_path / "run", "lora", 0, kills)
    assert met["attempts"] == 5 and met["inside_a_save"] >= 1
    assert_same_end(tmp_path / "run", uninterrupted("lora", 0))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("method", kit.METHODS)
def test_killed_at_twenty_random_moments(longer, uninterrupted, tmp_path, method, workers):
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    kills = [
        *(moments.uniform(0, 0.4) for _ in range(10)),
        *["save"] * 7,
        *["start"] * 3,
    ]
    moments.shuffle(kills)
    met = run(longer, tmp_path / "run", method, workers, kills, seed)
    print(f"{method}, {workers} workers, seed {seed}: {met}")
    assert met["attempts"] == 21
    assert_same_end(tmp_path / "run", uninterrupted(method, workers))
