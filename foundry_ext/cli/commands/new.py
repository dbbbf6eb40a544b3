"""`foundry-ext new FOLDER`: the files of an experiment on one's own data."""

import argparse
import json
import random
import re
from pathlib import Path

from foundry_ext.utils.errors import UserError, naming

TEMPLATES = Path(__file__).parents[1] / "templates"
FILES = ("train.py", "sweep.yaml", "README.md")
METHODS = ("full", "lora", "dora", "rslora")
NUM_ROWS = {"data/train.jsonl": 400, "data/eval.jsonl": 50}  # of the example
# Variables of the shipped YAMLs that have other values in the new folder.
OWN_DATA = {"data": "own", "train_path": "data/train.jsonl", "eval_path": "data/eval.jsonl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty folder")


def run(arguments: argparse.Namespace) -> int:
    from foundry_ext.utils.atomic import write_text

    folder: Path = arguments.folder
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{folder}: a file or a link; give the name of a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; give the name of a new folder, or empty this one")
    with naming(
        f"{folder}: give the name of a new folder in one that you may write to", (OSError,)
    ):
        for name, text in new_files().items():
            write_text(folder / name, text)
    print(f"{folder}: {', '.join(new_files())}")
    print("The rows in data/ are an example; README.md says how to use yours, and what to run.")
    return 0


def new_files() -> dict[str, str]:
    """Return the texts of the files by their path in the folder."""
    from foundry_ext.config.shipped import shipped_yamls

    files = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in FILES}
    for method in METHODS:
        name = f"smollm2_{method}.yaml"
        text = (shipped_yamls() / name).read_text(encoding="utf-8")
        files[f"yamls/{name}"] = with_own_data(text)
    return files | example_rows()


def with_own_data(text: str) -> str:
    """Return a shipped YAML whose variables choose rows in data/; comments stay."""
    for variable, value in OWN_DATA.items():
        text, count = re.subn(rf"(?m)^(  {variable}: )\S+", rf"\g<1>{value}", text)
        assert count == 1, variable
    return text


def example_rows() -> dict[str, str]:
    """Return files of sums, as JSON lines; no sum is in both."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    drawn = iter(random.Random(17).sample(pairs, sum(NUM_ROWS.values())))
    files = {}
    for name, count in NUM_ROWS.items():
        lines = []
        for _, (a, b) in zip(range(count), drawn, strict=False):
            row = {"prompt": f"Question: What is {a} + {b}?\nAnswer:", "response": f" {a + b}"}
            lines.append(json.dumps(row) + "\n")
        files[name] = "".join(lines)
    return files
