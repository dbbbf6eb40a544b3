"""A damaged table of tokens is found when it is first read, and made anew."""

import errno
import json
import random
import shutil
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest

from foundry_ext.data import cache
from foundry_ext.data import cached_documents as module
from foundry_ext.data import documents as documents_module
from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.data.row_outcome import RowOutcome
from foundry_ext.data.table import Record, Tokens, to_table, write_table
from foundry_ext.utils.errors import UserError
from tests.data.kit import build

NUM = 60
ALL = np.arange(NUM)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Return the folder of the table, in a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "foundry_ext" / "key"


@pytest.fixture
def made() -> list[int]:
    """Return a list that gets an element whenever the table is made."""
    return []


@pytest.fixture(params=["today", "yesterday"])
def read(made, request):
    """Return a function that reads the table, as a run's start does.

    An earlier version's tables have the columns of FEATURES.
    """
    rng = random.Random(0)
    ids = [[rng.randrange(300) for _ in range(rng.randint(2, 30))] for _ in range(NUM)]
    columns = {
        "input_ids": ids,
        "has_loss": [[1] * len(one) for one in ids],
        "outcome": [0] * NUM,
        "num_cut": [0] * NUM,
    }

    def write(folder: Path) -> None:
        made.append(1)
        if request.param == "today":
            tokens = [Tokens(np.array(one), np.arange(len(one)) % 7 < 3) for one in ids]
            records = [Record(one, RowOutcome.KEPT) for one in tokens]
            parts = [records[at : at + 20] for at in range(0, NUM, 20)]
            tables = (to_table(part, max_id=300, with_responses=True) for part in parts)
            write_table(folder / "part.arrow", [range(NUM)] * 3, tables, "")
            return
        rows = datasets.Dataset.from_dict(columns, features=FEATURES)
        rows.map(
            lambda row: row,
            cache_file_name=str(folder / "part.arrow"),
            writer_batch_size=20,
            features=FEATURES,
        )

    return lambda: module.cached_documents("key", write)


def contents(documents: Documents) -> list:
    return [(one.input_ids.tolist(), one.loss_mask.tolist()) for one in documents.read(ALL)]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.unlink()  # other readers have the old one mapped
    path.write_bytes(data)


def test_no_flipped_byte_is_trained_on(read, folder, made, caplog):
    """Flip one byte after another, in every part of the file."""
    whole = contents(read())
    size = (folder / "part.arrow").stat().st_size
    found = {"start": 0, "first read": 0, "harmless": 0}
    for place in random.Random(1).sample(range(size), 60):
        caplog.clear()
        before = len(made)
        flip(folder / "part.arrow", place)
        documents = read()
        try:
            assert contents(documents) == whole
        except UserError as error:
            found["first read"] += 1
            assert "\n" not in str(error) and str(folder) in str(error)
            assert "start the same command again" in str(error)
            assert contents(read()) == whole
            assert len(made) == before + 1
        else:
            found["start" if len(made) > before else "harmless"] += 1
            if len(made) == before:
                flip(folder / "part.arrow", place)
        if len(made) > before:
            assert caplog.text.count("making it anew") == 1
    # Padding, and names and sizes that no reader uses, are in no checksum.
    assert found["start"] > 5 and found["first read"] > 5, found


def test_documents_of_whole_blocks_are_read(read, folder, monkeypatch):
    """A block is compared once, at its first document, and no other block is."""
    monkeypatch.setattr(documents_module, "_BLOCK", 16)
    whole = contents(read())
    data = (folder / "part.arrow").read_bytes()
    # The last document of the first chunk, of 20, by its ids.
    dtype = read()[0].input_ids.dtype
    ids = np.array(whole[19][0], dtype).tobytes()
    flip(folder / "part.arrow", data.index(ids) + len(ids) - dtype.itemsize)
    documents = read()
    assert documents[0].input_ids.tolist() == whole[0][0]
    assert documents[20].input_ids.tolist() == whole[20][0]
    with pytest.raises(UserError, match="documents 0 to 19 are not those"):
        documents.read(ALL[[59, 19]])
    documents = read()  # made anew
    hashed = []
    hash_block = Documents._hash_block

    def note(self, *block):
        hashed.append(block)
        return hash_block(self, *block)

    monkeypatch.setattr(Documents, "_hash_block", note)
    assert contents(documents) == contents(documents) == whole
    assert len(hashed) == len(set(hashed)) == sum(map(documents._num_blocks, range(3))) > 30


