"""Ranks that wait without a time limit, hear of one another's end, and compare what they have."""

import datetime
import os
import time
from pathlib import Path

import pytest
import torch.distributed

from foundry_ext.data import ranks
from foundry_ext.utils.errors import UserError
from tests.system import preloaded
from tests.system.ranks import free_port, last_lines

COLLECTIVES = 1.0  # seconds that a collective may take
PREFIX = "says: "


def enter(scene: str) -> None:
    """Run a scene as one rank; print an error."""
    ranks._BEAT, ranks._SILENCE, ranks._POLL, ranks._LEAVE = 0.1, 1.5, 0.02, 0.5
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=COLLECTIVES))
    rank = torch.distributed.get_rank()
    try:
        SCENES[scene](rank)
        print(f"{PREFIX}done", flush=True)
        time.sleep(0.3)  # rank 0's process holds what the others still look at
    except UserError as error:
        print(f"{PREFIX}{error}", flush=True)


def slow(rank: int) -> None:
    """The first node's rank works for much longer than a collective may take."""
    with ranks.local_rank_zero_first():
        if rank == 0:
            time.sleep(3 * COLLECTIVES)


def in_turn(rank: int) -> None:
    with ranks.local_rank_zero_first():
        path = Path("turn")
        if rank == 0:
            time.sleep(0.3)
            path.touch()
        assert path.exists()


def hands_over(rank: int) -> None:
    """Each node's first rank finds something out; its other ranks, if any, are given that."""
    local_rank = int(os.environ["LOCAL_RANK"])
    with ranks.local_rank_zero_first() as node:
        assert node == ({"key": 0} if local_rank else {}), node
        node["key"] = rank
    with ranks.local_rank_zero_first() as node:
        assert node == {}


def dies(rank: int) -> None:
    with ranks.local_rank_zero_first():
        if rank == 1:
            os._exit(7)


def first_dies(rank: int) -> None:
    with ranks.local_rank_zero_first():
        if rank == 0:
            os._exit(7)


def fails(rank: int) -> None:
    with ranks.local_rank_zero_first():
        if rank == 1:
            raise UserError("row 3 is\nbad")


def fails_outside(rank: int) -> None:
    if rank == 1:
        with ranks.telling_others():
            raise UserError("key is bad")
    slow(rank=-1)


def differ(rank: int) -> None:
    items = {"a": 1, "b": 0 if rank else 0.0, "nan": float("nan")}
    ranks.check_same(items, "way out")
    ranks.check_same({**items, "c": rank, "d": "x" * rank, "e": [rank]}, "way out")


SCENES = {
    scene.__name__: scene
    for scene in (slow, in_turn, hands_over, dies, first_dies, fails, fails_outside, differ)
}


def play(scene, folder: Path, *, num_nodes: int = 2) -> list[str]:
    """Return what each of two ranks says at the end of the scene, "" if nothing."""
    local = 2 // num_nodes
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    logs = [folder / f"log{rank}.txt" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        node, local_rank = divmod(rank, local)
        own = {"RANK": rank, "LOCAL_RANK": local_rank, "NODE_RANK": node}
        own = {name: str(value) for name, value in own.items()}
        arguments = (enter, scene.__name__)
        processes.append(preloaded.start(*arguments, log=log, folder=folder, **common, **own))
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            for one in processes:
                one.kill()
            pytest.fail(f"waits: {last_lines(logs)}")
    texts = [log.read_text() for log in logs]
    assert not any("Traceback" in text for text in texts), texts
    said = [
        [line for line in text.splitlines() if line.startswith(PREFIX)] or [""] for text in texts
    ]
    return [lines[-1].removeprefix(PREFIX) for lines in said]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_rank_may_work_longer_than_a_collective_may_take(tmp_path, num_nodes):
    assert play(slow, tmp_path, num_nodes=num_nodes) == ["done", "done"]


def test_the_nodes_first_rank_is_first(tmp_path):
    assert play(in_turn, tmp_path, num_nodes=1) == ["done", "done"]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_what_the_first_rank_finds_is_the_nodes(tmp_path, num_nodes):
    assert play(hands_over, tmp_path, num_nodes=num_nodes) == ["done", "done"]


def test_a_rank_that_dies_is_named(tmp_path):
    first, second = play(dies, tmp_path)
    assert second == ""
    assert first.startswith("rank 1 (node 1, ") and "has not been heard of for" in first


def test_the_death_of_the_first_rank_is_named(tmp_path):
    first, second = play(first_dies, tmp_path)
    assert first == ""
    assert second.startswith("rank 0 (on node 0) has ended") or "rank 0 (node 0, " in second


@pytest.mark.parametrize(
    ("scene", "text"), [(fails, "row 3 is bad"), (fails_outside, "key is bad")]
)
def test_a_fault_reaches_those_who_wait(tmp_path, scene, text):
    first, second = play(scene, tmp_path)
    assert " ".join(second.split()) in (text, text.removesuffix(" bad"))
    assert first.startswith("rank 1 (node 1, ") and first.endswith(f"has failed: {text}")


def test_differences_are_named_on_all_ranks(tmp_path):
    first, second = play(differ, tmp_path)
    assert first == second
    assert "c: 0 on rank 0 (node 0, " in first and "c, 1 on rank 1" not in first
    for text in ("1 on rank 1 (node 1, ", "'x' on rank 1", "[1] on rank 1", "way out"):
        assert text in first
    assert "a: " not in first and "b: " not in first and "nan" not in first


def test_an_error_stays_when_the_store_of_rank_0_is_gone(monkeypatch):
    def gone(meeting):
        raise UserError("rank 0 (on node 0) has ended")

    monkeypatch.setattr(ranks, "_can_meet", lambda: True)
    monkeypatch.setattr(ranks, "_get_default_store", torch.distributed.HashStore)
    monkeypatch.setattr(ranks._Meeting, "__enter__", gone)
    with pytest.raises(OSError, match="no such rows"), ranks.telling_others():
        raise OSError("no such rows")


def test_one_process_waits_for_nobody():
    with ranks.local_rank_zero_first():
        pass
    ranks.check_same({"a": 1}, "")
    ranks.tell_others("x")
    assert ranks.hear_others() is None
