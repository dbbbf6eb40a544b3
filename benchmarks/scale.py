"""Cost of prepared data: tokenising, disk, starts, memory and reading, beside what they replace.

    python benchmarks/scale.py [part ...] [--tokenizer FOLDER]

Seconds are CPU time of this process unless a row says otherwise. Both sides of a ratio run in turn,
in one process. The text is Python's own standard library, from every Python alike.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

from benchmarks.data_text import library_texts, make_tokenizer
from benchmarks.machine import as_line, describe_machine
from benchmarks.scale_plans import measure_plans, sampler_of
from foundry_ext.data.prepared.census import take_census
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.index import read_index
from foundry_ext.data.prepared.local_shards import LocalFolder, LocalShards
from foundry_ext.data.prepared.preparing import prepare
from foundry_ext.data.prepared.source import PreparedSource
from foundry_ext.data.prepared.storage import Storage
from foundry_ext.packing.collator import PackCollator

REPEATS = 3


def texts(num_bytes: int) -> Iterator[str]:
    """Yield pieces of 3,000 characters of the standard library's sources, again and again."""
    done = 0
    while True:
        for text in library_texts():
            for at in range(0, len(text), 3000):
                piece = f"{done} {text[at : at + 3000]}"  # no two are equal
                yield piece
                done += len(piece)
                if done >= num_bytes:
                    return


def write_texts(folder: Path, num_bytes: int) -> Path:
    path = folder / f"text-{num_bytes}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in texts(num_bytes):
            file.write(json.dumps({"text": text}) + "\n")
    return path


def section(path: Path, **more: Any) -> dict[str, Any]:
    return {"hf_name": str(path), "split": "train", "max_seq_len": 8192, **more}


def seconds(work: Callable[[], Any], *, wall: bool = False) -> float:
    clock = time.perf_counter if wall else time.process_time
    start = clock()
    work()
    return clock() - start


def best(works: dict[str, Callable[[], Any]], *, wall: bool = False) -> dict[str, float]:
    """Return the least seconds of each, measured in turn."""
    found: dict[str, float] = {}
    for _ in range(REPEATS):
        for name, work in works.items():
            found[name] = min(found.get(name, float("inf")), seconds(work, wall=wall))
    return found


def prepare_text(path: Path, out: Path, tokenizer: Any, workers: int = 1, **options: Any) -> Any:
    return prepare(
        section(path),
        tokenizer,
        name="packed_text",
        tokenizer_name="benchmark",
        out=str(out),
        workers=workers,
        **options,
    )


def measure_preparing(tokenizer: Any, folder: Path) -> None:
    """Tokens per second over `encode_batch` alone; two processes over one; bytes per token."""
    path = write_texts(folder, 20_000_000)
    rows = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizer.backend_tokenizer

    def encode() -> None:
        for at in range(0, len(rows), 300):
            backend.encode_batch(rows[at : at + 300], add_special_tokens=False)

    counter = iter(range(100))
    found = best(
        {
            "encode": encode,
            "prepare": lambda: prepare_text(path, folder / f"p{next(counter)}", tokenizer),
        }
    )
    print(f"prepare, tokens/s over encode_batch alone: {found['encode'] / found['prepare']:.2f}")
    wall = best(
        {
            "one": lambda: prepare_text(
                path, folder / f"p{next(counter)}", tokenizer, 1, shard_bytes=2**20
            ),
            "two": lambda: prepare_text(
                path, folder / f"p{next(counter)}", tokenizer, 2, shard_bytes=2**20
            ),
        },
        wall=True,
    )
    print(f"prepare, two workers over one, wall time: {wall['one'] / wall['two']:.2f}")
    result = prepare_text(path, folder / "p0", tokenizer)
    size = sum(one.stat().st_size for one in (folder / "p0").rglob("*") if one.is_file())
    print(
        f"disk: {size / result.tokens:.3f} bytes per token, of which"
        f" {(size - 2 * result.tokens) / result.rows:.1f} bytes per document of"
        f" {result.tokens / result.rows:.0f} tokens"
    )


def measure_chats(tokenizer: Any, folder: Path) -> None:
    """Tiny chats over the tokenizer alone, which encodes their turns."""
    rng = np.random.default_rng(0)
    words = [word for text in texts(200_000) for word in text.split() if word.isalpha()]
    chats = [
        [
            {"role": "user", "content": " ".join(rng.choice(words, 4))},
            {"role": "assistant", "content": " ".join(rng.choice(words, 3))},
        ]
        for _ in range(60_000)
    ]
    path = folder / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": one}) + "\n" for one in chats), encoding="utf-8"
    )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    whole = [tokenizer.apply_chat_template(one, tokenize=False) for one in chats]
    backend = tokenizer.backend_tokenizer
    counter = iter(range(100))
    found = best(
        {
            "encode": lambda: backend.encode_batch(whole, add_special_tokens=False),
            "prepare": lambda: prepare(
                section(path),
                tokenizer,
                name="packed_finetuning",
                tokenizer_name="benchmark",
                out=str(folder / f"c{next(counter)}"),
                workers=1,
            ),
        }
    )
    per = {name: 1e6 * one / len(chats) for name, one in found.items()}
    print(
        f"60,000 chats: {per['prepare']:.0f} us a document, {per['encode']:.0f} us in the tokenizer"
        f" alone: {per['prepare'] / per['encode']:.2f}"
    )


