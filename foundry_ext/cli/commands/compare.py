"""`foundry-ext compare RUNS... --out DIR`: learning, forgetting and cost of runs, as a report."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="run folders, record.json files, folders of runs, W&B's offline run folders, or"
        " entity/project/run_id of runs on W&B's server",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write the report to"
    )
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="a dotted key that may differ, with all below it, e.g. optimizer.weight_decay,"
        " data.train, steps; the report lists what it let pass",
    )
    parser.add_argument(
        "--learning",
        metavar="KEY",
        help="what to choose learning rates by and draw, e.g. gsm8k_strict_match (default: the"
        " first held-out loss)",
    )
    parser.add_argument(
        "--forgetting", metavar="KEY", help="what to draw against it, e.g. mean_accuracy"
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.comparison.comparison import compare_runs
    from foundry_ext.comparison.report.report import caveats, write_report
    from foundry_ext.comparison.runs import load_runs

    loaded = load_runs(arguments.runs)
    comparison = compare_runs(
        loaded,
        allow=arguments.allow,
        learning=arguments.learning,
        forgetting=arguments.forgetting,
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
