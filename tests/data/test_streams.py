"""MDS streams: plain text and tokens, cached by the shards' bytes, read by one rank of a node."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import datasets.config
import numpy as np
import pytest
from streaming import MDSWriter

from foundry_ext.data import batches, loading, streams
from foundry_ext.data.documents import Documents
from foundry_ext.data.streams import StoredRows, load_streams, tokenize_stream
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows
from tests.data.kit import build

TEXT = TokenizeSettings(max_seq_len=64, text_key="text", overlong="split")
TEXTS = ["a bird", "", "one two " * 40, "12<|endoftext|>", *(f"{i} stone" * 6 for i in range(40))]


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Return the list of rows that are read, as it happens."""
    rows, get = [], StoredRows.__getitem__
    monkeypatch.setattr(
        StoredRows, "__getitem__", lambda self, i: (rows.append(i), get(self, i))[1]
    )
    return rows


def write(folder: Path, rows, size_limit=600, **columns: str) -> dict:
    with MDSWriter(out=str(folder), columns=columns, size_limit=size_limit) as out:
        for row in rows:
            out.write(row)
    return {"local": str(folder)}


def write_text(folder: Path, texts=TEXTS) -> dict:
    rows = [{"url": "x", "text": text} for text in texts]
    return write(folder, rows, url="str", text="str")


def tokenize(dataset: dict, tokenizer, settings=TEXT, **options) -> Documents:
    return tokenize_stream(load_streams(dataset, tokenizer), tokenizer, settings, **options)


def contents(documents: Documents) -> list:
    every = documents.read(np.arange(len(documents)))
    return [(one.input_ids.tolist(), one.loss_mask.tolist()) for one in every]


def test_packed_text_of_a_stream_is_that_of_rows(tmp_path, tokenizer, write_jsonl):
    rows = write_jsonl([{"text": text} for text in TEXTS])
    common = {"max_seq_len": 64, "split": "train"}
    wanted = build(tokenizer, {**common, "hf_name": str(rows)}, name="packed_text")
    write_text(tmp_path / "remote" / "train")
    stream = {**common, "remote": str(tmp_path / "remote"), "local": str(tmp_path / "local")}
    two = {"a": write_text(tmp_path / "a", TEXTS[:9]), "b": write_text(tmp_path / "b", TEXTS[9:])}
    for dataset in (stream, {"max_seq_len": 64, "streams": two}):
        found = build(tokenizer, dataset, name="packed_text")
        assert found.dataloader.dataset.fingerprint == wanted.dataloader.dataset.fingerprint
        documents = found.dataloader.dataset.documents
        assert documents.counts == wanted.dataloader.dataset.documents.counts


def test_packed_text_takes_another_column(tmp_path, tokenizer):
    dataset = {**write_text(tmp_path / "mds"), "max_seq_len": 64, "text_key": "url"}
    documents = build(tokenizer, dataset, name="packed_text").dataloader.dataset.documents
    assert documents[0].input_ids.tolist() == [*tokenizer("x")["input_ids"], 0]
    with pytest.raises(ValueError, match="streams: row 0: no 'body' and no 'tokens'; there are"):
        build(tokenizer, {**dataset, "text_key": "body"}, name="packed_text")
    with pytest.raises(ValueError, match=r"dataset.hf_name does not go with dataset.local"):
        build(tokenizer, {**dataset, "hf_name": "a.jsonl"}, name="packed_text")


@pytest.mark.parametrize("form", ["int64", "uint16", "bytes"])
def test_stored_tokens_of_text_are_taken_as_they_are(tmp_path, tokenizer, form):
    """As llm-foundry's converters write them; nothing is put around them, all is learned."""
    ids = [np.array(one, "int32" if form == "bytes" else form) for one in ([5, 6, 7], [8] * 70)]
    rows = [{"tokens": one.tobytes() if form == "bytes" else one} for one in ids]
    dataset = write(tmp_path / "mds", rows, tokens="bytes" if form == "bytes" else "ndarray")
    if form == "bytes":
        dataset["token_encoding_type"] = "int32"
    documents = tokenize(dataset, tokenizer)
    pieces = [[5, 6, 7], [8] * 64, [8] * 6]
    assert contents(documents) == [(piece, [True] * len(piece)) for piece in pieces]


@pytest.mark.parametrize("token", [-1, 2**16, 2**40])
@pytest.mark.parametrize("key", ["tokens", "turns"])
def test_tokens_of_another_tokenizer_are_named(tmp_path, tokenizer, token, key):
    turns = [{"input_ids": [5], "labels": [token]}]
    rows = [{"tokens": np.array([5, token])} if key == "tokens" else {"turns": turns}]
    dataset = write(tmp_path / "mds", rows, **{key: "ndarray" if key == "tokens" else "json"})
    settings = TEXT if key == "tokens" else TokenizeSettings(max_seq_len=64)
    with pytest.raises(ValueError, match=rf"row 0: .*{token}"):
        tokenize(dataset, tokenizer, settings)


