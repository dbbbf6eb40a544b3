"""Cache of tokenised rows, keyed by everything they depend on, and their fingerprint."""

import errno
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pytest
from llmfoundry.data.finetuning.tasks import dataset_constructor

from foundry_ext.data import batches, cache
from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.data.sources import load_rows
from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows
from foundry_ext.launch.failures import explain
from foundry_ext.utils.processes import machine_name

FORMATTING = """
calls = 0

def helper(text):
    return text

def formatting(row):
    global calls
    calls += 1
    return {"prompt": helper(row["prompt"]), "response": row["response"]}
"""


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Counted:
    """Tokeniser of a file's rows that counts how many rows it formatted."""

    def __init__(self, path: Path, module_file: Path):
        self.path, self.module_file = path, module_file
        self.module = importlib.import_module(module_file.stem)

    def __call__(self, tokenizer, function="formatting", **settings) -> tuple[Documents, int]:
        settings = TokenizeSettings(**{"max_seq_len": 64, **settings})
        before = self.module.calls
        rows = load_rows(str(self.path), "train")
        preprocess = getattr(self.module, function)
        documents = tokenize_rows(rows, tokenizer, settings, preprocess=preprocess)
        return documents, self.module.calls - before

    def edit(self, old: str, new: str):
        text = self.module_file.read_text()
        assert old in text
        self.module_file.write_text(text.replace(old, new))
        calls = self.module.calls
        importlib.invalidate_caches()
        sys.modules.pop(self.module.__name__)
        shutil.rmtree(self.module_file.parent / "__pycache__", ignore_errors=True)
        self.module = importlib.import_module(self.module_file.stem)
        self.module.calls = calls


@pytest.fixture
def counted(tmp_path, monkeypatch, make_rows, write_jsonl) -> Counted:
    module_file = tmp_path / f"formatting_{tmp_path.name}.py"
    module_file.write_text(FORMATTING)
    monkeypatch.syspath_prepend(tmp_path)
    return Counted(write_jsonl(make_rows(20)), module_file)


def contents(documents: Documents) -> list[list[int]]:
    return [documents[i].input_ids.tolist() for i in range(len(documents))]


def test_the_second_time_nothing_is_tokenised(counted: Counted, tokenizer):
    first, calls = counted(tokenizer)
    assert calls == 20
    tokenizer("a use of it, which changes what pickling it gives", padding=True, truncation=True)
    second, calls = counted(tokenizer)
    assert calls == 0
    assert contents(second) == contents(first)
    assert second.counts == first.counts
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"max_seq_len": 65},
        {"overlong": "drop"},
        {"target_prompts": "all"},
        {"target_responses": "all"},
    ],
)
def test_another_setting_misses_the_cache(counted: Counted, tokenizer, changed):
    assert counted(tokenizer)[1] == 20
    assert counted(tokenizer, **changed)[1] == 20
    assert counted(tokenizer)[1] == counted(tokenizer, **changed)[1] == 0


def test_another_tokenizer_misses_the_cache(counted: Counted, tokenizer):
    assert counted(tokenizer)[1] == 20
    tokenizer.add_tokens(["bird"])
    assert counted(tokenizer)[1] == 20
    tokenizer.eos_token = "<|im_end|>"
    documents, calls = counted(tokenizer)
    assert calls == 20
    assert documents[0].input_ids[-1] == 2


def test_another_chat_template_misses_the_cache(counted: Counted, tokenizer):
    assert counted(tokenizer)[1] == 20
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    assert counted(tokenizer)[1] == 20
    assert counted(tokenizer)[1] == 0


def test_an_edited_preprocessing_function_misses_the_cache(counted: Counted, tokenizer):
    """A pickled function is only its name, so its source must be part of the key."""
    first, calls = counted(tokenizer)
    assert calls == 20
    counted.edit('row["response"]}', '"yes " + row["response"]}')
    second, calls = counted(tokenizer)
    assert calls == 20
    assert contents(second) != contents(first)
    counted.edit("return text", 'return text + "?"')
    third, calls = counted(tokenizer)
    assert calls == 20
    assert contents(third) != contents(second)


