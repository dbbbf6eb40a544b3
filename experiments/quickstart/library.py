"""The base model's data: the source of this Python's standard library, which every machine has.

A file is held out by the hash of its path. Forgetting is measured on the held-out files.
"""

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.04
# Tests, character tables and bundled programs, which users of the library do not read or call.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data"}
_NUM_WRONG = 3
_CONTEXT_LINES = 4
_LEAST_WORDS, _MOST_WORDS = 5, 9


def standard_library() -> dict[str, list[dict[str, str]]]:
    """Return {"train": rows, "eval": rows}, where a row is {path, text}, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT.intersection(relative.parts):
            name = relative.as_posix()
            text = path.read_text(encoding="utf-8", errors="replace")
            parts["eval" if _is_held_out(name) else "train"].append({"path": name, "text": text})
    return parts


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def choices(rows: Sequence[dict[str, str]], count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield questions about the order of a line's words: {query, choices, gold}.

    The query is the lines before a line of code or documentation. The choices are that line and the
    same words shuffled, so they have nearly the same tokens and differ by order. Evaluators put a
    space between query and choice, so only indented lines are used, with one space removed.
    """
    rng = random.Random(seed)
    places = [
        ("\n".join(lines[start - _CONTEXT_LINES : start]) + "\n", line[1:])
        for row in rows
        for lines in [row["text"].splitlines()]
        for start, line in enumerate(lines)
        if start >= _CONTEXT_LINES
        and line.startswith("    ")
        and _LEAST_WORDS <= len(set(line.split())) <= _MOST_WORDS
    ]
    for query, right in rng.sample(places, min(count, len(places))):
        indent, words = right[: len(right) - len(right.lstrip())], right.split()
        lines = {right.rstrip(): None, **dict.fromkeys(_shuffles(rng, indent, words))}
        choices = list(lines)
        rng.shuffle(choices)
        yield {"query": query, "choices": choices, "gold": choices.index(right.rstrip())}


def _shuffles(rng: random.Random, indent: str, words: Sequence[str]) -> Iterator[str]:
    """Yield `_NUM_WRONG` different orders of the words, without the given one."""
    seen = {tuple(words)}
    while len(seen) <= _NUM_WRONG:
        order = tuple(rng.sample(words, len(words)))
        if order not in seen:
            seen.add(order)
            yield indent + " ".join(order)


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Train and save a small byte-level BPE tokenizer like SmolLM2's, which can encode any text."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        iter(texts), vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
