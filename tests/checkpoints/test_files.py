"""Checkpoint files are written atomically, and a corrupted one is noticed. (Trap 40.)"""

import errno
import random

import pytest
import torch

from foundry_ext.checkpoints import files as checkpoint_files
from foundry_ext.checkpoints.files import (
    damage,
    find_checkpoints,
    has_any,
    newest_intact,
    remove_partial,
    set_aside,
)
from foundry_ext.checkpoints.load_path import check_load_path
from foundry_ext.utils.errors import UserError

TEMPLATE = "ep{epoch}-ba{batch}-rank{rank}.pt"


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
    found = find_checkpoints(tmp_path, TEMPLATE)
    assert [path.name for path in found] == names


def test_the_one_before_is_taken(whole, caplog):
    """The damaged ones keep their names until the run goes on."""
    second, third = (whole.with_name(f"ep0-ba{n}-rank0.pt") for n in (2, 3))
    second.write_bytes(whole.read_bytes()[:-100])
    third.touch()
    intact, problems = newest_intact([whole, second, third])
    assert intact == [whole] and set(problems) == {second, third}
    assert {path.name for path in whole.parent.iterdir()} == {p.name for p in (whole, *problems)}
    set_aside(problems, intact=whole)
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
        with pytest.raises(ValueError, match=rf"no checkpoint is intact.*{whole.name} cannot"):
            newest_intact(find_checkpoints(whole.parent, TEMPLATE))
    assert newest_intact([]) == ([], {})


def test_what_a_killed_saver_began_is_no_checkpoint(whole):
    """A run killed in its first save starts again from the beginning."""
    begun = whole.with_name(f"partial-{whole.name}")
    whole.rename(begun)
    assert not has_any(begun.parent, TEMPLATE, besides=None)
    begun.rename(whole.with_name("partial-other.pt"))
    assert has_any(begun.parent, TEMPLATE, besides=None)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state": 3}, "text", torch.zeros(2)])
def test_what_is_no_run_s_state_is_passed_over(whole, content):
    newest = whole.with_name("ep0-ba2-rank0.pt")
    torch.save(content, newest)
    intact, problems = newest_intact([whole, newest])
    assert intact == [whole]
    assert f"holds a {type(content).__name__}" in problems[newest]
    with pytest.raises(UserError, match=r"a\.pt holds a .*; name another checkpoint"):
        check_load_path(str(newest.rename(newest.with_name("a.pt"))))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO])
def test_a_file_that_cannot_be_read_is_passed_over(whole, monkeypatch, caplog, number):
    """It is named, not called damaged, and not renamed."""
    newest = whole.with_name("ep0-ba2-rank0.pt")
    newest.write_bytes(whole.read_bytes())

    def opened(path, *args, **kwargs):
        if path == newest:
            raise OSError(number, "the system's reason", str(path))
        return original(path, *args, **kwargs)

    original = checkpoint_files.Path.open
    monkeypatch.setattr(checkpoint_files.Path, "open", opened)
    assert newest_intact([whole, newest]) == ([whole], {})
    said = [record.getMessage() for record in caplog.records]
    for check in (lambda: newest_intact([newest]), lambda: check_load_path(str(newest))):
        with pytest.raises(UserError) as refused:
            check()
        said.append(str(refused.value))
    for text in said:
        assert newest.name in text and "the system's reason" in text
        assert "damaged" not in text and "\n" not in text
    assert newest.exists() and len(list(whole.parent.iterdir())) == 2


FOREIGN = [
    *("partial-results.csv", "partial-notes", "partial-ep1.pt", "partial-ep0-ba1-rank0.pt.bak"),
    *("below/partial-ep0-ba1-rank0.pt", "below/partial-latest-rank0.pt", "partial-"),
    *("x-partial-ep0-ba1-rank0.pt", "partial-epx-ba1-rank0.pt", "partial-damaged.pt"),
]


@pytest.mark.parametrize(
    ("template", "ours"),
    [
        ("ep{epoch}-ba{batch}-rank{rank}.pt", "partial-ep0-ba1-rank0.pt"),
        ("ep{epoch}/ba{batch}.pt", "ep3/partial-ba12.pt"),
        ("[x]*ba{batch}.pt", "partial-[x]*ba7.pt"),  # no pattern of the shell's
    ],
)
def test_only_what_this_saver_began_is_removed(tmp_path, template, ours):
    """Others' files have names that begin alike, or lie in the folders of other runs."""
    for name in [*FOREIGN, ours, "partial-latest-rank0.pt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    if template != TEMPLATE:
        (tmp_path / "partial-ep0-ba1-rank0.pt").write_text("another template's")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    remove_partial(tmp_path, template, str(tmp_path / "latest-rank0.pt"))
    gone = before - {path for path in tmp_path.rglob("*") if path.is_file()}
    assert gone == {tmp_path / ours, tmp_path / "partial-latest-rank0.pt"}


def test_checkpoints_of_a_run_below_are_its_own(tmp_path):
    names = ["a/ep0-ba2-rank0.pt", "a/checkpoints/ep0-ba3-rank0.pt", "a/latest-rank0.pt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_checkpoints(tmp_path, TEMPLATE) == []
    assert not has_any(tmp_path, TEMPLATE, besides=None)
    assert has_any(tmp_path, "a/x{batch}.pt", besides=None)
    assert find_checkpoints(tmp_path, "a/" + TEMPLATE) == [tmp_path / names[0]]
