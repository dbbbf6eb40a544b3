"""The report's tables: every measure, pairs of methods, cost, runs."""

from collections.abc import Sequence
from datetime import datetime

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
    NONE,
    limits,
    mean_and_range,
    mean_or_none,
    needed,
    p_value,
    seed_list,
    seeds_used,
    with_limits,
)


def measure_blocks(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = [Heading("Every measure")]
    labels = list(comparison.groups)
    rows = []
    for metric in comparison.metrics:
        cells = [comparison.summary(label, metric) for label in labels]
        items = next((one.num_items for one in cells if one.num_items), None)
        rows.append(
            [
                f"{metric.title}, {metric.unit}",
                *[with_limits(metric, one.mean, one.interval) for one in cells],
                f"{items:,}" if items else NONE,
            ]
        )
    blocks.append(
        Table(
            ["change against step 0", *labels, "items"],
            rows,
            f"Means at the chosen learning rates with 95 % intervals ({seeds_used(comparison)})."
            " More learning and less forgetting is better.",
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
    columns = ["first − second", "difference", "95 % interval", "p (Holm)", "reads"]
    in_general = any(pair.in_general for pair in pairs)
    columns += ["seeds needed", "items needed"] if in_general else ["items needed"]
    rows = []
    for pair in pairs:
        cells = [
            f"{pair.first} − {pair.second}",
            metric.show(pair.difference, signed=True),
            limits(metric, pair.interval, signed=True) if pair.interval else NONE,
            p_value(pair.adjusted_p),
            "distinguishable" if pair.is_distinguishable else "not distinguishable",
        ]
        if in_general:
            cells.append(needed(pair.seeds_needed, min(map(len, pair.seeds))))
        cells.append(needed(pair.items_needed, pair.num_items or 0))
        rows.append(cells)
    caption = f"{metric.title}, {metric.unit}; {_basis(pairs)}"
    caption += (
        " Needed: for a difference of the observed size to be found with 80 % power at two-sided"
    )
    caption += " 5 %"
    num_tests = pairs[0].num_tests
    caption += f", divided by the {num_tests} pairs (Bonferroni)" if num_tests > 1 else ""
    caption += ", more of the one while the other stays as it is" if in_general else ""
    caption += "; –: no number of it would do."
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
        rows.append([name, used, *counts, p_value(test.p), p_value(pair.adjusted_mcnemar)])
    return Table(
        [
            "first, second",
            "seed",
            "only first right",
            "only second right",
            "items",
            "p",
            "p (Holm)",
        ],
        rows,
        f"McNemar's exact test on {metric.subject}: answers right at the end of one run of each"
        " method. It speaks of these two runs; the table above, where it lets seeds vary, of more.",
    )


def _basis(pairs: Sequence[PairwiseComparison]) -> str:
    """Seeds and items used, and of which pairs where that differs."""
    named: dict[str, list[str]] = {}
    for pair in pairs:
        first, second = pair.seeds
        text = seed_list(first)
        text += " paired" if first == second else f" with {seed_list(second)} unpaired"
        text += f", {pair.num_items:,} paired items" if pair.num_items else ", no items"
        named.setdefault(text, []).append(f"{pair.first} − {pair.second}")
    if len(named) == 1:
        return f"{next(iter(named))}."
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in named.items()) + "."


def cost_blocks(comparison: Comparison) -> list[Block]:
    rows = []
    devices = set()
    for label, runs in comparison.chosen.items():
        records = [run.record for run in runs]
        devices |= {
            f"{r['environment']['world_size']} × {r['environment']['device']}" for r in records
        }
        model = records[0]["model"]
        memory = [record["peak_memory_bytes"] for record in records]
        mfu = [record["throughput"]["mfu"] for record in records]
        rate = [record["throughput"]["real_tokens_per_second"] for record in records]
        share = model["trainable_parameters"] / model["parameters"]
        scale = model["effective_scale"]
        adapter = model["rank"] is not None
        rows.append(
            [
                label,
                mean_and_range([r["time"]["train_seconds"] for r in records], "{:,.1f}"),
                mean_and_range(rate, "{:,.0f}"),
                mean_or_none(mfu, "{:.1%}"),
                mean_or_none([None if one is None else one / 2**30 for one in memory], "{:.2f}"),
                f"{model['trainable_parameters']:,} ({share:.1%})",
                f"{model['rank']} / {model['alpha']:g}" if adapter else NONE,
                f"{scale:.3g}" if scale is not None else NONE,
            ]
        )
    columns = ["method", "training, s", "real tokens/s", "MFU", "peak memory, GiB"]
    columns += ["trainable parameters", "rank / α", "effective scale"]
    where = f"On {'; '.join(sorted(devices))}."
    if len(devices) > 1:
        where += " These differ, so times and speeds do not compare the methods."
    where += _overlap(comparison)
    return [
        Heading("Cost"),
        Table(
            columns,
            rows,
            "Means over the runs at the chosen learning rates, with the range where that is over"
            " 10 %. Training seconds are those of training steps alone, without evaluation. Peak"
            " memory is of the whole run: for KL, full fine-tuning holds a copy of its base model"
            " beside it, an adapter only has to be switched off."
            " Effective scale is what the adapter's"
            f" product BA is multiplied by: α/r, for rsLoRA α/√r. {where}",
        ),
    ]


def _overlap(comparison: Comparison) -> str:
    """A sentence where runs were under way at the same time, for then they may share a device."""
    spans = {
        id(run.record): (run.record["started"], run.record["ended"] or run.record["updated"])
        for runs in comparison.groups.values()
        for run in runs
    }
    chosen = [id(run.record) for runs in comparison.chosen.values() for run in runs]
    times = {key: tuple(map(datetime.fromisoformat, span)) for key, span in spans.items()}
    shared = sum(
        any(
            other != one and times[one][0] < end and start < times[one][1]
            for other, (start, end) in times.items()
        )
        for one in chosen
    )
    if not shared:
        return ""
    return (
        f" {shared} of these {len(chosen)} runs were under way while another one compared here was;"
        " if on one device, they slowed each other, and their times and speeds do not compare the"
        " methods."
    )


def run_blocks(comparison: Comparison) -> list[Block]:
    rows = []
    for label, runs in comparison.groups.items():
        for run in runs:
            chosen = run.learning_rate == comparison.best[label].learning_rate
            rows.append(
                [run.name, label, f"{run.learning_rate:g}", str(run.seed), "yes" if chosen else ""]
            )
    blocks: list[Block] = [
        Heading("Runs"),
        Table(
            ["run", "method", "learning rate", "seed", "chosen"],
            rows,
            "Every run compared; findings are of the chosen ones.",
        ),
    ]
    blocks.append(Paragraph(_made_with(comparison)))
    if comparison.left_out:
        blocks.append(Paragraph("Left out:"))
        blocks.append(Bullets([f"{name}: {why}" for name, why in comparison.left_out.items()]))
    return blocks


def _made_with(comparison: Comparison) -> str:
    """The code's commits, and packages of which runs had different versions."""
    made = [run.record["environment"] for runs in comparison.groups.values() for run in runs]
    commits: dict[str, int] = {}
    for one in made:
        name = f"commit {one['commit'][:7]}" if one["commit"] else "no commit"
        name += " with uncommitted changes" if one["dirty"] else ""
        commits[name] = commits.get(name, 0) + 1
    text = f"Runs by code: {'; '.join(f'{name} ({count})' for name, count in commits.items())}."
    names = sorted({name for one in made for name in one["packages"]})
    versions = {name: sorted({one["packages"].get(name, "none") for one in made}) for name in names}
    differing = [f"{name} {', '.join(found)}" for name, found in versions.items() if len(found) > 1]
    if differing:
        text += f" Packages that differ: {'; '.join(differing)}."
    if len(commits) > 1 or differing:
        text += " What changed between these is a possible cause of any difference."
    return text
