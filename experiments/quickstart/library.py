"""The source of this Python's own standard library, which every machine has: the base model's data.

A path's hash decides which files are held out; forgetting is measured on those.
"""

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.04
# Not what a library's user reads or calls: tests, character tables, bundled programs.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data"}
_NUM_WRONG = 3
_CONTEXT_LINES = 4
_LEAST_WORDS, _MOST_WORDS = 5, 9


def standard_library() -> dict[str, list[dict[str, str]]]:
    """{"train": rows, "eval": rows} of {path, text}, in a fixed order."""
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
    """In which order do the words of a line stand? {query, choices, gold}.

    A line of code or documentation after the lines before it, against the same words shuffled. The
    choices have nearly the same tokens, so what decides is their order. Evaluators put a space
    between query and choice; the lines are indented ones, given with one space less.
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
    """`_NUM_WRONG` different orders of the words, none of them the given one."""
    seen = {tuple(words)}
    while len(seen) <= _NUM_WRONG:
        order = tuple(rng.sample(words, len(words)))
        if order not in seen:
            seen.add(order)
            yield indent + " ".join(order)


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """A byte-level BPE tokenizer like SmolLM2's, small: every text is representable."""
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