def measure_reading(tokenizer: Any, folder: Path) -> None:
    """Reading and collating documents of 22 tokens, from shards and from the cache of today."""
    from foundry_ext.data.dataset import PackedDataset
    from foundry_ext.data.sources import load_rows
    from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows

    rng = np.random.default_rng(0)
    words = [word for text in texts(200_000) for word in text.split() if word.isalpha()]
    path = folder / "tiny.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(100_000):
            file.write(json.dumps({"text": " ".join(rng.choice(words, 14))}) + "\n")
    prepare_text(path, folder / "tiny", tokenizer)
    storage = Storage(str(folder / "tiny"))
    index = read_index(storage, folder / "tiny")
    files = LocalShards(storage, index.shards, index.recipe.ids)
    source = PreparedSource(index, files, 8192, "split")
    prepared = PreparedDocuments([source], [take_census(source, "tiny")], window=2**18)
    settings = TokenizeSettings(max_seq_len=8192, text_key="text", overlong="split")
    today = tokenize_rows(load_rows(str(path), "train"), tokenizer, settings)
    collator = PackCollator(max_seq_len=8192, pack_tokens=16384)
    options = {"capacity": 16384, "batch_packs": 1, "rank": 0, "world_size": 1}
    options |= {"shuffle": True, "seed": 17}
    sets = {
        name: PackedDataset(documents, collator, options)
        for name, documents in (("shards", prepared), ("today", today))
    }

    def walk(dataset: PackedDataset) -> Callable[[], None]:
        def work() -> None:
            for batch in range(len(dataset.sampler)):
                for pack in dataset.sampler.batch(batch):
                    dataset[pack]

        return work

    found = best({name: walk(dataset) for name, dataset in sets.items()})
    tokens = prepared.census.num_tokens
    print(
        f"reading and collating documents of {tokens / 100_000:.0f} tokens:"
        f" {tokens / found['shards'] / 1e6:.1f}M tokens per CPU-s, today"
        f" {tokens / found['today'] / 1e6:.1f}M: {found['today'] / found['shards']:.1f}"
    )


def measure_waiting(tokenizer: Any, folder: Path) -> None:
    """Waiting for data from another folder, with a cache of two windows, at 400,000 tokens/s."""
    path = write_texts(folder, 20_000_000)
    prepare_text(path, folder / "remote", tokenizer, shard_bytes=2**20)
    storage = Storage(str(folder / "remote"))
    index = read_index(storage, folder / "index")
    limit = 4 * max(shard.bytes for shard in index.shards)
    files = LocalShards(
        storage, index.shards, index.recipe.ids, LocalFolder(folder / "local", limit)
    )
    source = PreparedSource(index, files, 8192, "split")
    documents = PreparedDocuments([source], [take_census(source, "text")], window=500)
    sampler = sampler_of(documents, batch_packs=1)
    collator = PackCollator(max_seq_len=8192, pack_tokens=16384)
    waited, trained = 0.0, 0.0
    start = time.perf_counter()
    for batch in sampler:
        read = map(documents.read_flat, batch)
        packs = [collator.join(*tokens, lengths) for tokens, lengths in read]
        waited += time.perf_counter() - start
        step = sum(pack["num_tokens"] for pack in packs) / 400_000
        time.sleep(step)
        trained += step
        start = time.perf_counter()
    used = sum(one.stat().st_size for one in (folder / "local" / "shards").glob("*.mds"))
    print(
        f"waiting at 400,000 tokens/s, {len(sampler.plan(0).windows)} windows, wall time:"
        f" {100 * waited / trained:.2f} % of the steps; {used / 1e6:.1f} MB on the disk of at most"
        f" {limit / 1e6:.1f}"
    )


PARTS = {
    "preparing": measure_preparing,
    "chats": measure_chats,
    "plans": lambda tokenizer, folder: measure_plans(folder),
    "reading": measure_reading,
    "waiting": measure_waiting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="default: one of 49,152 ids, made now"
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    arguments = parser.parse_args()
    unknown = sorted({*arguments.parts} - PARTS.keys())
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    print(as_line(describe_machine("cpu")))
    tokenizer = make_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        datasets.config.HF_DATASETS_CACHE = Path(temporary, "cache")
        for name in arguments.parts or PARTS:
            folder = Path(temporary, name)
            folder.mkdir()
            PARTS[name](tokenizer, folder)


if __name__ == "__main__":
    main()
