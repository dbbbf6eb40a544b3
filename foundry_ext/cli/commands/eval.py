"""`foundry-ext eval MODEL --sets FILE`: learning and forgetting of a finished model."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face folder, an adapter folder or a Composer .pt file; with --lm-eval, a"
        " record.json",
    )
    add(
        "--base",
        help="the model it was tuned from: a folder or a hub name (an adapter names its own)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--sets", type=Path, metavar="FILE", help="a YAML with `sets`, or a run's YAML or record"
    )
    what.add_argument(
        "--lm-eval",
        type=Path,
        metavar="RESULTS",
        help="enter these results of lm_eval --output_path into the record instead",
    )
    add("--out", type=Path, metavar="DIR", help="write evaluation.json and items.jsonl here")


def run(arguments: argparse.Namespace) -> int:
    if arguments.lm_eval is not None:
        from foundry_ext.evaluation.lm_eval_results import enter_results

        for name, value in enter_results(arguments.lm_eval, arguments.model).items():
            print(f"{name} {value:.4f}")
        return 0
    from foundry_ext.evaluation.standalone import (
        evaluate_checkpoint,
        format_evaluation,
        write_evaluation,
    )
    from foundry_ext.utils.allocator import keep_freed_memory
    from foundry_ext.utils.environment import has_gpu

    if not has_gpu():
        keep_freed_memory()

    evaluation = evaluate_checkpoint(arguments.model, arguments.sets, base=arguments.base)
    print(format_evaluation(evaluation.report))
    if arguments.out is not None:
        write_evaluation(evaluation, arguments.out)
        print(f"{arguments.out}: evaluation.json, items.jsonl")
    return 0
