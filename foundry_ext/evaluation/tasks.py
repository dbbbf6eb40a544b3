"""Public evaluation tasks -> JSONL that llm-foundry's in-context-learning evaluators and ours read.

llm-foundry itself would join a hub data set's columns with `str()`, which makes one string of
HellaSwag's endings or ARC's choices, and reads no GSM8K. The questions are worded as
lm-evaluation-harness words them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry_ext.evaluation.rows import read_rows
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's rows are on the hub, and what becomes of one."""

    hub: str
    config: str | None
    split: str
    """That with public labels, which papers report."""
    icl_task_type: str
    """llm-foundry's, for its YAML."""
    convert: Callable[[Row], Row]


def convert_hellaswag(row: Row) -> Row:
    """{activity_label, ctx_a, ctx_b, endings, label} -> {query, choices, gold}."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _without_marks(f"{row['activity_label']}: {context}"),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    """WikiHow's part is full of marks: "[title]" ends a sentence, "[step]" and others go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def convert_arc(row: Row) -> Row:
    """{question, choices: {text, label}, answerKey} -> {query, choices, gold}."""
    return {
        "query": f"Question: {row['question']}\nAnswer:",
        "choices": list(row["choices"]["text"]),
        # Labels are A to E, or 1 to 5.
        "gold": list(row["choices"]["label"]).index(row["answerKey"]),
    }


def convert_winogrande(row: Row) -> Row:
    """{sentence with "_", option1, option2, answer} -> {context_options, continuation, gold}.

    The choices differ in the context, and what follows is scored (arXiv 1806.02847).
    """
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise UserError("no gap '_' in the sentence")
    return {
        "context_options": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": ("1", "2").index(str(row["answer"])),
    }


def convert_gsm8k(row: Row) -> Row:
    """{question, answer} -> {context, answer, aliases, chain_of_thought}; the reasoning and the
    answer are joined again by llm-foundry's `cot_delimiter`, which is "\\n#### " here."""
    reasoning, mark, answer = row["answer"].rpartition("#### ")
    if not mark:
        raise UserError("no '#### ' in the answer")
    number = answer.strip()
    return {
        "context": f"Question: {row['question']}\nAnswer:",
        "answer": number,
        "aliases": list(dict.fromkeys([number, number.replace(",", "")])),
        "chain_of_thought": reasoning.strip(),
    }


TASKS = {
    "hellaswag": Task(
        hub="Rowan/hellaswag",
        config=None,
        split="validation",
        icl_task_type="multiple_choice",
        convert=convert_hellaswag,
    ),
    "arc_challenge": Task(
        hub="allenai/ai2_arc",
        config="ARC-Challenge",
        split="test",
        icl_task_type="multiple_choice",
        convert=convert_arc,
    ),
    "winogrande": Task(
        hub="allenai/winogrande",
        config="winogrande_xl",
        split="validation",
        icl_task_type="schema",
        convert=convert_winogrande,
    ),
    "gsm8k": Task(
        hub="openai/gsm8k",
        config="main",
        split="test",
        icl_task_type="generation_task_with_answers",
        convert=convert_gsm8k,
    ),
}


def write_task(
    name: str,
    out: Path,
    *,
    source: Path | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> int:
    """Writes `out`, and beside it `<out>.source.json`, which says where the rows are from.

    Args:
        source: a JSONL file with the hub's columns; without it the rows are fetched.
        split, revision: of the hub's data set; the task's own split and "main" where not given.
            The commit that the revision names is what is recorded.

    Returns:
        The number of rows.

    Raises:
        FileNotFoundError: no `source`.
        ValueError: unknown task, a row of another schema, or one without a label.
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
    # llm-foundry takes the first question's number of choices for everyone's and dies on one with
    # more, as a few of ARC's have; with the most choices first it never finds more.
    converted = sorted(_convert(task, rows), key=lambda row: -len(row.get("choices", ())))
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in converted))
    described = {"task": name, **origin, "rows": len(converted)}
    write_text(source_file(out), json.dumps(described, indent=1) + "\n")
    return len(converted)


def source_file(path: Path) -> Path:
    """Beside a task's file: where its rows are from."""
    return path.with_name(f"{path.name}.source.json")


def _from_hub(task: Task, split: str, revision: str) -> tuple[str, Iterable[Row]]:
    """(commit, rows). The commit is looked up first, so that rows and record agree."""
    import datasets
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(task.hub, revision=revision).sha
    assert commit is not None
    rows = datasets.load_dataset(
        task.hub, task.config, split=split, revision=commit, trust_remote_code=False
    )
    return commit, rows  # pyright: ignore[reportReturnType]


def _convert(task: Task, rows: Iterable[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        try:
            yield task.convert(row)
        except KeyError as error:
            raise UserError(
                f"row {number} has no column {error}; there are {', '.join(row)}: the source needs"
                f" the schema of {task.hub}"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"row {number} is not labelled as {task.hub}'s {task.split} split is ({error});"
                " its test split may come without labels"
            ) from error
