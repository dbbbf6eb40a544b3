"""Tables of the report: every metric, pairs of methods, cost, runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import Metric
from foundry_ext.comparison.pairwise import PairwiseComparison
from foundry_ext.comparison.report.document import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Subheading,
    Table,
)
from foundry_ext.comparison.report.wording import (
    NO_VALUE,
    format_mean_and_interval,
    format_mean_over_seeds,
    format_needed,
    format_p_value,
    format_seeds,
    format_seeds_and_items,
)
from foundry_ext.comparison.statistics import MIN_SEEDS


def measure_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on every metric: all means, then a table of pairs per metric."""
    blocks: list[Block] = [Heading("Every metric")]
    labels = list(comparison.groups)
    rows = []
    for metric in comparison.metrics:
        summaries = [comparison.summary(label, metric) for label in labels]
        items = next((summary.num_items for summary in summaries if summary.num_items), None)
        rows.append(
            [
                f"{metric.title}, {metric.unit}",
                *[format_mean_and_interval(metric, s.mean, s.interval) for s in summaries],
                f"{items:,}" if items else NO_VALUE,
            ]
        )
    blocks.append(
        Table(
            ["change from step 0", *labels, "items"],
            rows,
            "Means at the chosen learning rates with 95 % intervals"
            f" ({format_seeds_and_items(comparison)}). More learning and less forgetting is"
            " better.",
        )
    )
    for metric in comparison.metrics:
        pairs = comparison.pairs_of(metric)
        if not pairs:
            continue
        blocks.append(Subheading(metric.title))
        if metric not in (comparison.learning, comparison.forgetting):
            blocks.append(Bullets([pair.sentence for pair in pairs]))
        blocks.append(_pair_table(metric, pairs))
        if any(pair.mcnemar for pair in pairs):
            blocks.append(_mcnemar_table(metric, pairs))
    return blocks


def _pair_table(metric: Metric, pairs: Sequence[PairwiseComparison]) -> Table:
    columns = ["first − second", "difference", "95 % interval", "p (Holm)", "verdict"]
    in_general = any(pair.in_general for pair in pairs)
    columns += ["seeds needed", "items needed"] if in_general else ["items needed"]
    rows = []
    for pair in pairs:
        cells = [
            f"{pair.first} − {pair.second}",
            metric.show(pair.difference, signed=True),
            metric.show_limits(pair.interval.low, pair.interval.high, signed=True)
            if pair.interval
            else NO_VALUE,
            format_p_value(pair.adjusted_p),
            "distinguishable" if pair.is_distinguishable else "not distinguishable",
        ]
        if in_general:
            cells.append(format_needed(pair.seeds_needed, min(map(len, pair.seeds))))
        cells.append(format_needed(pair.items_needed, pair.num_items or 0))
        rows.append(cells)
    caption = f"{metric.title}, {metric.unit}; {_basis(pairs)} Needed: to find a difference of"
    caption += " the observed size with 80 % power at two-sided 5 %"
    num_tests = pairs[0].num_tests
    caption += f", divided by the {num_tests} pairs (Bonferroni)" if num_tests > 1 else ""
    caption += ", if the other number stays fixed" if in_general else ""
    caption += f"; {NO_VALUE}: no number suffices."
    return Table(columns, rows, caption)


def _mcnemar_table(metric: Metric, pairs: Sequence[PairwiseComparison]) -> Table:
    rows = []
    for pair in pairs:
        test, seeds = pair.mcnemar, pair.mcnemar_seeds
        if test is None or seeds is None:
            continue
        name = f"{pair.first}, {pair.second}"
        counts = [f"{count:,}" for count in (test.only_first, test.only_second, test.num_items)]
        used = str(seeds[0]) if seeds[0] == seeds[1] else f"{seeds[0]}, {seeds[1]}"
        p_values = [format_p_value(p) for p in (test.p, pair.adjusted_mcnemar)]
        rows.append([name, used, *counts, *p_values])
    columns = ["first, second", "seed", "only first right", "only second right", "items"]
    return Table(
        [*columns, "p", "p (Holm)"],
        rows,
        f"McNemar's exact test on {metric.subject}: answers right at the end of one run per"
        " method. It holds for these two runs only; the table above covers more where it uses"
        " several seeds.",
    )


def _basis(pairs: Sequence[PairwiseComparison]) -> str:
    """Return the seeds and items used, naming the pairs if these differ between pairs."""
    pairs_by_text: dict[str, list[str]] = {}
    for pair in pairs:
        first, second = pair.seeds
        text = format_seeds(first)
        text += " paired" if first == second else f" with {format_seeds(second)} unpaired"
        text += f", {pair.num_items:,} paired items" if pair.num_items else ", no items"
        pairs_by_text.setdefault(text, []).append(f"{pair.first} − {pair.second}")
    if len(pairs_by_text) == 1:
        return f"{next(iter(pairs_by_text))}."
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in pairs_by_text.items()) + "."