def test_another_mapping_of_columns_misses_the_cache(tokenizer, make_rows, write_jsonl):
    rows = load_rows(str(write_jsonl(make_rows(5))), "train")
    settings = TokenizeSettings(max_seq_len=64)
    one, other = (
        tokenize_rows(rows, tokenizer, settings, preprocess=preprocess)
        for preprocess in map(
            dataset_constructor.get_preprocessing_fn_from_dict,
            (
                {"prompt": "prompt", "response": "response"},
                {"prompt": "response", "response": "prompt"},
            ),
        )
    )
    assert contents(one) != contents(other)


def test_other_rows_in_the_same_file_miss_the_cache(counted: Counted, tokenizer, make_rows):
    assert counted(tokenizer)[1] == 20
    rows = make_rows(21, seed=9)
    counted.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, calls = counted(tokenizer)
    assert calls == len(documents) == 21


def test_a_copy_and_a_touched_file_hit_the_cache(counted: Counted, tokenizer):
    """With the key of `datasets`, a path and a time, a copy would be tokenised again."""
    first, calls = counted(tokenizer)
    assert calls == 20
    os.utime(counted.path, (1, 1))
    assert counted(tokenizer)[1] == 0
    copy = counted.path.parent / "elsewhere" / "data.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(counted.path, copy)
    counted.path = copy
    second, calls = counted(tokenizer)
    assert calls == 0
    assert contents(second) == contents(first)


def test_one_edited_letter_misses_the_cache(counted: Counted, tokenizer):
    assert counted(tokenizer)[1] == 20
    text = counted.path.read_text()
    before = counted.path.stat()
    at = text.rindex("stone")
    counted.path.write_text(text[:at] + "stove" + text[at + 5 :])  # as long as before
    os.utime(counted.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old
    assert counted(tokenizer)[1] == 20


def test_rows_have_one_hash_however_they_lie(make_rows, write_jsonl, tmp_path):
    rows = [{**row, "n": i % 3 or None, "s": None} for i, row in enumerate(make_rows(2500))]
    rows[1]["s"] = "text"
    whole = load_rows(str(write_jsonl(rows)), "train")
    whole.to_parquet(tmp_path / "rows.parquet", batch_size=700)
    parts = [datasets.Dataset.from_list(rows[:7]), datasets.Dataset.from_list(rows[7:])]
    first = datasets.Dataset.from_list([{"prompt": "a", "response": "b", "n": 7, "s": ""}])
    same = [
        load_rows(str(tmp_path / "rows.parquet"), "train"),
        datasets.Dataset.from_list(rows),
        datasets.concatenate_datasets(parts),
        datasets.concatenate_datasets([first, whole]).select(range(1, 2501)),  # a slice
        datasets.concatenate_datasets([whole, first]).filter(lambda row: row["prompt"] != "a"),
        whole.select_columns(["s", "response", "n", "prompt"]),
    ]
    assert {cache.hash_rows(one) for one in same} == {cache.hash_rows(whole)}
    others = [
        whole.select(range(2499)),
        whole.select([1, 0, *range(2, 2500)]),
        whole.rename_columns({"prompt": "response", "response": "prompt"}),
        whole.add_column("more", [None] * 2500),
    ]
    assert len({cache.hash_rows(one) for one in [whole, *others]}) == 5


def test_chat_rows_and_missing_values_are_hashed(tmp_path):
    def hashed(first, second):
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        return cache.hash_rows(datasets.Dataset.from_list([{"messages": turns}] * 3))

    assert hashed("ab", "c") == hashed("ab", "c")
    assert len({hashed("ab", "c"), hashed("a", "bc"), hashed("ab", None), hashed("ab", "")}) == 4


def test_the_number_of_processes_is_not_in_the_key(tokenizer, make_rows, monkeypatch):
    rows = datasets.Dataset.from_list(make_rows(2100, longest=6))
    settings = TokenizeSettings(max_seq_len=16)
    monkeypatch.setattr(batches, "_BYTES_PER_PROCESS", 10_000)
    first = tokenize_rows(rows, tokenizer, settings, num_proc=2)
    monkeypatch.setattr("foundry_ext.data.tokenize.write_table", pytest.fail)
    assert contents(tokenize_rows(rows, tokenizer, settings)) == contents(first)


def test_the_fingerprint_is_kept_beside_the_table(counted: Counted, tokenizer, monkeypatch):
    """It is stored because every rank would hash all tokens for it."""
    first, _ = counted(tokenizer)
    computed = Documents.__dict__["fingerprint"].func(first)
    monkeypatch.setattr("foundry_ext.data.documents.hashlib.sha256", pytest.fail)
    assert counted(tokenizer)[0].fingerprint == first.fingerprint == computed


def test_a_bar_says_what_is_tokenised(tokenizer, make_rows, monkeypatch, capsys, caplog):
    """The bar shows at any log level, but not if the rows come from the cache."""

    def shown(seed: int) -> str:
        rows = datasets.Dataset.from_list(make_rows(20, seed=seed))
        tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=64), name="gsm8k (train)")
        return capsys.readouterr().err

    caplog.set_level("WARNING")
    assert shown(seed=1) == ""  # the tests' own setting
    monkeypatch.setattr(
        sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", False
    )
    assert "Tokenizing gsm8k (train): 100%" in shown(seed=2)
    assert shown(seed=2) == ""


