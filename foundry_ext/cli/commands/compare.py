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


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.comparison.comparison import compare_runs
    from foundry_ext.comparison.report.report import caveats, write_report
    from foundry_ext.comparison.runs import load_runs

    loaded = load_runs(arguments.runs)
    comparison = compare_runs(
        loaded, allow=arguments.allow, learning=arguments.learning, forgetting=arguments.forgetting
    )
    write_report(comparison, arguments.out)
    for name, reason in comparison.left_out.items():
        print(f"left out: {name}: {reason}")
    for text in caveats(comparison):
        print(text)
    for metric in (comparison.learning, comparison.forgetting):
        for pair in comparison.pairs_of(metric):
            print(pair.sentence)
    print(f"\nwritten: {arguments.out / 'index.html'}, comparison.md, comparison.json, plots")
    return 0