def test_the_second_time_no_row_is_read(tmp_path, tokenizer, read):
    """The cache knows the shards by their bytes, wherever they lie."""
    first = tokenize(write_text(tmp_path / "mds"), tokenizer)
    assert read == list(range(len(TEXTS)))
    shutil.copytree(tmp_path / "mds", tmp_path / "copy")
    again = tokenize({"local": str(tmp_path / "copy")}, tokenizer)
    assert len(read) == len(TEXTS)
    assert contents(again) == contents(first) and again.fingerprint == first.fingerprint
    shard = tmp_path / "copy" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"a bird", b"a bard"))
    other = tokenize({"local": str(tmp_path / "copy")}, tokenizer)
    assert other.fingerprint != first.fingerprint
    tokenize(
        {"local": str(tmp_path / "mds")},
        tokenizer,
        TokenizeSettings(max_seq_len=32, text_key="text"),
    )
    assert len(read) == 3 * len(TEXTS)


def test_bytes_of_another_encoding_are_other_tokens(tmp_path, tokenizer):
    dataset = write(
        tmp_path / "mds", [{"tokens": np.arange(8, dtype=np.int32).tobytes()}], tokens="bytes"
    )
    wide = tokenize({**dataset, "token_encoding_type": "int32"}, tokenizer)
    small = tokenize({**dataset, "token_encoding_type": "uint16"}, tokenizer)
    assert (len(wide[0].input_ids), len(small[0].input_ids)) == (8, 16)


@pytest.mark.parametrize("way", ["processes", "cache_limit"])
def test_processes_and_evicted_shards_change_nothing(tmp_path, tokenizer, monkeypatch, way):
    monkeypatch.setattr(batches, "_BYTES_PER_PROCESS", 100)
    wanted = contents(tokenize(write_text(tmp_path / "mds"), tokenizer))
    assert len(list((tmp_path / "mds").glob("*.mds"))) > 5
    dataset = {"remote": str(tmp_path / "mds"), "local": str(tmp_path / "local")}
    if way == "cache_limit":
        index = tmp_path / "mds" / "index.json"
        dataset["cache_limit"] = index.stat().st_size + 2800  # four shards
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    assert contents(tokenize(dataset, tokenizer, num_proc=3)) == wanted
    if way == "cache_limit":
        left, every = (len(list((tmp_path / one).glob("*.mds"))) for one in ("local", "mds"))
        assert left < every


def test_an_empty_shard_is_no_fault(tmp_path, tokenizer):
    """A row above the writer's limit leaves one before it."""
    ids = np.arange(100) % 50
    dataset = write(tmp_path / "mds", [{"tokens": ids}] * 2, tokens="ndarray")
    assert len(load_streams(dataset, tokenizer).shards[0]) == 0
    assert tokenize(dataset, tokenizer).lengths.tolist() == [64, 36] * 2


def test_too_little_space_is_known_before(tmp_path, tokenizer, monkeypatch):
    rows = [{"text": "one two " * 125}] * 40
    texts = write(tmp_path / "text", rows, size_limit=10**6, text="str")
    tokens = write(tmp_path / "tokens", [{"tokens": np.zeros(10**4, np.int64)}], tokens="ndarray")

    def refuses(dataset: dict, free: int) -> bool:
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("foundry_ext.data.full_disk.shutil.disk_usage", lambda _: usage)
        monkeypatch.setattr(streams, "write_table", lambda *_: pytest.fail("space seemed enough"))
        try:
            tokenize(dataset, tokenizer)
        except OSError as error:
            assert "HF_DATASETS_CACHE" in str(error)
            return True
        except pytest.fail.Exception:
            return False
        raise AssertionError

    # Half of the usual need, which is 10^4 tokens of 2 bytes, and the same of 40 kB of text.
    assert (refuses(texts, 9_000), refuses(texts, 11_000)) == (True, False)
    assert (refuses(tokens, 9_000), refuses(tokens, 11_000)) == (True, False)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_the_other_ranks_of_a_node_neither_read_nor_hash(
    tmp_path, tokenizer, write_jsonl, monkeypatch, read, kind
):
    dataset = {"max_seq_len": 64, "split": "train"}
    write_text(tmp_path / "mds" / "train")
    dataset |= {
        "stream": {"local": str(tmp_path / "mds")},
        "file": {"hf_name": str(write_jsonl([{"text": text} for text in TEXTS]))},
    }[kind]
    found = []

    @contextlib.contextmanager
    def as_rank(node):
        yield node
        found.append(node)

    monkeypatch.setattr(loading, "local_rank_zero_first", lambda: as_rank({}))
    first = build(tokenizer, dataset, name="packed_text").dataloader.dataset
    (node,), num_read = found, len(read)
    assert set(node) == ({"key"} if kind == "stream" else {"key", "revision"})
    monkeypatch.setattr(loading, "local_rank_zero_first", lambda: as_rank(node))
    with monkeypatch.context() as patch:
        patch.setattr(streams, "content_digest", pytest.fail)
        patch.setattr(loading, "load_rows", pytest.fail)
        other = build(tokenizer, dataset, name="packed_text").dataloader.dataset
    assert len(read) == num_read
    assert other.fingerprint == first.fingerprint
    assert other.description == first.description
    # Where that table is not, a rank makes its own.
    shutil.rmtree(tmp_path / "cache")
    again = build(tokenizer, dataset, name="packed_text").dataloader.dataset
    assert again.fingerprint == first.fingerprint


def test_rows_and_streams_are_tokenised_alike(tmp_path, tokenizer):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    expected = tokenize_rows(rows, tokenizer, TEXT)
    assert contents(tokenize(write_text(tmp_path / "mds"), tokenizer)) == contents(expected)