def cost_blocks(comparison: Comparison) -> list[Block]:
    """Return the section on time, memory and size, over the runs at the chosen learning rates."""
    rows = [
        _cost_row(label, [run.record for run in runs]) for label, runs in comparison.chosen.items()
    ]
    columns = ["method", "training, s", "real tokens/s", "MFU", "peak memory, GiB"]
    columns += ["trainable parameters", "rank / α", "effective scale"]
    environments = [run.record["environment"] for run in comparison.chosen_runs]
    devices = {f"{env['world_size']} × {env['device']}" for env in environments}
    where = f"On {'; '.join(sorted(devices))}."
    if len(devices) > 1:
        where += " These differ, so times and speeds say nothing about the methods."
    return [
        Heading("Cost"),
        Table(
            columns,
            rows,
            f"Means over the runs at the chosen learning rates. With {MIN_SEEDS} runs or more, with"
            " 95 % t intervals; with fewer, with the range if it exceeds 10 %."
            " Training seconds count training steps only, without evaluation. Peak memory covers"
            " the whole run: for KL, full fine-tuning keeps a copy of its base model, while an"
            " adapter only has to be switched off. Effective scale is the factor on the adapter's"
            f" product BA: α/r, or α/√r for rsLoRA. {where}{_overlap(comparison)}",
        ),
    ]


def _cost_row(label: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    model = records[0]["model"]
    share = model["trainable_parameters"] / model["parameters"]
    scale = model["effective_scale"]
    throughputs = [record["throughput"] for record in records]
    memory = [record["peak_memory_bytes"] for record in records]
    gibibytes = [size / 2**30 for size in memory if size is not None]
    return [
        label,
        format_mean_over_seeds([record["time"]["train_seconds"] for record in records], "{:,.1f}"),
        format_mean_over_seeds([rate["real_tokens_per_second"] for rate in throughputs], "{:,.0f}"),
        format_mean_over_seeds([rate["mfu"] for rate in throughputs], "{:.1%}"),
        format_mean_over_seeds(gibibytes, "{:.2f}"),
        f"{model['trainable_parameters']:,} ({share:.1%})",
        f"{model['rank']} / {model['alpha']:g}" if model["rank"] is not None else NO_VALUE,
        f"{scale:.3g}" if scale is not None else NO_VALUE,
    ]


def _overlap(comparison: Comparison) -> str:
    """Return a warning if runs overlapped in time, because they may have shared a device."""
    spans = {
        id(run.record): (run.record["started"], run.record["ended"] or run.record["updated"])
        for run in comparison.runs
    }
    times = {key: tuple(map(datetime.fromisoformat, span)) for key, span in spans.items()}
    chosen = [id(run.record) for run in comparison.chosen_runs]
    num_overlapping = sum(
        any(
            other != run and times[run][0] < end and start < times[run][1]
            for other, (start, end) in times.items()
        )
        for run in chosen
    )
    if not num_overlapping:
        return ""
    return (
        f" {num_overlapping} of these {len(chosen)} runs were under way while another run compared"
        " here was. If they shared a device, they slowed each other down, and their times and"
        " speeds say nothing about the methods."
    )


def run_blocks(comparison: Comparison) -> list[Block]:
    """Return the section that lists every run, its code, and the runs left out."""
    rows = []
    for label, runs in comparison.groups.items():
        for run in runs:
            chosen = run.learning_rate == comparison.best[label].learning_rate
            rows.append(
                [run.name, label, f"{run.learning_rate:g}", str(run.seed), "yes" if chosen else ""]
            )
    if comparison.at_matched_rates is not None:
        for label, runs in comparison.at_matched_rates.runs.items():
            rows += [
                [run.name, label, f"{run.learning_rate:.3g}", str(run.seed), "matched"]
                for run in runs
            ]
    blocks: list[Block] = [
        Heading("Runs"),
        Table(
            ["run", "method", "learning rate", "seed", "chosen"],
            rows,
            "Every run compared. The findings at best learning rates use the chosen ones.",
        ),
        Paragraph(_code_versions(comparison)),
    ]
    if comparison.left_out:
        reasons = [f"{name}: {reason}" for name, reason in comparison.left_out.items()]
        blocks += [Paragraph("Left out:"), Bullets(reasons)]
    return blocks


def _code_versions(comparison: Comparison) -> str:
    """Return the commits of the runs' code, and packages whose versions differ between runs."""
    environments = [run.record["environment"] for run in comparison.runs]
    commits: Counter[str] = Counter()
    for environment in environments:
        name = f"commit {environment['commit'][:7]}" if environment["commit"] else "no commit"
        name += " with uncommitted changes" if environment["dirty"] else ""
        commits[name] += 1
    text = f"Runs by code: {'; '.join(f'{name} ({count})' for name, count in commits.items())}."
    packages = [environment["packages"] for environment in environments]
    differing = []
    for name in sorted(set().union(*packages)):
        versions = sorted({installed.get(name, "none") for installed in packages})
        if len(versions) > 1:
            differing.append(f"{name} {', '.join(versions)}")
    if differing:
        text += f" Packages that differ: {'; '.join(differing)}."
    if len(commits) > 1 or differing:
        text += " What changed between these is a possible cause of any difference."
    return text
