"""Section on what training did to the weights, from analysis.json beside the records."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.report.document import Block, Figure, Heading, Table
from foundry_ext.comparison.report.plots import plot_lines
from foundry_ext.comparison.report.wording import format_mean_over_seeds, format_seeds
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.utils.errors import UserError

_SUMMARY = ("matrices", "median_rank_90", "total_intruders", "relative_change", "k", "epsilon")


def analysis_blocks(comparison: Comparison, folder: Path) -> list[Block]:
    """Return the section on the runs that `foundry-ext analyse` has seen, if there are any.

    Raises:
        UserError: an analysis.json lacks numbers that this version reads.
    """
    analysed: dict[tuple[str, float], list[Run]] = {}
    for run in comparison.all_runs:
        if run.analysis is not None:
            analysed.setdefault((run.label, run.learning_rate), []).append(run)
    if not analysed:
        return []
    first = _summary(next(iter(analysed.values()))[0])
    blocks: list[Block] = [
        Heading("What training did to the weights"),
        Table(
            ["runs", "rank for 90 %", "intruders", "matrices", "size of the change, %"],
            [_row(label, rate, runs) for (label, rate), runs in analysed.items()],
            "Rank for 90 %: singular values that hold 90 % of the energy of a matrix's change,"
            " median over the matrices analysed. Intruders: how many of each tuned matrix's first"
            f" {first['k']} singular vectors have a cosine below {first['epsilon']:g} with"
            " every old one; all matrices together. Size: norm of the change over that of the"
            f" weights. With {MIN_SEEDS} seeds or more, means with 95 % t intervals over seeds;"
            " with fewer, the numbers describe these runs exactly, and no others. DoRA also scales"
            " each row of the weights, so the rank of its change can exceed r.",
        ),
    ]
    lines = [
        (f"{label} at {rate:g}, seed {run.seed}", label, _line(comparison, run))
        for (label, rate), runs in analysed.items()
        for run in runs
    ]
    lines = [(name, label, line) for name, label, line in lines if line]
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


def _row(label: str, rate: float, runs: Sequence[Run]) -> list[str]:
    summaries = [_summary(run) for run in runs]

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return format_mean_over_seeds([summary[key] * scale for summary in summaries], form)

    return [
        f"{label} at {rate:g}, {format_seeds([run.seed for run in runs])}",
        cell("median_rank_90", "{:.4g}"),
        cell("total_intruders", "{:,.4g}"),
        f"{summaries[0]['matrices']:,}",
        cell("relative_change", "{:.2f}", 100.0),
    ]


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
