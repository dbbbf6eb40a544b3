"""Preparing: the tokens are those of the loaders, whatever parts, processes and kills made them."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foundry_ext.data.prepared import making, merging
from foundry_ext.data.prepared.merging import Part, merge_parts
from foundry_ext.data.prepared.preparing import Prepared, prepare
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.packing.batch import Pack
from foundry_ext.utils.errors import UserError
from tests.data.kit import build, split_documents, walk

TEXT = {"max_seq_len": 32, "pack_tokens": 64, "split": "train"}


def make(tokenizer, section: dict, out: Path, name: str = "packed_text", **options) -> Prepared:
    options = {"workers": 1, "shard_bytes": 400, **options}
    return prepare(section, tokenizer, name=name, tokenizer_name="tiny", out=str(out), **options)


def documents_of(batches: list[list[Pack]]) -> Counter:
    return Counter(
        (tuple(ids), tuple(labels))
        for batch in batches
        for pack in batch
        for ids, labels in zip(split_documents(pack), split_documents(pack, "labels"), strict=True)
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file that is not about parts."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "parts"
    }


@pytest.fixture
def texts(make_rows) -> list[dict]:
    rows = [{"text": row["prompt"] + row["response"]} for row in make_rows(80)]
    return [*rows, {"text": ""}, {"text": "last"}]


@pytest.fixture
def text_section(texts, write_jsonl, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)  # where ranks signal one another
    return {**TEXT, "hf_name": str(write_jsonl(texts, "texts.jsonl"))}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv", "folder"])
def test_documents_are_those_of_the_loader(kind, tokenizer, texts, text_section, tmp_path):
    import gzip

    lines = Path(text_section["hf_name"]).read_bytes()
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "csv":
        datasets.Dataset.from_list(texts[:80]).to_csv(path)
    elif kind == "parquet":
        write_parquet(path, texts)
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        write_parquet(path / "a.parquet", texts[:50])
        write_parquet(path / "b.parquet", texts[50:])
    else:
        path.write_bytes(lines)
    section = {**text_section, "hf_name": str(path)}
    result = make(tokenizer, section, tmp_path / "out")
    assert result.shards > 2 and result.has_index
    loader = build(tokenizer, {**section, "prepared": str(tmp_path / "out")}, name="packed_text")
    expected = build(tokenizer, section, name="packed_text")
    assert documents_of(walk(loader)) == documents_of(walk(expected))
    assert (
        loader.dataloader.dataset.documents.counts == expected.dataloader.dataset.documents.counts
    )


def write_gsm8k(row: dict) -> dict:
    return {"prompt": row["question"], "response": row["answer"] or "?"}


@pytest.mark.parametrize("kind", ["prompts", "chats", "preprocessed"])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_rows_with_prompts(
    kind, overlong, tokenizer, make_rows, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = make_rows(60)
    if kind == "chats":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["response"]},
                ]
                * (1 + number % 2)
            }
            for number, row in enumerate(rows)
        ]
    if kind == "preprocessed":
        rows = [{"question": row["prompt"], "answer": row["response"]} for row in rows]
        del rows[7]["answer"]  # a column of the others is null here
    section = {"hf_name": str(write_jsonl(rows)), "split": "train", "max_seq_len": 40}
    section |= {"pack_tokens": 64, "overlong": overlong}
    if kind == "preprocessed":
        section["preprocessing_fn"] = f"{__name__}:write_gsm8k"
    make(tokenizer, section, tmp_path / "out", "packed_finetuning")
    loader = build(tokenizer, {**section, "prepared": str(tmp_path / "out")})
    expected = build(tokenizer, section)
    assert documents_of(walk(loader)) == documents_of(walk(expected))
    assert (
        loader.dataloader.dataset.documents.counts == expected.dataloader.dataset.documents.counts
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_holdout_is_that_of_the_loader(
    kind, tokenizer, make_rows, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["prompt"], "id": f"{i % 20}"} for i, row in enumerate(make_rows(60))]
    path = write_jsonl(rows)
    if kind == "csv":  # read as a table
        path = tmp_path / "rows.csv"
        datasets.Dataset.from_list(rows).to_csv(path)
    section = {**TEXT, "hf_name": str(path)}
    for part in ("train", "eval"):
        holdout = {"by": "id", "fraction": 0.3, "part": part}
        make(tokenizer, {**section, "holdout": holdout}, tmp_path / part)
        loader = build(tokenizer, {**section, "prepared": str(tmp_path / part)}, name="packed_text")
        expected = build(tokenizer, {**section, "holdout": holdout}, name="packed_text")
        assert documents_of(walk(loader)) == documents_of(walk(expected))


def test_parts_and_processes_make_the_same_files(tokenizer, text_section, tmp_path):
    make(tokenizer, text_section, tmp_path / "whole")
    for number in (3, 1, 2):
        make(tokenizer, text_section, tmp_path / "split", part=Part(number, 3), workers=2)
        if number != 2:
            with pytest.raises(UserError, match=r"parts .*2/3 are not finished; run .* --part"):
                merge_parts(Storage(str(tmp_path / "split")))
    merge_parts(Storage(str(tmp_path / "split")))
    assert files_of(tmp_path / "split") == files_of(tmp_path / "whole")


def test_finished_shards_are_not_made_again(tokenizer, text_section, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []
    make(tokenizer, text_section, out)
    before = files_of(out)
    monkeypatch.setattr(making, "write_shard", lambda *_, **__: made.append(1))
    make(tokenizer, text_section, out)
    assert not made and files_of(out) == before


def test_killed_anywhere_it_goes_on(tokenizer, text_section, tmp_path, monkeypatch):
    make(tokenizer, text_section, tmp_path / "whole")
    write, stops = making.write_shard, [0, 1, 3, 4]
    calls: list[int] = []

    def failing(folder, rows, **options):
        calls.append(1)
        about = write(folder, rows, **options)
        if stops and len(calls) > stops[0]:
            raise KeyboardInterrupt
        return about

    monkeypatch.setattr(making, "write_shard", failing)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            make(tokenizer, text_section, tmp_path / "out")
        stops.pop(0)
        calls.clear()
    make(tokenizer, text_section, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # 0 + 1 + 3 + 4 shards were made before the kills, and none of them again.
    assert len(calls) == len(list((tmp_path / "whole" / "shards").iterdir())) - 8


def test_half_a_shard_is_made_again(tokenizer, text_section, tmp_path):
    make(tokenizer, text_section, tmp_path / "out")
    before = files_of(tmp_path / "out")
    one, other, *_ = sorted((tmp_path / "out" / "shards").iterdir())
    (one / "about.json").unlink()
    (other / "shard.00000.mds").write_bytes(b"half")
    make(tokenizer, text_section, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_leftovers_of_a_killed_process_are_removed(tokenizer, text_section, tmp_path):
    from foundry_ext.utils.processes import machine_name

    shards = tmp_path / "out" / "shards"
    dead = shards / f"{'0' * 32}.{machine_name()}.{2**22 + 1}.abc.part"
    alive = shards / f"{'0' * 32}.{machine_name()}.1.abc.part"
    elsewhere = shards / f"{'0' * 32}.othermachine.{2**22 + 1}.abc.part"
    for folder in (dead, alive, elsewhere):
        folder.mkdir(parents=True)
    make(tokenizer, text_section, tmp_path / "out")
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_counts_add_up_to_the_rows(tokenizer, text_section, texts, tmp_path):
    result = make(tokenizer, text_section, tmp_path / "out")
    assert result.rows == len(texts)
    about = json.loads((tmp_path / "out" / "prepared.json").read_text(encoding="utf-8"))
    assert about["rows"] == sum(shard["rows"] for shard in about["shards"]) == len(texts)
    assert about["tokens"] == int(np.load(tmp_path / "out" / "lengths.npy").sum())


def test_error_names_file_and_line(tokenizer, text_section, tmp_path):
    path = Path(text_section["hf_name"])
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[60] = json.dumps({"text": 5})
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"texts\.jsonl, line 61: column 'text' holds int, not tex"):
        make(tokenizer, text_section, tmp_path / "out")
    # What was made before the bad row stays.
    assert len(list((tmp_path / "out" / "shards").iterdir())) > 2


def test_column_that_is_not_there(tokenizer, text_section, tmp_path):
    with pytest.raises(UserError, match=r"line 1: no column 'content', only text; set text_key"):
        make(tokenizer, {**text_section, "text_key": "content"}, tmp_path / "out")


def test_parts_of_different_sources_are_not_merged(tokenizer, text_section, write_jsonl, tmp_path):
    make(tokenizer, text_section, tmp_path / "out", part=Part(1, 2))
    other = {**text_section, "hf_name": str(write_jsonl([{"text": "a"}] * 30, "other.jsonl"))}
    make(tokenizer, other, tmp_path / "out", part=Part(2, 2))
    with pytest.raises(UserError, match="part 2/2 was made from another source than part 1/2"):
        merge_parts(Storage(str(tmp_path / "out")))


def test_nothing_to_merge(tmp_path):
    with pytest.raises(UserError, match="there is no part to merge"):
        merge_parts(Storage(str(tmp_path)))


def test_full_disk_is_refused_before_anything_is_written(
    tokenizer, text_section, tmp_path, monkeypatch
):
    monkeypatch.setattr(making, "free_bytes", lambda folder: 99)
    with pytest.raises(OSError, match=r"out: 0\.0 MB are free, and the shards need about"):
        make(tokenizer, text_section, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prepared": "elsewhere"}, "prepared already; name its source in hf_name"),
        ({"hf_name": None, "local": "shards"}, "MDS streams cannot be prepared"),
    ],
)
def test_sections_that_cannot_be_prepared(change, message, tokenizer, text_section, tmp_path):
    with pytest.raises(UserError, match=message):
        make(tokenizer, {**text_section, **change}, tmp_path / "out", "packed_finetuning")


def test_whole_shard_of_a_faster_writer_stays(tokenizer, text_section, tmp_path, monkeypatch):
    """A second writer that finds the shard whole, when its own is ready, leaves it alone."""
    make(tokenizer, text_section, tmp_path / "out")
    monkeypatch.setattr(making, "find_shard", _missing_at_first())
    times = {p: p.stat().st_ino for p in (tmp_path / "out" / "shards").rglob("*.mds")}
    make(tokenizer, text_section, tmp_path / "out")
    assert {p: p.stat().st_ino for p in (tmp_path / "out" / "shards").rglob("*.mds")} == times


def _missing_at_first():
    asked: set[str] = set()

    def find(out, key):
        if key in asked:
            return merging.find_shard(out, key)
        asked.add(key)
        return None

    return find


def test_changed_source_is_not_merged_with_older_parts(tokenizer, text_section, tmp_path):
    make(tokenizer, text_section, tmp_path / "out", part=Part(1, 2))
    path = Path(text_section["hf_name"])
    path.write_text(path.read_text(encoding="utf-8").replace("last", "LAST"), encoding="utf-8")
    make(tokenizer, text_section, tmp_path / "out", part=Part(2, 2))
    with pytest.raises(UserError, match="part 2/2 was made from another source than part 1/2"):
        merge_parts(Storage(str(tmp_path / "out")))


def test_parts_are_made_where_the_source_lies_elsewhere(tokenizer, text_section, tmp_path):
    make(tokenizer, text_section, tmp_path / "out", part=Part(1, 2))
    path = Path(text_section["hf_name"])
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / path.name)
    make(tokenizer, {**text_section, "hf_name": str(moved)}, tmp_path / "out", part=Part(2, 2))
    make(tokenizer, {**text_section, "hf_name": str(moved)}, tmp_path / "whole")
    merge_parts(Storage(str(tmp_path / "out")))
    names = ("index.json", "lengths.npy")
    out, whole = ([(tmp_path / one / n).read_bytes() for n in names] for one in ("out", "whole"))
    assert out == whole


@pytest.mark.parametrize("name", ["shards/{key}/about.json", "parts/1-of-1.json"])
def test_file_that_was_cut_off(name, tokenizer, text_section, tmp_path):
    out = tmp_path / "out"
    make(tokenizer, text_section, out)
    key = min(path.name for path in (out / "shards").iterdir())
    path = out / name.format(key=key)
    path.write_bytes(path.read_bytes()[:20])
    if "parts" in name:
        with pytest.raises(UserError, match=r"parts/1-of-1.json is damaged, .* --part 1/1 again"):
            merge_parts(Storage(str(out)))
    make(tokenizer, text_section, out)
    assert path.stat().st_size > 20


def test_largest_id_decides_the_bytes_of_a_token(tokenizer, text_section, tmp_path, monkeypatch):
    """A vocabulary may have gaps, so its size says too little."""
    vocabulary = {**tokenizer.get_vocab(), "far": 2**16}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    make(tokenizer, text_section, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "prepared.json").read_text(encoding="utf-8"))
    assert about["recipe"]["ids"] == "int32"
    loader = build(
        tokenizer, {**text_section, "prepared": str(tmp_path / "out")}, name="packed_text"
    )
    expected = build(tokenizer, text_section, name="packed_text")
    assert documents_of(walk(loader)) == documents_of(walk(expected))