# --- the folder under the key ---------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "foundry_ext"


def write_two_files(folder: Path) -> None:
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")


def test_a_folder_is_written_once_and_whole(store: Path):
    folder = cache.cached("key", write_two_files)
    assert (folder / "b").read_text() == "two"
    assert cache.cached("key", pytest.fail) == folder
    assert {path.name for path in store.iterdir()} == {"key", "key.lock"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_nothing(store: Path, error: type[BaseException]):
    def write(folder: Path) -> None:
        write_two_files(folder)
        raise error

    with pytest.raises(error):
        cache.cached("key", write)
    assert {path.name for path in store.iterdir()} == {"key.lock"}
    assert cache.cached("key", write_two_files)


def test_a_killed_writer_leaves_no_table_and_the_next_one_clears_up(store: Path):
    def write(folder: Path) -> None:
        (folder / "a").write_text("half a tab")
        os.kill(os.getpid(), signal.SIGKILL)

    writer = multiprocessing.get_context("fork").Process(target=cache.cached, args=("key", write))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert not (store / "key").exists()
    assert len(list(store.glob("key.*.part"))) == 1
    assert (cache.cached("key", write_two_files) / "b").read_text() == "two"
    assert {path.name for path in store.iterdir()} == {"key", "key.lock"}


@pytest.mark.parametrize("damage", ["cut", "gone", "whole.json gone"])
def test_a_damaged_table_is_made_anew(store: Path, damage: str):
    folder = cache.cached("key", write_two_files)
    if damage == "cut":
        (folder / "b").write_text("t")
    else:
        (folder / damage.removesuffix(" gone").replace("gone", "b")).unlink()
    assert (cache.cached("key", write_two_files) / "b").read_text() == "two"


def test_a_folder_marked_while_it_is_removed_does_not_stop_its_writer(store: Path):
    folder = cache.cached("key", write_two_files)
    assert cache.discard(folder, "damaged")

    def write(part: Path) -> None:
        write_two_files(part)
        folder.mkdir()
        assert cache.discard(folder, "damaged")

    assert (cache.cached("key", write) / "b").read_text() == "two"
    assert cache.cached("key", pytest.fail) == folder
    assert {path.name for path in folder.iterdir()} == {"a", "b", "whole.json"}


def test_processes_at_once_write_once(store: Path, tmp_path: Path):
    def write(folder: Path) -> None:
        with (tmp_path / "written").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        write_two_files(folder)

    def use() -> None:
        assert (cache.cached("key", write) / "b").read_text() == "two"

    processes = [multiprocessing.get_context("fork").Process(target=use) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "written").read_text() == "x"


def test_who_waits_is_told(store: Path, caplog):
    def write(folder: Path) -> None:
        time.sleep(1)
        write_two_files(folder)

    writer = multiprocessing.get_context("fork").Process(target=cache.cached, args=("key", write))
    writer.start()
    while not list(store.glob("key.*.part")):
        time.sleep(0.01)
    with caplog.at_level("WARNING", "foundry_ext"):
        cache.cached("key", pytest.fail)
    writer.join()
    assert "another process is tokenizing the same rows" in caplog.text


def fingerprint_of(path: Path, tokenizer, **settings) -> str:
    settings = TokenizeSettings(**{"max_seq_len": 64, **settings})
    return tokenize_rows(load_rows(str(path), "train"), tokenizer, settings).fingerprint


def test_the_fingerprint_is_the_datas_not_the_files(tokenizer, make_rows, write_jsonl):
    """A run can be resumed on another machine, or after its file was written again."""
    path = write_jsonl(make_rows(20))
    first = fingerprint_of(path, tokenizer)
    copy = path.parent / "elsewhere" / "data.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert fingerprint_of(copy, tokenizer) == first
    os.utime(path, (1, 1))
    assert fingerprint_of(path, tokenizer) == first


def test_the_fingerprint_sees_tokens_flags_and_lengths(tokenizer):
    def fingerprint(ids, flags) -> str:
        zeros = [0] * len(ids)
        columns = {"input_ids": ids, "has_loss": flags, "outcome": zeros, "num_cut": zeros}
        return Documents(datasets.Dataset.from_dict(columns, features=FEATURES)).fingerprint

    ids, flags = [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]]
    first = fingerprint(ids, flags)
    assert fingerprint(ids, flags) == first
    assert fingerprint([[1, 2, 9], [4, 5]], flags) != first
    assert fingerprint(ids, [[0, 0, 1], [0, 1]]) != first
    assert fingerprint([[1, 2], [3, 4, 5]], [[0, 1], [1, 0, 1]]) != first
    assert fingerprint(ids[::-1], flags[::-1]) != first


