"""Checkpoint files are written atomically, and a corrupted one is noticed. (Trap 40.)"""

import random

import pytest
import torch

from foundry_ext.checkpoints import files as checkpoint_files
from foundry_ext.checkpoints.files import damage, find_checkpoints, keep_intact


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "ep0-ba1-rank0.pt"
    torch.manual_seed(0)
    torch.save({"state": {"model": {"w": torch.randn(300)}}, "rng": [1, 2]}, path)
    return path


def test_cut_anywhere_is_noticed(whole):
    content = whole.read_bytes()
    assert damage(whole) is None
    for end in range(0, len(content), 61):
        whole.write_bytes(content[:end])
        assert damage(whole), end


def test_a_flipped_bit_is_noticed_or_changes_nothing(whole):
    """A flipped bit may change nothing, because a zip has padding and fields that nobody reads."""
    content, expected = whole.read_bytes(), torch.load(whole)
    rng, noticed = random.Random(0), 0
    for _ in range(300):
        corrupted = bytearray(content)
        corrupted[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        whole.write_bytes(corrupted)
        if damage(whole):
            noticed += 1
            continue
        found = torch.load(whole)
        assert torch.equal(found["state"]["model"]["w"], expected["state"]["model"]["w"])
        assert found["rng"] == expected["rng"]
    assert noticed > 100


def test_what_is_not_finished_is_not_there(whole):
    before = whole.read_bytes()
    with pytest.raises(OSError), checkpoint_files.replaced_checkpoint(whole) as partial:
        partial.write_bytes(before[:100])
        raise OSError(28, "No space left on device")
    assert whole.read_bytes() == before
    assert list(whole.parent.iterdir()) == [whole]


def test_the_link_is_replaced_in_one_step(whole, monkeypatch):
    """With os.remove and os.symlink the link is briefly missing, and Composer would start anew."""
    link, other = whole.with_name("latest-rank0.pt"), whole.with_name("ep0-ba2-rank0.pt")
    other.touch()
    checkpoint_files.link_to(whole, link)
    seen = []
    replace = checkpoint_files.os.replace

    def watched(source, target):
        seen.append(link.resolve().name)
        replace(source, target)
        seen.append(link.resolve().name)

    monkeypatch.setattr(checkpoint_files.os, "replace", watched)
    checkpoint_files.link_to(other, link)
    assert seen == [whole.name, other.name]
    assert not link.readlink().is_absolute(), "the folder may be moved"


def test_found_by_their_numbers(tmp_path):
    names = ["ep0-ba2-rank0.pt", "ep0-ba10-rank0.pt", "ep1-ba9-rank0.pt", "ep1-ba100-rank0.pt"]
    for name in [*reversed(names), "partial-ep2-ba1-rank0.pt", "damaged-ep0-ba3-rank0.pt", "x.pt"]:
        (tmp_path / name).touch()
    (tmp_path / "ep7-ba700-rank0.pt").symlink_to(names[0])
    found = find_checkpoints(tmp_path, "ep{epoch}-ba{batch}-rank{rank}.pt")
    assert [path.name for path in found] == names


def test_the_one_before_is_taken(whole, caplog):
    second, third = (whole.with_name(f"ep0-ba{n}-rank0.pt") for n in (2, 3))
    second.write_bytes(whole.read_bytes()[:-100])
    third.touch()
    assert keep_intact([whole, second, third]) == [whole]
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {third} is empty; renamed to damaged-{third.name},"
        f" continuing from {whole.name}",
        next(r.getMessage() for r in caplog.records if str(second) in r.getMessage()),
    ]
    names = {path.name for path in whole.parent.iterdir()}
    assert names == {whole.name, f"damaged-{second.name}", f"damaged-{third.name}"}


def test_none_whole_is_an_error_and_stays_one(whole):
    """No new run starts, not even at the second attempt, which must not find an empty folder."""
    whole.write_bytes(whole.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"all checkpoints are damaged.*{whole.name} cannot"):
            keep_intact(find_checkpoints(whole.parent, "ep{epoch}-ba{batch}-rank{rank}.pt"))
    assert keep_intact([]) == []
