"""The comparison in words and tables; folder with comparison.md, index.html, .json and plots."""

from pathlib import Path

from foundry_ext.comparison.comparison import Comparison, write_json
from foundry_ext.comparison.report import plots
from foundry_ext.comparison.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Heading,
    Paragraph,
    Subheading,
    markdown,
    page,
)
from foundry_ext.comparison.report.tables import cost_blocks, measure_blocks, run_blocks
from foundry_ext.comparison.report.tradeoff import matched_blocks, tradeoff_blocks
from foundry_ext.comparison.report.weights import analysis_blocks
from foundry_ext.comparison.report.wording import listed, seed_list, seeds_used, spread
from foundry_ext.comparison.statistics import MIN_SEEDS


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.md, index.html, comparison.json and each plot as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    plots.plot_tradeoff(comparison, folder)
    plots.plot_curves(comparison, folder)
    plots.plot_learning_rates(comparison, folder)
    if comparison.pairs:
        plots.plot_differences(comparison, folder)
    blocks = [
        *_opening(comparison),
        *tradeoff_blocks(comparison),
        *_findings(comparison),
        *matched_blocks(comparison),
        *_curves(comparison),
        *_learning_rates(comparison),
        *measure_blocks(comparison),
        *cost_blocks(comparison),
        *analysis_blocks(comparison, folder),
        *_methods(comparison),
        *run_blocks(comparison),
    ]
    title = listed(list(comparison.groups))
    document = Document(f"{title}: learning and forgetting", blocks)
    write_json(folder / "comparison.json", comparison)
    (folder / "comparison.md").write_text(markdown(document))
    (folder / "index.html").write_text(page(document, folder))


def _opening(comparison: Comparison) -> list[Block]:
    runs = [run for group in comparison.groups.values() for run in group]
    records = [run.record for run in runs]
    experiments = sorted({record["experiment"] for record in records})
    data = sorted({str(record["data"]["train"]["name"] or "one data set") for record in records})
    steps = [record["steps"] for record in records]
    tokens = [record["tokens"]["real"] for record in records]
    bases = {record["model"]["name"] for record in records}
    methods = f"{len(comparison.groups)} methods" if len(comparison.groups) > 1 else "one method"
    text = (
        f"{len(runs)} runs of {methods} on"
        f" {listed(data)} ({', '.join(experiments)}), {spread(steps)} steps, {spread(tokens)} real"
        f" tokens each, from {'one base model' if len(bases) == 1 else listed(sorted(bases))}. All"
        " values are changes against a run's own step 0, the base model: positive learning is more"
        " learned, positive forgetting more forgotten."
    )
    blocks: list[Block] = [Paragraph(text), *map(Paragraph, caveats(comparison))]
    blocks += [Paragraph(text) for text in _diverged_where_compared(comparison)]
    if comparison.accepted:
        blocks.append(Paragraph("Accepted by --allow, and so possible causes of any difference:"))
        blocks.append(Bullets(comparison.accepted))
    return blocks


def caveats(comparison: Comparison) -> list[str]:
    """What the runs at hand do not allow to be said, a sentence each."""
    texts = []
    if not comparison.is_in_general:
        few = [label for label, group in comparison.chosen.items() if len(group) < MIN_SEEDS]
        texts.append(
            f"{listed(few)}: fewer than {MIN_SEEDS} seeds. No claim about these methods in"
            " general is made; intervals that involve them are over items and speak of these"
            " runs alone."
        )
    untuned = [label for label, best in comparison.best.items() if len(best.means) == 1]
    if untuned:
        texts.append(
            f"{listed(untuned)}: one learning rate was run, so it is not chosen and not tuned, and"
            " differences may be the learning rate's."
        )
    if len(comparison.groups) == 1:
        texts.append("Only one method is here: a report of it, not a comparison.")
    return texts