@pytest.mark.parametrize("changed", ["processes", "batches"])
def test_processes_and_batches_change_nothing(
    tokenizer, make_rows, write_jsonl, monkeypatch, tmp_path, changed: str
):
    """The key, the documents and their fingerprint are the same; of processes, the bytes too."""
    rows = load_rows(str(write_jsonl(make_rows(2100, longest=6))), "train")
    settings = TokenizeSettings(max_seq_len=16)

    def make() -> tuple[Documents, Path]:
        documents = tokenize_rows(rows, tokenizer, settings, num_proc=2)
        assert documents._stored is not None
        return documents, documents._stored.folder / "part.arrow"

    first, path = make()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    if changed == "batches":
        few = {"most_bytes": 999, "most_rows": 50}
        monkeypatch.setattr(batches.split_rows, "__kwdefaults__", few)
    else:
        monkeypatch.setattr(batches, "_BYTES_PER_PROCESS", 10_000)
    started, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: (started.append(1), fork())[1])
    again, other = make()
    assert len(started) == (2 if changed == "processes" else 0)
    assert other.parent.name == path.parent.name and other != path
    assert (len(again._chunks) > len(first._chunks)) == (changed == "batches")
    assert (other.read_bytes() == path.read_bytes()) == (changed == "processes")
    np.testing.assert_array_equal(again.lengths, first.lengths)
    assert again.counts == first.counts
    assert again.fingerprint == first.fingerprint
    assert contents(again) == contents(first)


def test_books_are_read_a_few_at_a_time(tokenizer, monkeypatch):
    """Neither their key nor their tokens need the memory of a thousand of them."""
    rows = datasets.Dataset.from_dict({"text": ["x" * 10**6] * 100})
    hashed, make = [], pa.record_batch
    fake = SimpleNamespace(**{**vars(pa), "record_batch": None})
    fake.record_batch = lambda *a, **k: (hashed.append(make(*a, **k).nbytes), make(*a, **k))[1]
    monkeypatch.setattr(cache, "pa", fake)
    written = []
    monkeypatch.setattr("foundry_ext.data.tokenize.write_table", lambda *a: written.append(a[1]))
    with pytest.raises(ValueError, match="concatenate"):  # no table was written
        settings = TokenizeSettings(max_seq_len=512, text_key="text")
        tokenize_rows(rows, tokenizer, settings)
    assert len(hashed) == 2 and max(hashed) < 2**26
    (read,) = written
    assert [len(batch) for batch in read] == [16] * 6 + [4]


# --- file systems without locks, and full ones ----------------------------------------------------


