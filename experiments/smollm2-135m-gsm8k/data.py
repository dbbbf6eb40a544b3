"""The experiment's rows: GSM8K, ARC-challenge and WinoGrande from files or the hub, and prose.

No text of a benchmark is in the repository. Rows are drawn with a fixed seed, without regard to the
base model's answers, and are the same on every machine.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.evaluation.rows import read_rows
from foundry_ext.evaluation.tasks import write_task
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError

Row = Mapping[str, Any]

SEED = 20
SLICE_ROWS = 512  # of GSM8K's training split; more than a run of stage a, b or c reads
EVAL_ROWS = 64
ARC_ROWS = 128
WINOGRANDE_ROWS = 192
PROSE_DOCUMENTS, PROSE_WORDS = 32, 160
REPLAY_PROSE = 16

FILES = {
    "gsm8k_train.jsonl": "openai/grade-school-math: grade_school_math/data/train.jsonl",
    "gsm8k_test.jsonl": "test.jsonl beside it",
    "arc_challenge.jsonl": "mosaicml/llm-foundry: scripts/eval/local_data",
    "winogrande.jsonl": "beside it",
}
_FOLDERS = (".", "train", "eval")


def find_files(folder: Path) -> dict[str, Path]:
    """Return the path of every file of FILES in `folder` or its subfolders train and eval.

    Raises:
        UserError: one is missing; says in one line what to fetch and where to put it.
    """
    found = {
        name: folder / place / name
        for name in FILES
        for place in _FOLDERS
        if (folder / place / name).is_file()
    }
    missing = [f"{name} ({FILES[name]})" for name in FILES if name not in found]
    if missing:
        raise UserError(
            f"{folder} does not have all benchmarks: fetch {', '.join(missing)} from GitHub into a"
            " folder, or into its train/ and eval/, and give DATA=FOLDER; with a hub, DATA=hub"
        )
    return found


def fetch_files(folder: Path) -> dict[str, Path]:
    """Download the files of FILES from the hub into `folder`, and return their paths."""
    paths = {name: folder / name for name in FILES}
    for task in ("arc_challenge", "winogrande"):
        if not paths[f"{task}.jsonl"].is_file():
            write_task(task, paths[f"{task}.jsonl"])
    for split in ("train", "test"):
        path = paths[f"gsm8k_{split}.jsonl"]
        if not path.is_file():
            import datasets

            rows: Any = datasets.load_dataset(
                "openai/gsm8k", "main", split=split, trust_remote_code=False
            )
            write_rows(path, [{key: row[key] for key in ("question", "answer")} for row in rows])
    return paths


def benchmark_rows(files: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Return {file name: rows} of what is trained and measured."""
    train, test, arc, winogrande = (read_rows(str(files[name])) for name in FILES)
    first, second = _halves(_draw(train, 2 * SLICE_ROWS))
    held_out = _draw(test, EVAL_ROWS)
    return {
        "gsm8k_train_1.jsonl": first,
        "gsm8k_train_2.jsonl": second,
        "gsm8k_eval.jsonl": held_out,
        # For exact match with five shots, whose examples are other rows of the same file.
        "gsm8k_problems.jsonl": [row for row in test if row not in held_out],
        "arc_challenge.jsonl": [_with_answer(row) for row in _draw(arc, ARC_ROWS)],
        "winogrande.jsonl": _draw(winogrande, WINOGRANDE_ROWS),
    }


def _draw(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) < count:
        raise UserError(f"{len(rows)} rows, {count} are needed; give the complete file")
    return random.Random(SEED).sample(rows, count)


def _halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _with_answer(row: Row) -> Row:
    """Return a question that ends in "Answer:", as `foundry-ext tasks` words it."""
    query = row["query"].removesuffix("\nAnswer:")
    return {"query": f"{query}\nAnswer:", "choices": row["choices"], "gold": row["gold"]}


def prose() -> tuple[list[Row], list[Row]]:
    """Return (measured, replayed) documents of English prose, each of some 200 tokens.

    It is the prose of Python's language reference, which every Python has as the help texts of
    `pydoc`. Web crawls and collections of code, which SmolLM2 was pretrained on, have it many
    times, so the model knows it. Neither GSM8K nor the chat answers look like it.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = [
        {"text": text} for name in sorted(topics) for text in _passages(topics[name], seen)
    ]
    drawn = _draw(documents, PROSE_DOCUMENTS + REPLAY_PROSE)
    return drawn[:PROSE_DOCUMENTS], drawn[PROSE_DOCUMENTS:]


def _passages(topic: str, seen: set[str]) -> Iterator[str]:
    """Yield passages of at least PROSE_WORDS words that consist of a topic's prose paragraphs.

    Paragraphs in `seen` are left out, because topics repeat one another's, and new ones are added.
    """
    passage: list[str] = []
    for block in topic.split("\n\n"):
        paragraph = re.sub(r"\s+", " ", block)
        if paragraph in seen or not _is_prose(block, paragraph):
            continue
        seen.add(paragraph)
        passage.append(paragraph)
        if sum(len(text.split()) for text in passage) >= PROSE_WORDS:
            yield "\n\n".join(passage)
            passage = []


def _is_prose(block: str, paragraph: str) -> bool:
    """Return whether a block is whole sentences: no code, grammar, list or heading."""
    is_sentence = re.match(r"[A-Z][a-z]*[ ,]", block) and paragraph.endswith((".", ":"))
    return bool(is_sentence) and len(paragraph.split()) >= 20 and "::=" not in paragraph


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
