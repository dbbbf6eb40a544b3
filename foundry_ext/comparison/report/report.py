"""The report of a comparison: its text, and the folder with its pages, data and plots."""

import os
import shutil
import tempfile
from pathlib import Path

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.report import plots
from foundry_ext.comparison.report.claims import claim_blocks
from foundry_ext.comparison.report.data import write_json
from foundry_ext.comparison.report.document import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    ReportDocument,
    Subheading,
    format_html,
    format_markdown,
)
from foundry_ext.comparison.report.fronts import front_blocks
from foundry_ext.comparison.report.tables import cost_blocks, measure_blocks, run_blocks
from foundry_ext.comparison.report.tradeoff import dominated_blocks, matched_blocks
from foundry_ext.comparison.report.values import value_blocks
from foundry_ext.comparison.report.weights import analysis_blocks
from foundry_ext.comparison.report.wording import (
    format_range,
    format_seeds,
    format_seeds_and_items,
    join_names,
)
from foundry_ext.comparison.statistics import MIN_SEEDS
from foundry_ext.utils.atomic import sync


def write_report(comparison: Comparison, folder: Path | str) -> None:
    """Write comparison.md, index.html, comparison.json and each plot as PNG and SVG.

    All files are complete before the first one reaches `folder`, so that an error leaves what was
    there before.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
            _write_files(comparison, Path(scratch))
            written = sorted(Path(scratch).iterdir())
            for file in written:
                sync(file)
            for file in written:
                os.replace(file, folder / file.name)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_files(comparison: Comparison, folder: Path) -> None:
    plots.plot_tradeoff(comparison, folder)
    plots.plot_curves(comparison, folder)
    plots.plot_learning_rates(comparison, folder)
    if comparison.pairs:
        plots.plot_differences(comparison, folder)
    blocks = [
        *_opening(comparison),
        *front_blocks(comparison),
        *matched_blocks(comparison),
        *_findings(comparison),
        *claim_blocks(comparison),
        *_curves(comparison),
        *_learning_rates(comparison),
        *value_blocks(comparison),
        *measure_blocks(comparison),
        *cost_blocks(comparison),
        *analysis_blocks(comparison, folder),
        *_statistics(),
        *run_blocks(comparison),
    ]
    title = join_names(list(comparison.groups))
    document = ReportDocument(f"{title}: learning and forgetting", blocks)
    write_json(folder / "comparison.json", comparison)
    (folder / "comparison.md").write_text(format_markdown(document), encoding="utf-8")
    (folder / "index.html").write_text(format_html(document, folder), encoding="utf-8")


def _opening(comparison: Comparison) -> list[Block]:
    records = [run.record for run in comparison.runs]
    experiments = sorted({record["experiment"] for record in records})
    data = sorted({str(record["data"]["train"]["name"] or "one data set") for record in records})
    steps = [record["steps"] for record in records]
    tokens = [record["tokens"]["real"] for record in records]
    bases = {record["model"]["name"] for record in records}
    methods = f"{len(comparison.groups)} methods" if len(comparison.groups) > 1 else "one method"
    base = "one base model" if len(bases) == 1 else join_names(sorted(bases))
    text = (
        f"{len(records)} runs of {methods} on {join_names(data)} ({', '.join(experiments)}),"
        f" {format_range(steps)} steps, {format_range(tokens)} real tokens each, from {base}. All"
        " values are changes from a run's own step 0, the base model. Positive learning means that"
        " more was learned, positive forgetting that more was forgotten."
    )
    if comparison.at_matched_rates is not None:
        num_matched = sum(map(len, comparison.at_matched_rates.runs.values()))
        text += (
            f" {num_matched} more runs, at learning rates chosen for equal learning, are compared"
            " in the section on matched learning."
        )
    blocks: list[Block] = [Paragraph(text), *map(Paragraph, caveats(comparison))]
    blocks += map(Paragraph, _diverged_at_chosen_rate(comparison))
    if comparison.accepted:
        blocks.append(Paragraph("Accepted by --allow, and so possible causes of any difference:"))
        blocks.append(Bullets(comparison.accepted))
    return blocks


def caveats(comparison: Comparison) -> list[str]:
    """Return a sentence per claim that these runs cannot support."""
    texts = []
    at_rates = comparison.at_matched_rates
    if not comparison.is_in_general:
        few = [label for label, group in comparison.chosen.items() if len(group) < MIN_SEEDS]
        names = join_names(few)
        if at_rates is not None and at_rates.is_in_general:
            texts.append(
                f"{names}: fewer than {MIN_SEEDS} seeds ran the grid. Fronts and best rates are"
                " shown, but methods are not ranked by them, because a seed may decide which is"
                " ahead there. Methods are ranked at the learning rates chosen for equal learning,"
                " where all have more seeds."
            )
        else:
            texts.append(
                f"{names}: fewer than {MIN_SEEDS} seeds. No claim about these methods in general"
                " is made. Intervals that involve them are over items and hold for these runs"
                " only."
            )
    points = comparison.fronts.points
    short = [
        label
        for label, group in comparison.chosen.items()
        if len(points[label].seeds) < MIN_SEEDS <= len(group)
    ]
    if short:
        texts.append(
            f"{join_names(short)}: fewer than {MIN_SEEDS} seeds were run at every learning rate, so"
            " no claim about whole fronts in general is made. What is said about these fronts holds"
            " for these runs only; run more seeds at every learning rate."
        )
    untuned = [label for label, best in comparison.best.items() if len(best.means) == 1]
    if untuned:
        texts.append(
            f"{join_names(untuned)}: one learning rate was run, so it is not chosen and not tuned,"
            " and differences may come from the learning rate."
        )
    if len(comparison.groups) == 1:
        texts.append("Only one method was given: this is a report of it, not a comparison.")
    return texts


def _diverged_at_chosen_rate(comparison: Comparison) -> list[str]:
    """Return a sentence per method whose means leave diverged runs out."""
    texts = []
    for label, runs in comparison.diverged.items():
        rate = comparison.best[label].learning_rate
        seeds = sorted(run.seed for run in runs if run.learning_rate == rate)
        if seeds:
            num_runs = len(comparison.chosen[label]) + len(seeds)
            texts.append(
                f"{label}: {len(seeds)} of {num_runs} runs at its chosen learning rate diverged"
                f" ({format_seeds(seeds)}). Means leave them out, so everything said about {label}"
                " holds only for the runs that did not diverge."
            )
    return texts


def _findings(comparison: Comparison) -> list[Block]:
    if not comparison.pairs:
        return []
    blocks: list[Block] = [
        Heading("At each method's best learning rate"),
        Paragraph(
            "These findings compare one point per method: the learning rate at which it learns most"
            " is chosen by learning alone, and may be the one that forgets most. The whole fronts"
            " above compare the methods themselves."
        ),
        *dominated_blocks(comparison),
    ]
    for metric in (comparison.learning, comparison.forgetting):
        sentences = [pair.sentence for pair in comparison.pairs_of(metric)]
        blocks += [Subheading(metric.title), Bullets(sentences)]
    blocks.append(
        Figure(
            "differences",
            "Differences between methods at their chosen learning rates, with 95 % intervals"
            f" ({format_seeds_and_items(comparison)}). Filled: distinguishable from 0 at 5 % after"
            " Holm's correction over the pairs; hollow: not. Right of 0, the method named first"
            " learns more (left panel) or forgets more (right panel).",
        )
    )
    return blocks


def _curves(comparison: Comparison) -> list[Block]:
    return [
        Heading("Over training"),
        Figure(
            "curves",
            "Learning (left, higher is better) and forgetting (right, lower is better) against real"
            " tokens at the chosen learning rates. Thick: the mean over seeds; thin: each seed"
            f" ({format_seeds_and_items(comparison)}).",
        ),
    ]


def _learning_rates(comparison: Comparison) -> list[Block]:
    sentences = []
    for label, best in comparison.best.items():
        grid = ", ".join(f"{rate:g}" for rate in best.means)
        seeds = format_seeds(best.seeds)
        diverged = [
            f"{run.learning_rate:g} (seed {run.seed})" for run in comparison.diverged[label]
        ]
        if len(best.means) == 1:
            text = f"{label}: only {grid} was run, so its learning rate is not tuned."
        else:
            text = f"{label}: {best.learning_rate:g} learns most of {grid} ({seeds})."
        if best.edge:
            text += (
                f" It is the {best.edge} of the grid, so a better one may lie beyond: extend the"
                f" grid {'upwards' if best.edge == 'highest' else 'downwards'} before judging"
                f" {label}."
            )
        if diverged:
            text += f" Diverged: {', '.join(diverged)}."
        sentences.append(text)
    blocks: list[Block] = [
        Heading("Learning rates"),
        Figure(
            "learning_rates",
            "Learning (left, higher is better) and forgetting (right, lower is better) at the end,"
            " by learning rate. Lines join means over seeds, small points are runs. Ringed: chosen,"
            " by mean learning.",
        ),
        Bullets(sentences),
    ]
    if any(len(best.means) > 1 for best in comparison.best.values()):
        blocks.append(
            Paragraph(
                "Each method's learning rate was chosen on the same held-out items that are"
                " reported, so its learning is slightly overestimated (winner's curse), and more so"
                " with a larger grid or fewer seeds."
            )
        )
    return blocks


def _statistics() -> list[Block]:
    return [
        Heading("How it was computed"),
        Bullets(
            [
                f"With {MIN_SEEDS} seeds or more, intervals cover both seeds and items: a t"
                " interval of the seeds' means and a bootstrap over items, half-widths added in"
                " quadrature. A bootstrap over so few seeds is far too narrow; its limits"
                " (two_level) are in comparison.json for reference.",
                f"With fewer than {MIN_SEEDS} seeds, intervals are BCa bootstraps over items (4,000"
                " resamples, fixed seed) and hold for these runs only.",
                "Differences are always paired by item, and by seed if both methods ran the same"
                " seeds. A difference is called distinguishable if its 95 % interval excludes 0 and"
                " its p-value, corrected by Holm's method over the pairs of that measure, is below"
                " 5 %.",
                "With one run per method, right and wrong answers are compared by McNemar's exact"
                " test.",
                "Intervals of hypervolumes and of forgetting along fronts resample the items (2,000"
                " bootstrap samples, the same for all methods, fixed seed) and take a t interval"
                " over seeds; variance that both parts hold counts once. The"
                " documentation's page on the report has their coverage in simulations with known"
                " truth.",
                "Not distinguishable does not mean equal: see how many seeds or items it would"
                " take.",
            ]
        ),
    ]
