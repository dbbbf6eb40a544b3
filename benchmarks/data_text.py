"""Benchmark of tokenising, compared with llm-foundry and with the tokenizer alone."""

import argparse
import contextlib
import functools
import json
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets.config

from benchmarks.data_figures import Table, best_of
from benchmarks.packing import make_lengths
from foundry_ext.data.documents import Documents

VOCABULARY = 49152


@functools.cache
def library_texts() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted([*folder.glob("*.py"), *folder.glob("[a-su-z]*/*.py")])
    paths = [path for path in paths if "site-packages" not in path.parts]
    return [path.read_text(errors="ignore", encoding="utf-8") for path in paths]


def make_tokenizer(name: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"special_tokens": [end], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, **settings)  # pyright: ignore
    backend.train_from_iterator(library_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )


def make_rows(num: int, kind: str) -> list[dict[str, Any]]:
    """Return rows with the lengths of distribution a, at some 4 characters per token."""
    whole, rng = "\n".join(library_texts()), random.Random(0)
    rows = []
    for length in make_lengths("a", num).tolist():
        start = rng.randrange(len(whole) - 4 * length)
        text = whole[start : start + 4 * length]
        half = len(text) // 2
        turns = [("user", text[:half]), ("assistant", text[half:])]
        messages = [{"role": role, "content": content} for role, content in turns]
        row = {"text": text, "prompt": text[:half], "response": text[half:], "messages": messages}
        keys = {"prompt/response": ("prompt", "response"), "chat": ("messages",), "text": ("text",)}
        rows.append({key: row[key] for key in keys[kind]})
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def empty_cache(folder: Path) -> Iterator[None]:
    plain = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        yield
    datasets.config.HF_DATASETS_CACHE = plain


def tokenizing(folder: Path, arguments: argparse.Namespace) -> Table:
    header = ["rows", "method", "rows/CPU-s", "MB/CPU-s", "k tokens/CPU-s", "time, ours = 1"]
    title = f"Tokenising ({arguments.num_rows} rows of a, {VOCABULARY} ids)"
    return title, header, _tokenizing(folder, arguments)


def _tokenizing(folder: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    from llmfoundry.data.finetuning.tasks import dataset_constructor, tokenize_formatted_example

    from foundry_ext.data.sources import load_rows
    from foundry_ext.data.tokenize import TokenizeSettings, tokenize_rows

    tokenizer = make_tokenizer(arguments.tokenizer)
    for kind in ("prompt/response", "chat", "text"):
        if kind == "prompt/response" and arguments.rows:
            records = read_rows(arguments.rows)
        else:
            records = make_rows(arguments.num_rows, kind)
        path = folder / f"{kind.replace('/', '_')}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        rows = load_rows(str(path), "train")
        texts = [text for record in records for text in _texts(record)]
        settings = TokenizeSettings(max_seq_len=2048, text_key="text" if kind == "text" else None)

        def ours(num_proc: int, rows=rows, settings=settings) -> Documents:
            with empty_cache(folder):
                return tokenize_rows(rows, tokenizer, settings, num_proc=num_proc)

        def loader(path=path) -> Any:
            cache = tempfile.mkdtemp(dir=folder)
            files = {"data_files": {"train": str(path)}, "cache_dir": cache}
            build = dataset_constructor.build_from_hf
            return build("json", "train", max_seq_len=2048, tokenizer=tokenizer, hf_kwargs=files)

        functions: dict[str, Callable[[], Any]] = {
            "ours, 1 process": lambda ours=ours: ours(1),
            "ours, 2 processes": lambda ours=ours: ours(2),
        }
        if kind != "text":
            functions["llm-foundry's loader, 1 process"] = loader
            functions["tokenize_formatted_example, row by row, nothing kept"] = lambda r=records: [
                tokenize_formatted_example(record, tokenizer) for record in r
            ]
        functions["tokenizer(all texts), nothing kept"] = lambda t=texts: tokenizer(
            t, verbose=False
        )
        tokens = int(ours(1).lengths.sum())
        size = sum(len(text.encode()) for text in texts) / 1e6
        best = best_of(functions, repeats=3)
        for name, seconds in best.items():
            ratio = seconds / best["ours, 1 process"]
            speed = [f"{len(records) / seconds:.0f}", f"{size / seconds:.2f}"]
            yield [kind, name, *speed, f"{tokens / seconds / 1000:.0f}", f"{ratio:.2f}"]


def _texts(record: dict[str, Any]) -> list[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    return list(record.values())
