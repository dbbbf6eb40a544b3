"""Prints the learning rate of each method at which all methods learn the same, from stage a.

    python experiments/smollm2-135m-gsm8k/match.py

foundry_ext/comparison/matched_rates.py says how the level and the rates are found.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.comparison.matched_rates import RatePoints, match_learning_rates
from foundry_ext.records.record import read_record
from foundry_ext.utils.errors import UserError

RUNS = Path(__file__).parent / "results" / "runs"
SEED, RANK = 17, 64
METHODS = ("full", "lora", "dora", "rslora")


def stage_a(records: Sequence[Mapping[str, Any]]) -> dict[str, RatePoints]:
    """Return the points of each method among the records of stage a."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        variables = record["config"]["variables"]
        plain = (variables["mixture"], variables["slice"], variables["weights"])
        if record["seed"] != SEED or plain != ("none", 1, "q4_1"):
            continue
        if record["model"]["rank"] in (None, RANK) and variables["learning_rate"] != "matched":
            learned = record["evaluations"][-1]["learning"]["target_loss"]
            points[record["method"]].append((record["learning_rate"], learned))
    return {method: sorted(found) for method, found in points.items()}


def match(by_method: Mapping[str, RatePoints]) -> tuple[float, dict[str, float]]:
    """Return the level in nats per token, and the learning rate of each method that learns it.

    Raises:
        UserError: a method has no runs yet, or learns more than the level at its lowest rate.
    """
    missing = [method for method in METHODS if not by_method.get(method)]
    if missing:
        raise UserError(
            f"stage a has no finished run of {', '.join(missing)}, and the level depends on all"
            " methods; run it to its end first"
        )
    return match_learning_rates(by_method)


def main() -> int:
    records = [read_record(path) for path in sorted(RUNS.glob("*/record.json"))]
    by_method = stage_a(records)
    try:
        level, rates = match(by_method)
    except UserError as error:
        print(f"match.py: error: {error}", file=sys.stderr)
        return 1
    runs = ", ".join(f"{method} {len(points)}" for method, points in by_method.items())
    print(f"learning rates that finished in stage a: {runs}")
    print(f"learning of {level:.3f} nats per token; for `learning_rates` of the YAMLs:")
    for method, rate in rates.items():
        print(f"  {method}: matched: {rate:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
