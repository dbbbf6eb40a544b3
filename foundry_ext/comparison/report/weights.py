"""Section on what training did to the weights, from analysis.json beside the records."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.report.document import Block, Figure, Heading, Table
from foundry_ext.comparison.report.plots import plot_lines
from foundry_ext.comparison.runs import Run
from foundry_ext.utils.errors import UserError

_SUMMARY = ("matrices", "median_rank_90", "total_intruders", "relative_change", "k", "epsilon")


def analysis_blocks(comparison: Comparison, folder: Path) -> list[Block]:
    """Return the section on the chosen runs that `foundry-ext analyse` has seen, if there are any.

    Raises:
        UserError: an analysis.json lacks numbers that this version reads.
    """
    analysed = [
        (label, run)
        for label, runs in comparison.chosen.items()
        for run in runs
        if run.analysis is not None
    ]
    if not analysed:
        return []
    rows = []
    for label, run in analysed:
        summary = _summary(run)
        rows.append(
            [
                f"{label}, seed {run.seed}",
                f"{summary['median_rank_90']:g}",
                f"{summary['total_intruders']:,}",
                f"{summary['matrices']:,}",
                f"{summary['relative_change']:.2%}",
            ]
        )
    summary = _summary(analysed[0][1])
    blocks: list[Block] = [
        Heading("What training did to the weights"),
        Table(
            ["run", "rank for 90 %", "intruders", "matrices", "size of the change"],
            rows,
            "Rank for 90 %: singular values that hold 90 % of the energy of a matrix's change,"
            " median over the matrices analysed. Intruders: how many of each tuned matrix's first"
            f" {summary['k']} singular vectors have a cosine below {summary['epsilon']:g} with"
            " every old one; all matrices together. Size: norm of the change over that of the"
            " weights.",
        ),
    ]
    lines = [(label, run.seed, _line(comparison, run)) for label, run in analysed]
    lines = [(label, seed, line) for label, seed, line in lines if line]
    if lines:
        plot_lines(comparison, lines, folder)
        blocks.append(
            Figure(
                "interpolation",
                "Learning against forgetting along the line from the base model (0) to the tuned"
                " weights (1), one point per step of alpha; lower right is better. One run each, no"
                " intervals.",
            )
        )
    return blocks


def _summary(run: Run) -> Mapping[str, Any]:
    summary = (run.analysis or {}).get("summary")
    if not isinstance(summary, Mapping) or any(
        not isinstance(summary.get(key), int | float) for key in _SUMMARY
    ):
        raise UserError(
            f"{run.name}: its analysis.json has no summary that this version can read; run"
            " `foundry-ext analyse` again"
        )
    return summary


def _line(comparison: Comparison, run: Run) -> list[tuple[float, float]]:
    """Return (learning, forgetting) by rising alpha, in the measures of the trade-off.

    Return nothing if a point lacks one of the two.
    """
    x, y = comparison.learning.key, comparison.forgetting.key
    points = []
    for point in (run.analysis or {}).get("line") or []:
        learned, forgot = point["learning"].get(x), point["forgetting"].get(y)
        if learned is None or forgot is None or not math.isfinite(learned + forgot):
            return []
        points.append((point["alpha"], learned, forgot))
    return [(learned, forgot) for _, learned, forgot in sorted(points)]
