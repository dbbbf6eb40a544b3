"""Common part of the sets that read a task's file: its rows, and few-shot prompts for them."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from foundry_ext.evaluation.config import TaskSetConfig
from foundry_ext.evaluation.rows import few_shot_prompt, fingerprint, read_rows
from foundry_ext.evaluation.scoring import evenly_spaced

log = logging.getLogger(__name__)


Config = TypeVar("Config", bound=TaskSetConfig)


class TaskSet(Generic[Config]):
    """Rows of a task's file that are measured.

    Args:
        config: the set's settings.
        parse: makes a question or problem of a row; its second argument is the row's place, for
            errors. The result has `solved`, the text that it is as a few-shot example.

    Attributes:
        items: indices of the measured rows in the file.
        questions: what `parse` made of them.
        few_shot: the text before each of them.
        lengths: tokens of each encoded text, set by `count`.
    """

    def __init__(self, config: Config, parse: Callable[[dict[str, Any], str], Any]):
        rows = read_rows(config.path)
        parsed = [parse(row, f"{config.path}, row {index}") for index, row in enumerate(rows)]
        examples = [question.solved for question in parsed]
        self.config = config
        self.items: list[int] = evenly_spaced(len(rows), config.max_items).tolist()
        self.questions = [parsed[item] for item in self.items]
        self.few_shot = [few_shot_prompt(examples, item, config.num_fewshot) for item in self.items]
        self.fingerprint = fingerprint([rows[item] for item in self.items])

    def count(self, texts: str, lengths: Sequence[int], num_truncated: int, limit: int) -> None:
        """Keep the counts of the encoded `texts`, and warn if some were truncated to `limit`."""
        self.lengths, self.num_truncated = lengths, num_truncated
        if num_truncated:
            log.warning(
                "%s: %d of %d %s exceed %d tokens and were cut from the left",
                *(self.config.name, num_truncated, len(lengths), texts, limit),
            )

    @property
    def description(self) -> dict[str, Any]:
        """Identity of the data, for the run's record."""
        intact = len(self.lengths) - self.num_truncated
        return {
            "name": self.config.path,
            "revision": None,
            "fingerprint": self.fingerprint,
            "documents": len(self.items),
            "tokens": int(sum(self.lengths)),
            "counts": {"kept": intact, "truncated": self.num_truncated},
        }
