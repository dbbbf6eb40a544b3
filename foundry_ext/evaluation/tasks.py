"""Public evaluation tasks, converted to the JSONL that llm-foundry's evaluators and ours read.

llm-foundry's own conversion joins a dataset's columns with `str()`, which turns HellaSwag's endings
or ARC's choices into one string, and it cannot read GSM8K. Questions are worded as in
lm-evaluation-harness.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from foundry_ext.evaluation.rows import read_rows
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError, naming

Row = dict[str, Any]


class Task(NamedTuple):
    """A task's rows on the hub, and their conversion."""

    hub: str
    config: str | None
    split: str
    """The split with public labels, which papers report."""
    icl_task_type: str
    """The task's type in llm-foundry's YAML."""
    convert: Callable[[Row], Row]


def convert_hellaswag(row: Row) -> Row:
    """Convert {activity_label, ctx_a, ctx_b, endings, label} to {query, choices, gold}."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _without_marks(f"{row['activity_label']}: {context}"),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    """Remove WikiHow's marks; "[title]" becomes the end of a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def convert_arc(row: Row) -> Row:
    """Convert {question, choices: {text, label}, answerKey} to {query, choices, gold}."""
    return {
        "query": f"Question: {row['question']}\nAnswer:",
        "choices": list(row["choices"]["text"]),
        # Labels are A to E, or 1 to 5.
        "gold": list(row["choices"]["label"]).index(row["answerKey"]),
    }


def convert_winogrande(row: Row) -> Row:
    """Convert {sentence with "_", option1, option2, answer} to a schema row.

    The row is {context_options, continuation, gold}: the options differ in the context, and the
    text after the gap is scored (arXiv 1806.02847).
    """
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise UserError("the sentence has no gap '_'")
    return {
        "context_options": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": ("1", "2").index(str(row["answer"])),
    }


def convert_gsm8k(row: Row) -> Row:
    """Convert {question, answer} to {context, answer, aliases, chain_of_thought}.

    llm-foundry joins reasoning and answer again by its `cot_delimiter`, here "\\n#### ".
    """
    reasoning, mark, answer = row["answer"].rpartition("#### ")
    if not mark:
        raise UserError("the answer has no '#### '")
    answer = answer.strip()
    return {
        "context": f"Question: {row['question']}\nAnswer:",
        "answer": answer,
        "aliases": list(dict.fromkeys([answer, answer.replace(",", "")])),
        "chain_of_thought": reasoning.strip(),
    }


TASKS = {
    "hellaswag": Task("Rowan/hellaswag", None, "validation", "multiple_choice", convert_hellaswag),
    "arc_challenge": Task(
        "allenai/ai2_arc", "ARC-Challenge", "test", "multiple_choice", convert_arc
    ),
    "winogrande": Task(
        "allenai/winogrande", "winogrande_xl", "validation", "schema", convert_winogrande
    ),
    "gsm8k": Task("openai/gsm8k", "main", "test", "generation_task_with_answers", convert_gsm8k),
}


def write_task(
    name: str,
    out: Path,
    *,
    source: Path | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> int:
    """Write a task's rows to `out`, and their origin to `<out>.source.json`.

    Args:
        name: a key of `TASKS`.
        out: the JSONL file to write.
        source: a JSONL file with the hub's columns; without it the rows are downloaded.
        split: of the hub's dataset; by default the task's.
        revision: of the hub's dataset; by default "main". Its commit is recorded.

    Returns:
        The number of rows.

    Raises:
        FileNotFoundError: `source` does not exist.
        UserError: the task is unknown, or a row has another schema or no label.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    split = split or task.split
    if source is not None:
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist")
        rows: Iterable[Row] = read_rows(str(source))
        origin = {"source": source.name, "split": None, "revision": None}
    else:
        commit, rows = _from_hub(task, split, revision or "main")
        origin = {"source": task.hub, "config": task.config, "split": split, "revision": commit}
    # llm-foundry expects every question to have as many choices as the first and dies on one with
    # more, which ARC has a few of. Therefore the rows with the most choices come first.
    converted = sorted(_convert(task, rows), key=lambda row: -len(row.get("choices", ())))
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in converted))
    description = {"task": name, **origin, "rows": len(converted)}
    write_text(source_file(out), json.dumps(description, indent=1) + "\n")
    return len(converted)


def source_file(path: Path) -> Path:
    """Return the file beside a task's file that holds the origin of its rows."""
    return path.with_name(f"{path.name}.source.json")


def _from_hub(task: Task, split: str, revision: str) -> tuple[str, Iterable[Row]]:
    """Return (commit, rows); the commit is looked up first, so that both agree."""
    import datasets
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(task.hub, revision=revision).sha
    assert commit is not None
    with naming(f"{task.hub}, split {split!r}"):
        rows = datasets.load_dataset(
            task.hub, task.config, split=split, revision=commit, trust_remote_code=False
        )
    return commit, rows  # pyright: ignore[reportReturnType]


def _convert(task: Task, rows: Iterable[Row]) -> Iterator[Row]:
    for index, row in enumerate(rows):
        try:
            yield task.convert(row)
        except KeyError as error:
            raise UserError(
                f"row {index} has no column {error}, only {', '.join(row)}; the source must have"
                f" the schema of {task.hub}"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"row {index} is not labelled like {task.hub}'s {task.split} split ({error}); use"
                " that split, since a test split may have no labels"
            ) from error
