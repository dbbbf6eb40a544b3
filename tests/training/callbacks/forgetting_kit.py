"""Helpers of the `forgetting` callback's tests: sets of every type, and a run's YAML with them."""

import json

from foundry_ext.training.callbacks.forgetting import Forgetting
from tests.training import kit

CHOICES = [
    {"query": f"one {word} two", "choices": ["a bird", "the river of", "12"], "gold": number % 3}
    for number, word in enumerate(("bird", "stone", "river", "light", "seven"))
]
PROBLEMS = [
    {"question": f"count {number} one", "answer": f"a bird\n#### {number}"} for number in range(3)
]


def make_sets(world, folder):
    """Return `sets` of a YAML, with every type and both roles."""
    for name, rows in (("choices", CHOICES), ("problems", PROBLEMS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    loader = kit.loader_config(world.eval_rows)
    return {
        "target": {"role": "learning", "type": "documents", "loader": loader},
        "source": {
            "role": "forgetting",
            "type": "documents",
            "kl": True,
            "max_documents": 7,
            "loader": loader,
        },
        "choice": {
            "role": "forgetting",
            "type": "multiple_choice",
            "path": str(folder / "choices.jsonl"),
            "num_fewshot": 1,
            "metric": "acc",
        },
        "problems": {
            "role": "learning",
            "type": "generation",
            "path": str(folder / "problems.jsonl"),
            "num_fewshot": 1,
            "max_new_tokens": 4,
        },
    }


def config(world, folder, method, sets, **overrides):
    settings = {
        "callbacks": {
            "spy": {},
            "forgetting": {"items": str(folder / "{run_name}.jsonl"), "sets": sets},
        },
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
        "eval_first": True,
        "eval_interval": "3ba",
        **overrides,
    }
    return kit.run_config(world, folder, method, **settings)


def callback(run):
    (forgetting,) = [x for x in run.trainer.state.callbacks if isinstance(x, Forgetting)]
    return forgetting


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
