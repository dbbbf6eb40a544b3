"""`foundry-ext analyse MODEL`: measures what training did to the weights."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="MODEL",
        help="a model or adapter folder, or a Composer .pt file",
    )
    add("--base", help="the base model, if neither the adapter nor the run's record names it")
    add(
        "--sets",
        type=Path,
        metavar="FILE",
        help="measure along the line from base to tuned weights: a YAML with `sets`, or a run's"
        " own YAML",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write (default: analysis.json beside the run's record)",
    )


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.analysis.weights import analyse_weights, default_output, write_analysis
    from foundry_ext.evaluation.standalone import read_sets

    sets = read_sets(arguments.sets) if arguments.sets else None
    analysis = analyse_weights(arguments.model, base=arguments.base, sets=sets)
    out = arguments.out or default_output(arguments.model)
    write_analysis(out, analysis)
    summary = analysis["summary"]
    print(
        f"{out}: {summary['matrices']} matrices; {summary['energy']:.0%} of a change's energy in"
        f" {summary['median_rank_90']:g} singular values (median); {summary['total_intruders']}"
        f" intruder dimensions among the leading {summary['k']} of each (cosine below"
        f" {summary['epsilon']:g}); the change's norm is {summary['relative_change']:.1%} of the"
        " weights'"
    )
    for point in analysis["line"]:
        learning, forgetting = (
            ", ".join(f"{name} {value:+.4g}" for name, value in point[kind].items()) or "-"
            for kind in ("learning", "forgetting")
        )
        print(f"  alpha {point['alpha']:g}: learning {learning}; forgetting {forgetting}")
    return 0
