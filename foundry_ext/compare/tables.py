"""The report's tables: every measure, pairs of methods, cost, runs."""

from collections.abc import Sequence
from statistics import fmean

from foundry_ext.compare.comparison import Comparison
from foundry_ext.compare.document import Block, Bullets, Heading, Paragraph, Subheading, Table
from foundry_ext.compare.findings import Pair
from foundry_ext.compare.measures import Measure
from foundry_ext.compare.wording import (
    NONE,
    limits,
    mean_or_none,
    needed,
    p_value,
    seeds_used,
    with_limits,
)


def measure_blocks(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = [Heading("Every measure")]
    labels = list(comparison.groups)
    rows = []
    for measure in comparison.measures:
        cells = [comparison.summary(label, measure) for label in labels]
        items = next((one.num_items for one in cells if one.num_items), None)
        rows.append(
            [
                f"{measure.title}, {measure.unit}",
                *[with_limits(measure, one.mean, one.interval) for one in cells],
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
    for measure in comparison.measures:
        pairs = comparison.pairs_of(measure)
        if not pairs:
            continue
        blocks.append(Subheading(measure.title))
        if measure not in (comparison.learning, comparison.forgetting):
            blocks.append(Bullets([pair.sentence for pair in pairs]))
        blocks.append(_pair_table(measure, pairs))
    return blocks


def _pair_table(measure: Measure, pairs: Sequence[Pair]) -> Table:
    columns = ["first − second", "difference", "95 % interval", "p (Holm)", "reads", "seeds needed"]
    columns.append("items needed")
    has_test = any(pair.mcnemar for pair in pairs)
    if has_test:
        columns += ["only first right", "only second right", "McNemar p (Holm)"]
    rows = []
    for pair in pairs:
        row = [
            f"{pair.first} − {pair.second}",
            measure.show(pair.difference, signed=True),
            limits(measure, pair.interval, signed=True) if pair.interval else NONE,
            p_value(pair.adjusted_p),
            "distinguishable" if pair.is_distinguishable else "not distinguishable",
            needed(pair.seeds_needed, min(map(len, pair.seeds))),
            needed(pair.items_needed, pair.num_items or 0),
        ]
        if has_test:
            test = pair.mcnemar
            row += (
                [str(test.only_first), str(test.only_second), p_value(pair.adjusted_mcnemar)]
                if test
                else [NONE] * 3
            )
        rows.append(row)
    caption = f"{measure.title}, {measure.unit}; {_basis(pairs)}"
    if has_test:
        tested = sorted({pair.mcnemar_seeds for pair in pairs if pair.mcnemar_seeds})
        seeds = ", ".join(str(a) if a == b else f"{a} with {b}" for a, b in tested)
        caption += f" McNemar's exact test compares one run of each method (seed {seeds})."
    caption += (
        " Needed: for a difference of the observed size to be found with 80 % power in one test at"
        " two-sided 5 %, more of the one while the other stays as it is; –: no number of it would"
        " do."
    )
    return Table(columns, rows, caption)


def _basis(pairs: Sequence[Pair]) -> str:
    texts = []
    for pair in pairs:
        first, second = pair.seeds
        text = f"seeds {', '.join(map(str, first))}"
        text += " paired" if first == second else f" with {', '.join(map(str, second))} unpaired"
        text += f", {pair.num_items:,} paired items" if pair.num_items else ", no items"
        texts.append(text)
    texts = list(dict.fromkeys(texts))
    if len(texts) == 1:
        return f"{texts[0]}."
    names = [
        f"{pair.first} − {pair.second}: {text}" for pair, text in zip(pairs, texts, strict=False)
    ]
    return "; ".join(names if len(texts) == len(pairs) else texts) + "."


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
                f"{fmean(record['time']['train_seconds'] for record in records):,.1f}",
                mean_or_none(rate, "{:,.0f}"),
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
    return [
        Heading("Cost"),
        Table(
            columns,
            rows,
            "Means over the runs at the chosen learning rates. Training seconds are those of"
            " training steps alone, without evaluation. Effective scale is what the adapter's"
            f" product BA is multiplied by: α/r, for rsLoRA α/√r. {where}",
        ),
    ]


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
    if comparison.left_out:
        blocks.append(Paragraph("Left out:"))
        blocks.append(Bullets([f"{name}: {why}" for name, why in comparison.left_out.items()]))
    return blocks
