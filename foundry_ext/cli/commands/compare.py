"""`foundry-ext compare RUNS... --out DIR`: a report of learning, forgetting and cost."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="run folders, record.json files, folders of runs, W&B's offline run folders, or"
        " entity/project/run_id of runs on W&B's server",
    )
    add(
        "--matched",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUNS",
        help="runs at one learning rate per method, chosen so that all methods learn the same; the"
        " report compares their forgetting, and takes fronts and best rates from the other runs",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write the report to")
    add(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="a dotted key that may differ, and all keys below it, e.g. optimizer.weight_decay,"
        " data.train, steps; the report lists the differences",
    )
    add(
        "--learning",
        metavar="KEY",
        help="metric to choose learning rates by and to plot, e.g. gsm8k_strict_match (default: the"
        " first held-out loss)",
    )
    add("--forgetting", metavar="KEY", help="metric to plot against it, e.g. mean_accuracy")
    add(
        "--reference",
        type=float,
        metavar="LEVEL",
        help="forgetting, in the record's unit (nats per token, or a share of the items), up to"
        " which the area under a method's front counts (default: 1.1 times the largest forgetting"
        " on any method's front)",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.comparison.comparison import compare_runs
    from foundry_ext.comparison.report.fronts import (
        ONE_RATE,
        area_sentence,
        has_points_only,
        level_sentence,
    )
    from foundry_ext.comparison.report.matched import matched_rate_sentences
    from foundry_ext.comparison.report.report import caveats, write_report
    from foundry_ext.comparison.runs import load_runs

    loaded = load_runs(arguments.runs)
    matched = load_runs(arguments.matched) if arguments.matched else None
    if matched:
        loaded.left_out |= matched.left_out
    comparison = compare_runs(
        loaded,
        matched_runs=matched.runs if matched else (),
        allow=arguments.allow,
        learning=arguments.learning,
        forgetting=arguments.forgetting,
        reference=arguments.reference,
    )
    write_report(comparison, arguments.out)
    for name, reason in comparison.left_out.items():
        print(f"left out: {name}: {reason}")
    for text in caveats(comparison):
        print(text)
    if has_points_only(comparison):
        print(ONE_RATE)
    for pair in [] if has_points_only(comparison) else comparison.fronts.area_pairs:
        print(area_sentence(comparison, pair))
    for pair in comparison.fronts.level_pairs:
        print(level_sentence(comparison, pair))
    for text in matched_rate_sentences(comparison):
        print(text)
    if comparison.pairs:
        print("at each method's best learning rate:")
    for metric in (comparison.learning, comparison.forgetting):
        for pair in comparison.pairs_of(metric):
            print(pair.sentence)
    print(f"\nwritten: {arguments.out / 'index.html'}, comparison.md, comparison.json, plots")
    return 0
