"""Benchmark of the data path: tokenising, the store, collation, planning, waiting for the loader.

    python benchmarks/data.py                       # all, some minutes
    python benchmarks/data.py collation loader      # some parts
    python benchmarks/data.py tokenizing --tokenizer HuggingFaceTB/SmolLM2-135M --rows rows.jsonl

Seconds are CPU time of all processes, unless they are said to be wall time. They are the least of
several repeats, in which the baselines and ours take turns. Texts are pieces of Python's own
library, cut to the length distributions of benchmarks/packing.py. Unless a tokenizer is named, a
byte-level one with 49,152 ids is trained on these texts.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are the parallelism
sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

import datasets

from benchmarks.data_figures import Table, print_table
from benchmarks.data_packs import collation, loader, planning, store
from benchmarks.data_text import tokenizing
from benchmarks.machine import as_line, describe_machine

PACKAGES = ("datasets", "tokenizers", "pyarrow", "numpy", "llm-foundry")
PARTS: dict[str, Callable[[Path, argparse.Namespace], Table]] = {
    "tokenizing": tokenizing,
    "store": store,
    "collation": collation,
    "planning": planning,
    "loader": loader,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the data path.")
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS) + "; default all")
    parser.add_argument("--tokenizer", help="name or folder (default: train one)")
    parser.add_argument("--rows", type=Path, help="JSONL rows of prompt and response to tokenise")
    parser.add_argument("--num-rows", type=int, default=4000, help="generated rows to tokenise")
    parser.add_argument("--store-documents", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=150, help="steps per loader")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - PARTS.keys())
    if unknown:
        parser.error(f"unknown part {unknown[0]}; choose from {', '.join(PARTS)}")
    datasets.disable_progress_bars()
    print(as_line(describe_machine("cpu")))
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts or PARTS:
            print_table(PARTS[name](Path(folder), arguments))


if __name__ == "__main__":
    main()