@pytest.mark.parametrize("name", ["whole.json", "about.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', '{"a": 1}', "\x00" * 40])
def test_a_damaged_description_is_made_anew_with_a_line(read, folder, made, caplog, name, text):
    whole = contents(read())
    size = (folder / name).stat().st_size
    (folder / name).write_text(text)
    assert contents(read()) == whole
    assert len(made) == 2
    assert caplog.text.count("making it anew") == 1
    assert str(folder) in caplog.text
    assert (folder / name).stat().st_size == size


@pytest.mark.parametrize("key", ["files", "fingerprint", "checksums"])
def test_another_description_of_the_same_size_is_found(read, folder, made, key):
    read()
    path = folder / "about.json"
    about = json.loads(path.read_text())
    digit = {"files": "part", "fingerprint": about["fingerprint"]}.get(key)
    digit = digit or about["checksums"]["index"]
    text = path.read_text().replace(digit, digit[::-1], 1)
    assert len(text) == path.stat().st_size
    path.write_text(text)
    documents = read()
    assert len(made) == 2
    assert documents.fingerprint == about["fingerprint"]


def test_a_table_without_checksums_is_made_anew(read, folder, made, caplog):
    """An earlier version wrote only files and fingerprint."""
    read()
    about = json.loads((folder / "about.json").read_text())
    del about["checksums"]
    (folder / "about.json").write_text(json.dumps(about))
    sizes = {path.name: path.stat().st_size for path in folder.glob("[ap]*")}
    (folder / "whole.json").write_text(json.dumps(sizes))
    read()
    assert len(made) == 2
    assert "an earlier version wrote it, without checksums" in caplog.text


def test_a_table_that_cannot_be_marked_is_named(read, folder, monkeypatch):
    documents = read()
    first = documents[0].input_ids
    data = (folder / "part.arrow").read_bytes()
    flip(folder / "part.arrow", data.index(first.tobytes()))

    def refuse(*_):
        raise PermissionError("read-only")

    documents = read()
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match="delete the folder and start the same command again"):
        documents[0]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=repr
)
def test_a_passing_fault_of_the_machine_discards_nothing(read, made, monkeypatch, error):
    whole = contents(read())

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read_table", fail)
        with pytest.raises(type(error)):
            read()
    assert contents(read()) == whole
    assert len(made) == 1


@pytest.mark.parametrize("error", [OSError("Expected to read 9 bytes"), OSError(errno.EIO, "")])
def test_a_fault_of_the_bytes_is_made_anew(read, made, monkeypatch, error):
    whole, read_table = contents(read()), module._read_table
    errors = [error]

    def fail_once(*arguments):
        if errors:
            raise errors.pop()
        return read_table(*arguments)

    monkeypatch.setattr(module, "_read_table", fail_once)
    assert contents(read()) == whole
    assert len(made) == 2


def test_a_table_made_anew_by_another_process_meanwhile_is_read(read, folder, made, monkeypatch):
    """The other one has removed the damaged folder when this one wants to mark it."""
    whole, discard = contents(read()), cache.discard
    flip(folder / "about.json", 3)

    def remove_and_discard(*arguments):
        shutil.rmtree(folder)
        assert discard(*arguments)
        assert not folder.exists()
        return True

    monkeypatch.setattr(cache, "discard", remove_and_discard)
    assert contents(read()) == whole
    assert len(made) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_says_it_in_one_line(
    tokenizer, make_rows, write_jsonl, tmp_path, num_workers, monkeypatch
):
    path = write_jsonl(make_rows(20))
    dataset = {"hf_name": str(path), "split": "train", "max_seq_len": 64}
    spec = build(tokenizer, dataset, num_workers=num_workers)
    stored = spec.dataloader.dataset.documents._stored
    part = stored.folder / "part.arrow"
    ids = spec.dataloader.dataset.documents[3].input_ids
    flip(part, part.read_bytes().index(ids.tobytes()))
    spec = build(tokenizer, dataset, num_workers=num_workers)
    with pytest.raises(UserError) as raised:
        list(spec.dataloader)
    assert str(raised.value).startswith(f"token cache {stored.folder}: tokens of documents")
    assert "\n" not in str(raised.value).strip()
    assert len(list(build(tokenizer, dataset).dataloader)) > 0