def _diverged_where_compared(comparison: Comparison) -> list[str]:
    texts = []
    for label, runs in comparison.diverged.items():
        rate = comparison.best[label].learning_rate
        seeds = sorted(run.seed for run in runs if run.learning_rate == rate)
        if seeds:
            whole = len(comparison.chosen[label])
            texts.append(
                f"{label}: {len(seeds)} of {whole + len(seeds)} runs at its chosen learning rate"
                f" diverged ({seed_list(seeds)}) and are in no mean, so all that is said of"
                f" {label} is of the runs that did not."
            )
    return texts


def _findings(comparison: Comparison) -> list[Block]:
    if not comparison.pairs:
        return []
    blocks: list[Block] = [Heading("Findings")]
    for metric in (comparison.learning, comparison.forgetting):
        sentences = [pair.sentence for pair in comparison.pairs_of(metric)]
        blocks += [Subheading(metric.title), Bullets(sentences)]
    blocks.append(
        Figure(
            "differences",
            "Differences between methods at their chosen learning rates, with 95 % intervals"
            f" ({seeds_used(comparison)}). Filled: distinguishable from 0 at 5 % after Holm's"
            " correction over the pairs; hollow: not. Right of 0, the method named first learns"
            " more (left panel) or forgets more (right panel).",
        )
    )
    return blocks


def _curves(comparison: Comparison) -> list[Block]:
    return [
        Heading("Over training"),
        Figure(
            "curves",
            "Learning (left, higher is better) and forgetting (right, lower is better) against real"
            " tokens at the chosen learning rates: thick, the mean over seeds; thin, each seed"
            f" ({seeds_used(comparison)}).",
        ),
    ]


def _learning_rates(comparison: Comparison) -> list[Block]:
    sentences = []
    for label, best in comparison.best.items():
        grid = ", ".join(f"{rate:g}" for rate in best.means)
        seeds = seed_list(best.seeds)
        lost = [f"{run.learning_rate:g} (seed {run.seed})" for run in comparison.diverged[label]]
        end = f" Diverged: {', '.join(lost)}." if lost else ""
        if len(best.means) == 1:
            text = f"{label}: only {grid} was run, so its learning rate is not tuned."
            sentences.append(text + end)
            continue
        text = f"{label}: {best.learning_rate:g} learns most of {grid} ({seeds})."
        if best.edge:
            text += (
                f" It is the {best.edge} of the grid, so a better one may lie beyond: extend the"
                f" grid {'upwards' if best.edge == 'highest' else 'downwards'} before judging"
                f" {label}."
            )
        sentences.append(text + end)
    chosen = [best for best in comparison.best.values() if len(best.means) > 1]
    blocks: list[Block] = [
        Heading("Learning rates"),
        Figure(
            "learning_rates",
            "Learning (left, higher is better) and forgetting (right, lower is better) at the end,"
            " by learning rate: lines join means over seeds, small points are runs. Ringed: chosen,"
            " by mean learning.",
        ),
        Bullets(sentences),
    ]
    if chosen:
        blocks.append(
            Paragraph(
                "Each method's learning rate was chosen on the same held-out items that are"
                " reported, so its learning is a little flattered (winner's curse), the more so the"
                " larger its grid and the fewer its seeds."
            )
        )
    return blocks


def _methods(comparison: Comparison) -> list[Block]:
    return [
        Heading("How it was computed"),
        Bullets(
            [
                f"With {MIN_SEEDS} seeds or more, intervals let seeds and items vary: a t interval"
                " of the seeds' means and a bootstrap over items, half-widths added in quadrature."
                " A bootstrap over so few seeds is far too narrow; its limits (two_level) are in"
                " comparison.json for reference.",
                f"With fewer than {MIN_SEEDS} seeds, intervals are BCa bootstraps over items (4,000"
                " resamples, fixed seed) and speak of these runs alone.",
                "Differences are paired by item always and by seed where both methods ran the same"
                " seeds. A difference reads distinguishable where its 95 % interval leaves out 0"
                " and its p-value, corrected over the pairs of that measure by Holm's method, is"
                " under 5 %.",
                "Of one run each, right and wrong answers are compared by McNemar's exact test.",
                "Not distinguishable does not mean equal: see how many seeds or items it would"
                " take.",
            ]
        ),
    ]
