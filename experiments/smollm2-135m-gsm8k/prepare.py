"""Writes the experiment's model and rows: `python experiments/smollm2-135m-gsm8k/prepare.py DATA`.

DATA is a folder with GSM8K, ARC-challenge and WinoGrande (data.py), or "hub". The model and the
data folder are written into outputs/smollm2-135m-gsm8k/q4_1, or hub; what is there stays.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import chat
import data
import weights

from foundry_ext.utils.errors import UserError
from foundry_ext.utils.output import redact_output

OUTPUTS = Path("outputs/smollm2-135m-gsm8k")
HUB = "hub"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Digests of the files that were measured in results/, by the folder that they are in.
DIGESTS = Path(__file__).with_name("digests.json")


def prepare(source: str) -> Path:
    """Write model and data, and return their folder.

    Raises:
        UserError: a file is missing, or cannot be fetched.
    """
    is_hub = source == HUB
    folder = OUTPUTS / (HUB if is_hub else "q4_1")
    if is_hub:
        files = data.fetch_files(folder / "fetched")
        _fetch_model(folder / "model")
    else:
        files = data.find_files(Path(source or "data"))
        weights.make_model(folder / "model")
    rows = data.benchmark_rows(files)
    measured, replayed = data.prose()
    rows["prose.jsonl"] = measured
    for name, content in rows.items():
        data.write_rows(folder / "data" / name, content)
    _write_chats(folder, replayed)
    _check_digests(folder)
    return folder


def _fetch_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        from huggingface_hub import snapshot_download

        snapshot_download(HUB_MODEL, local_dir=folder, allow_patterns=["*.json", "*.safetensors"])


def _write_chats(folder: Path, prose: Sequence[data.Row]) -> None:
    """Generate the chat answers once; write those to measure, and the rows for replay."""
    measured, replay = folder / "data" / "chat.jsonl", folder / "data" / "replay.jsonl"
    if measured.is_file() and replay.is_file():
        return
    print("the base model answers 48 prompts, which takes some minutes", flush=True)
    prompts = chat.read_prompts()
    chats = chat.generate(folder / "model", prompts)
    kept = [c for index, c in enumerate(chats) if not chat.is_for_replay(index)]
    replayed = [c for index, c in enumerate(chats) if chat.is_for_replay(index)]
    texts = [f"{question['content']}\n\n{answer['content']}" for question, answer in replayed]
    data.write_rows(replay, [*({"text": text} for text in texts), *prose])
    data.write_rows(measured, [{"messages": messages} for messages in kept])


def _check_digests(folder: Path) -> None:
    """Say which files are not those of the results, with which a run could not be compared."""
    expected = json.loads(DIGESTS.read_text(encoding="utf-8")).get(folder.name, {})
    for path in sorted((folder / "data").glob("*.jsonl")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if expected.get(path.name, digest) != digest:
            print(
                f"warning: {path} ({digest}) is not the file of the results"
                f" ({expected[path.name]}): `foundry-ext compare` will refuse to join runs of both",
                file=sys.stderr,
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prepare.py")
    parser.add_argument("source", metavar="DATA", help="a folder with the benchmarks, or hub")
    try:
        print(f"inputs: {prepare(parser.parse_args(argv).source)}")
    except (UserError, OSError) as error:
        print(f"experiment: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    redact_output()
    sys.exit(main())