class NoLock:
    """A lock that keeps nobody out, as on some network file systems."""

    def __init__(self, *_, **__):
        pass

    def acquire(self, **_):
        pass

    def release(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_writers_without_locks_leave_each_other_alone(store: Path, tmp_path: Path, monkeypatch):
    """The second one begins while the first one writes, and ends first; both get a table."""
    monkeypatch.setattr(cache.filelock, "FileLock", NoLock)

    def wait_for(name: str) -> None:
        while not (tmp_path / name).exists():
            time.sleep(0.01)

    def use(me: str, begins_after: str | None, ends_after: str | None) -> None:
        def write(folder: Path) -> None:
            (folder / "a").write_text("one")
            (tmp_path / f"{me} writes").touch()
            if ends_after:
                wait_for(ends_after)
                assert (folder / "a").exists(), "the second writer has removed it"
            (folder / "b").write_text("two")

        if begins_after:
            wait_for(begins_after)
        assert (cache.cached("key", write) / "b").read_text() == "two"
        (tmp_path / f"{me} ends").touch()

    context = multiprocessing.get_context("fork")
    first = context.Process(target=use, args=("first", None, "second ends"))
    second = context.Process(target=use, args=("second", "first writes", None))
    for process in (first, second):
        process.start()
    for process in (first, second):
        process.join(30)
    assert [first.exitcode, second.exitcode] == [0, 0]
    assert {path.name for path in store.iterdir()} == {"key"}


def test_a_file_system_that_refuses_locks_is_used_without(store: Path, monkeypatch, caplog):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.filelock.FileLock, "acquire", acquire)
    assert (cache.cached("key", write_two_files) / "b").read_text() == "two"
    assert "no locks here" in caplog.text


def test_only_leftovers_of_dead_writers_are_removed(store: Path):
    store.mkdir()
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    machine, other = machine_name(), "0123456789abcdef"
    stay = [
        f"key.{machine}.{os.getppid()}.1.part",  # running
        f"key.{other}.{dead.pid}.2.part",  # of another machine, where that number may be running
        "key.0c65ae3e84b94f229d1c7fd6c0d9c9ae.part",  # an earlier version's
        f"key2.{machine}.{dead.pid}.3.part",  # of another key
    ]
    go = [f"key.{machine}.{dead.pid}.4.part", f"key.{other}.1.5.part", "key.6.part"]
    for name in [*stay, *go]:
        (store / name).mkdir()
        (store / name / "part.arrow").touch()
    for name in go[1:]:
        for path in (store / name / "part.arrow", store / name):
            os.utime(path, (0, time.time() - 3 * 24 * 3600))
    cache.cached("key", write_two_files)
    assert {path.name for path in store.glob("*.part")} == set(stay)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_cache_and_the_variable(store: Path, number: int):
    def write(folder: Path) -> None:
        (folder / "a").write_text("one")
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError) as raised:
        cache.cached("key", write)
    assert raised.value.errno == errno.ENOSPC
    text = str(raised.value)
    assert "HF_DATASETS_CACHE" in text and str(store.parent) in text and "MB free" in text
    assert not list(store.glob("*.part"))
    assert explain(raised.value, {}) == text.partition("] ")[2]


def test_a_real_limit_names_the_cache(tokenizer, make_rows, store: Path):
    """A limit on the size of files is a full disk for Arrow's writer."""
    rows = datasets.Dataset.from_list(make_rows(500))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="HF_DATASETS_CACHE"):
            tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=64))) == 500


def test_too_little_space_is_known_before(tokenizer, make_rows, store: Path, monkeypatch):
    rows = datasets.Dataset.from_list(make_rows(500))
    need = rows.data.nbytes / 4 * 2  # 4 bytes of text a token, 2 bytes a token on the disk
    free = need / 4

    def disk_usage(_):
        return shutil._ntuple_diskusage(10**12, 0, int(free))

    monkeypatch.setattr("foundry_ext.data.full_disk.shutil.disk_usage", disk_usage)
    monkeypatch.setattr("foundry_ext.data.tokenize.write_table", pytest.fail)
    with pytest.raises(OSError) as raised:
        tokenize_rows(rows, tokenizer, TokenizeSettings(max_seq_len=512))
    assert f"of about {need / 1e6:,.1f} MB needed" in str(raised.value)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", store.parent)
    monkeypatch.setattr("foundry_ext.data.full_disk.shutil.disk_usage", disk_usage)
    # Cut to 2 tokens, or a few of the rows alone, they fit.
    settings = TokenizeSettings(max_seq_len=2)
    assert len(tokenize_rows(rows, tokenizer, settings)) == 500
    few = rows.select(range(50))
    assert len(tokenize_rows(few, tokenizer, TokenizeSettings(max_seq_len=512))) == 50
