"""Benchmarks from the store of tokens to packs: reading, collating, planning, loading."""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa

from benchmarks.data_figures import Table, best_of, memory
from benchmarks.data_text import VOCABULARY, make_tokenizer
from benchmarks.packing import make_lengths
from foundry_ext.data.dataset import PackedDataLoader, PackedDataset
from foundry_ext.data.documents import FEATURES, Documents
from foundry_ext.packing.algorithm import pack
from foundry_ext.packing.collator import Document, PackCollator
from foundry_ext.packing.sampler import PackedBatchSampler
from foundry_ext.utils.constants import IGNORE_INDEX

TOKENS_PER_SECOND = 400_000  # speed of a GPU step; the target for 135M on an H200


# --- the store ------------------------------------------------------------------------------------


def make_store(path: Path, lengths: np.ndarray) -> Path:
    """Write random documents, the second half of each labelled, in chunks as tokenising does."""
    rng = np.random.default_rng(1)
    schema = FEATURES.arrow_schema
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(lengths), 1000):
            part = lengths[start : start + 1000].astype(np.int64)
            offsets = np.cumsum([0, *part], dtype=np.int32)
            place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], part)
            flags = (place >= np.repeat(part // 2, part)).astype(np.uint8)
            ids = rng.integers(3, VOCABULARY, offsets[-1], np.int32)
            columns = [pa.ListArray.from_arrays(offsets, values) for values in (ids, flags)]
            columns += [np.zeros(len(part), kind) for kind in (np.int8, np.int32)]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def open_store(path: Path) -> Documents:
    return Documents(datasets.Dataset.from_file(str(path)), fingerprint="0" * 16)


def make_dataset(documents: Documents, capacity: int, batch_packs: int = 1) -> PackedDataset:
    collator = PackCollator(max_seq_len=2048, pack_tokens=capacity)
    settings = {"capacity": capacity, "batch_packs": batch_packs, "rank": 0, "world_size": 1}
    return PackedDataset(documents, collator, {**settings, "shuffle": True, "seed": 17})


def store(folder: Path, arguments: argparse.Namespace) -> Table:
    header = ["documents (c)", "MiB on disk", "s to open", "k random reads/s"]
    header += ["own MiB added", "MiB of mapped pages added", "fingerprint, M tokens/s (once)"]
    title = "The store: every document read once in random order"
    return title, header, _store(folder, arguments)


def _store(folder: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    for num in (200_000, arguments.store_documents):
        path = make_store(folder / f"store{num}.arrow", make_lengths("c", num))
        order = np.random.default_rng(0).permutation(num)
        before, start = memory(), time.process_time()
        documents = open_store(path)
        opened = time.process_time()
        for first in range(0, num, 100):
            for one in documents.read(order[first : first + 100]):
                one.input_ids.max()
        read, after = time.process_time(), memory()
        Documents.__dict__["fingerprint"].func(documents)
        hashed = documents.lengths.sum() / (time.process_time() - read) / 1e6
        size, speed = path.stat().st_size / 2**20, num / (read - opened) / 1000
        grown = [str(after[key] - before[key]) for key in ("anon", "file")]
        times = [f"{opened - start:.2f}", f"{speed:.0f}"]
        yield [f"{num:,}", f"{size:.0f}", *times, *grown, f"{hashed:.0f}"]


# --- collation ------------------------------------------------------------------------------------


def naive_collate(documents: Sequence[Document]) -> dict[str, Any]:
    """Make a pack with a loop over tokens."""
    import torch

    input_ids, labels, positions, ends = [], [], [], [0]
    for document in documents:
        for position, (token, wanted) in enumerate(
            zip(document.input_ids.tolist(), document.loss_mask.tolist(), strict=True)
        ):
            input_ids.append(token)
            positions.append(position)
            labels.append(token if wanted and position else IGNORE_INDEX)
        ends.append(len(input_ids))
    rows = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    return {key: torch.tensor([row]) for key, row in rows.items()} | {"cu": torch.tensor(ends)}


def bin_pack_collate(capacity: int, tokenizer: Any) -> Callable[[Sequence[Document]], Any]:
    """Return llm-foundry's collator, which pads rows and then packs the padded rows."""
    from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
    from llmfoundry.data.packing import BinPackCollator

    collator = BinPackCollator(
        Seq2SeqFinetuningCollator(tokenizer, 2048, True), 1, capacity, 0, "right", 0
    )

    def collate(documents: Sequence[Document]) -> Any:
        examples = []
        for one in documents:
            split, ids = len(one.input_ids) // 2, one.input_ids.tolist()
            examples.append({"turns": [{"input_ids": ids[:split], "labels": ids[split:]}]})
        return collator(examples)

    return collate


def collation(folder: Path, arguments: argparse.Namespace) -> Table:
    header = ["lengths", "pack_tokens", "packs/s", "M tokens/s", "times a loop over tokens"]
    header += ["times llm-foundry's BinPackCollator", "of a step at 400k tokens/s, one process"]
    return "Reading and collating packs", header, _collation(folder, arguments)


def _collation(folder: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    tokenizer = make_tokenizer(arguments.tokenizer)
    for name in "abc":
        documents = open_store(make_store(folder / f"{name}.arrow", make_lengths(name, 20_000)))
        for capacity in (1024, 8192, 65536):
            used = np.flatnonzero(documents.lengths <= capacity)
            packs = pack(documents.lengths[used], capacity, seed=0, epoch=0)
            chosen = [used[packs[i]] for i in range(min(len(packs), max(1, 140_000 // capacity)))]
            tokens = sum(int(documents.lengths[one].sum()) for one in chosen)
            dataset = make_dataset(documents, max(capacity, 2048))
            foundry = bin_pack_collate(capacity, tokenizer)
            functions: dict[str, Callable[[], Any]] = {
                "ours": lambda d=dataset, c=chosen: [d[one] for one in c],
                "naive": lambda d=documents, c=chosen: [naive_collate(d.read(one)) for one in c],
                "foundry": lambda d=documents, c=chosen, f=foundry: [f(d.read(one)) for one in c],
            }
            best = best_of(functions)
            speed = [f"{len(chosen) / best['ours']:.0f}", f"{tokens / best['ours'] / 1e6:.1f}"]
            ratios = [f"{best[key] / best['ours']:.0f}" for key in ("naive", "foundry")]
            share = best["ours"] / (tokens / TOKENS_PER_SECOND)
            yield [name, f"{capacity}", *speed, *ratios, f"{100 * share:.1f} %"]


# --- planning -------------------------------------------------------------------------------------


def planning(folder: Path, arguments: argparse.Namespace) -> Table:
    del arguments
    header = ["lengths", "pack_tokens", "opening, CPU-s", "sampler and first batch, CPU-s"]
    header += ["epoch 1, CPU-s", "digest, CPU-s", "peak MiB above the start", "of mapped pages"]
    title = "10 M documents: start of an epoch (store: documents of 8 to 24 tokens, on disk)"
    return title, header, _planning(folder)


def _planning(folder: Path) -> Iterator[list[str]]:
    """Run each case in its own process, so that each has its own peak memory."""
    for name, capacity in (("a", 2048), ("a", 8192), ("c", 8192), ("store", 8192)):
        receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
        arguments = (send, folder, name, capacity)
        child = multiprocessing.get_context("fork").Process(target=_plan, args=arguments)
        child.start()
        send.close()
        yield [name, str(capacity), *receive.recv()]
        child.join()


def _plan(send: Any, folder: Path, name: str, capacity: int) -> None:
    num, opened = 10_000_000, 0.0
    if name == "store":
        short = np.random.default_rng(0).integers(8, 25, num).astype(np.int32)
        path = make_store(folder / "many.arrow", short)
        del short
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before, start = memory(), time.process_time()
        documents = open_store(path)
        opened, lengths = time.process_time() - start, documents.lengths
    else:
        lengths = make_lengths(name, num)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = memory()
    start = time.process_time()
    settings: Any = {"capacity": capacity, "batch_packs": 8, "rank": 0, "world_size": 1}
    settings |= {"shuffle": True, "seed": 17}
    sampler = PackedBatchSampler(cast(Any, range(num)), lengths, **settings)
    sampler.batch(0)
    first = time.process_time()
    sampler.set_epoch(1)
    sampler.batch(0)
    second = time.process_time()
    sampler.plan_digest(1)
    times = (opened, first - start, second - first, time.process_time() - second)
    after = memory()
    peaks = str(after["peak"] - before["peak"]), str(after["file"] - before["file"])
    send.send([*(f"{seconds:.2f}" for seconds in times), *peaks])


# --- the loader -----------------------------------------------------------------------------------


def loader(folder: Path, arguments: argparse.Namespace) -> Table:
    header = ["lengths", "batch", "workers", "step, ms", "CPU-ms per batch in the loop's process"]
    header += ["waiting", "longest wait, ms", "first batch, ms", "second epoch's first, ms"]
    title = "Waiting for the loader after the first batch (wall time, except the CPU-ms)"
    return title, header, _loader(folder, arguments)


def _loader(folder: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Measure the waits for batches while each step sleeps as long as a GPU would compute."""
    for name, capacity, batch_packs in (("a", 8192, 1), ("a", 8192, 8), ("c", 65536, 1)):
        documents = open_store(make_store(folder / f"{name}.arrow", make_lengths(name, 50_000)))
        for workers, prefetch, persistent in (
            *((0, None, False), (1, 2, True), (2, 2, True), (2, 2, False)),
            *((2, 4, True), (4, 2, True)),
        ):
            loader = PackedDataLoader(
                make_dataset(documents, capacity, batch_packs),
                num_workers=workers,
                prefetch_factor=prefetch,
                persistent_workers=persistent,
            )
            cells = _wait(loader, min(len(loader.dataset.sampler), arguments.steps))
            loader._iterator = None
            setting = f"{workers}" + (f", prefetch {prefetch}" if workers else "")
            setting += ", not persistent" if workers and not persistent else ""
            yield [name, f"{batch_packs} x {capacity}", setting, *cells]


def _wait(loader: PackedDataLoader, steps: int) -> list[str]:
    firsts, waits, slept, used = [], [], 0.0, 0.0
    for epoch in range(2):
        loader.dataset.sampler.set_epoch(epoch)
        start = time.perf_counter()
        batches = iter(loader)
        batch = next(batches)
        firsts.append(time.perf_counter() - start)
        for _ in range(steps - 1 if epoch == 0 else 0):
            step = sum(one["num_tokens"] for one in batch) / TOKENS_PER_SECOND
            cpu = time.process_time()
            time.sleep(step)
            slept += step
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            used += time.process_time() - cpu
        del batches
    share = 100 * sum(waits) / (sum(waits) + slept)
    milliseconds = (slept / len(waits), used / len(waits), max(waits), *firsts)
    step, cpu, *others = (f"{1000 * seconds:.1f}" for seconds in milliseconds)
    return [step, cpu, f"{share:.2f} %", *others]
