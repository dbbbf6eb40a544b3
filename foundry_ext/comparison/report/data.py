"""The report's numbers as JSON."""

import json
from dataclasses import asdict
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from foundry_ext.comparison.claims import find_claims
from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.front_comparison import FrontComparison
from foundry_ext.comparison.matched_runs import MatchedRuns
from foundry_ext.comparison.pairwise import MethodPair, PairwiseComparison
from foundry_ext.comparison.tradeoff import matched_pairs


def write_json(path: Path, comparison: Comparison) -> None:
    """Write the report's numbers in the records' units: accuracies are shares, not points."""
    data = {
        "schema_version": 1,
        "learning": comparison.learning.key,
        "forgetting": comparison.forgetting.key,
        "runs": {label: [run.name for run in group] for label, group in comparison.groups.items()},
        "left_out": comparison.left_out,
        "accepted_differences": comparison.accepted,
        "best_learning_rates": {
            label: {
                **_as_measure(asdict(best)),
                "means": {f"{k:g}": v if isfinite(v) else None for k, v in best.means.items()},
            }
            for label, best in comparison.best.items()
        },
        "methods": [_plain(asdict(summary)) for summary in comparison.summaries],
        "pairs": [_pair(pair) for pair in comparison.pairs],
        "pareto_front": [asdict(point) for point in comparison.front],
        "fronts": _fronts(comparison.fronts),
        "claims": [
            {
                **_as_measure(asdict(finding)),
                "verdict": finding.verdict.value,
                "in_these_runs": finding.in_these_runs.value,
            }
            for finding in find_claims(comparison)
        ],
        "matched_learning": [
            {"level": level, "methods": {label: asdict(at) for label, at in methods.items()}}
            for level, methods in comparison.matched.items()
        ],
        "matched_pairs": [
            {**asdict(pair), "distinguishable": pair.is_distinguishable}
            for pair in matched_pairs(comparison.matched.get(comparison.common_level or 0.0, {}))
        ],
        "at_matched_rates": _at_matched_rates(comparison.at_matched_rates),
    }
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _pair(pair: PairwiseComparison) -> dict[str, Any]:
    return {
        **_plain(asdict(pair)),
        "p": pair.p,
        "distinguishable": pair.is_distinguishable,
        "sentence": pair.sentence,
    }


def _at_matched_rates(at_rates: MatchedRuns | None) -> dict[str, Any] | None:
    if at_rates is None:
        return None
    return {
        "learning_rates": at_rates.rates,
        "runs": {label: [run.name for run in group] for label, group in at_rates.runs.items()},
        "methods": [
            _plain(asdict(summary)) for each in at_rates.summaries.values() for summary in each
        ],
        "pairs": [_pair(pair) for pair in chain(*at_rates.pairs.values())],
    }


def _fronts(fronts: FrontComparison) -> dict[str, Any]:
    def pair_data(pair: MethodPair) -> dict[str, Any]:
        return {**asdict(pair), "distinguishable": pair.is_distinguishable}

    return {
        "reference_forgetting": fronts.reference,
        "reference_given": fronts.is_given,
        "methods": {
            label: {
                "learning_rates": each.rates,
                "seeds": each.seeds,
                "items": each.num_items or None,
                "hypervolume": asdict(fronts.areas[label]) if label in fronts.areas else None,
            }
            for label, each in fronts.points.items()
        },
        "at_floor": fronts.at_floor,
        "pairs": [pair_data(pair) for pair in fronts.area_pairs],
        "not_compared": fronts.not_compared,
        "matched_learning": [
            {"level": level, "methods": {label: asdict(value) for label, value in values.items()}}
            for level, values in fronts.levels.items()
        ],
        "tested_level": fronts.tested_level,
        "matched_pairs": [pair_data(pair) for pair in fronts.level_pairs],
    }


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    metric = data["metric"]
    return {**_as_measure(data), "measure": metric["key"], "role": metric["role"]}


def _as_measure(data: dict[str, Any]) -> dict[str, Any]:
    """Rename `metric` to `measure`, its key in the files that users have."""
    return {"measure" if key == "metric" else key: value for key, value in data.items()}
