"""Measures finished runs further, while their weights are here: analysis, line, exact match.

    python experiments/smollm2-135m-gsm8k/after.py RUN... [--line] [--exact-match]

RUN is a folder in outputs/smollm2-135m-gsm8k/runs. The change of the weights is always analysed.
--line measures along the line from base to tuned weights (sets/line.yaml), --exact-match generates
answers to GSM8K (sets/exact-match.yaml); either takes longer than a run. Numbers are kept in
results/runs/RUN, without singular values or answers.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from foundry_ext.cli.main import main as foundry_ext
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.output import redact_output

HERE = Path("experiments/smollm2-135m-gsm8k")
RESULTS = HERE / "results" / "runs"
MODEL = "outputs/smollm2-135m-gsm8k/q4_1/model"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="after.py")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--line", action="store_true", help="measure along the line, too")
    parser.add_argument("--exact-match", action="store_true", help="generate answers, too")
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        sets = ["--sets", str(HERE / "sets" / "line.yaml")] if arguments.line else []
        if code := foundry_ext(["analyse", str(run / "hf"), "--base", MODEL, *sets]):
            return code
        keep_analysis(run / "analysis.json", RESULTS / run.name)
        if arguments.exact_match:
            out = run / "exact-match"
            sets = ["--sets", str(HERE / "sets" / "exact-match.yaml"), "--out", str(out)]
            if code := foundry_ext(["eval", str(run / "hf"), "--base", MODEL, *sets]):
                return code
            keep_exact_match(out, RESULTS / run.name)
    return 0


def keep_analysis(source: Path, folder: Path) -> None:
    """Keep what `foundry-ext compare` reads: the summary and the line, without all matrices."""
    analysis = json.loads(source.read_text(encoding="utf-8"))
    del analysis["matrices"]
    write_text(folder / "analysis.json", json.dumps(analysis, indent=1) + "\n")


def keep_exact_match(source: Path, folder: Path) -> None:
    """Keep the evaluation and, per problem, whether the answer was right."""
    report = (source / "evaluation.json").read_text(encoding="utf-8")
    write_text(folder / "exact-match.json", report)
    lines = (source / "items.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("set", "item", "strict_match", "flexible_extract")
    rows = [{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)]
    write_text(folder / "exact-match.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
