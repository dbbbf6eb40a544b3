"""The quickstart's two ends: data and tokenizer before training, and a look at the result after it.

`python -m foundry_ext.quickstart prepare` writes the Python standard library's source, which every
machine has, as training and held-out documents, and trains a byte-level BPE tokenizer on the
former.
`python -m foundry_ext.quickstart show` prints what the run did and lets its export write some code.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("outputs/quickstart")
RUN = FOLDER / "base"
VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.04
# Not what a library's user reads or calls: tests, character tables, bundled programs.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data"}
PROMPT = "def read(self, size=-1):\n"


def prepare(folder: Path = FOLDER) -> None:
    """Writes data/{train,eval}.jsonl and tokenizer/; a path's hash decides what is held out."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for name, text in standard_library():
        texts["eval" if _is_held_out(name) else "train"].append({"path": name, "text": text})
    for part, rows in texts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{part}.jsonl").write_text(lines)
        size = sum(len(row["text"]) for row in rows) / 1e6
        print(f"{part}: {len(rows)} files of the standard library, {size:.1f} M characters")
    train_tokenizer([row["text"] for row in texts["train"]], folder / "tokenizer")


def standard_library() -> Iterator[tuple[str, str]]:
    """(path, source) of this Python's own modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT.intersection(relative.parts):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE tokenizer like SmolLM2's, small: every text is representable."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        iter(texts), vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    print(f"tokenizer: {VOCABULARY} byte-level BPE tokens in {folder}")


def show(run: Path = RUN) -> None:
    """Loss, throughput and fill of the run, then a continuation by stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foundry_ext.callbacks.metrics_file import read_metrics

    metrics = read_metrics(run / "metrics.jsonl")
    train, held_out = metrics["loss/train/total"], metrics["metrics/eval/LanguageCrossEntropy"]
    rate = metrics["throughput/real_tokens_per_sec"]
    last = max(train)
    print(f"\n{'batch':>6} {'training loss':>14}")
    for batch in sorted({*range(0, last, max(last // 8, 1)), last}):
        print(f"{batch:>6} {train[batch]:>14.3f}")
    print("\nheld-out loss (nats a token):", end=" ")
    print(" -> ".join(f"{loss:.3f}" for _, loss in sorted(held_out.items())))
    print(f"tokens trained on: {metrics['time/token'][max(metrics['time/token'])]:,.0f}, all real")
    fill = metrics["packing/fill"]
    print(f"throughput: {sum(rate.values()) / len(rate):,.0f} real tokens/s on this machine's CPU")
    print(f"packing fill: {100 * sum(fill.values()) / len(fill):.2f} %")

    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7)
    print(
        f"\n{run / 'hf'}: {type(model).__name__}, {num_parameters / 1e6:.2f} M parameters, loaded"
        f" by stock transformers, continues {PROMPT!r}:\n"
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foundry_ext.quickstart", description=__doc__)
    parser.add_argument("step", choices=("prepare", "show"))
    step = parser.parse_args(arguments).step
    if step == "show" and not (RUN / "hf").is_dir():
        sys.exit(f"{RUN}/hf is not there: run composer train.py yamls/quickstart/base.yaml first")
    {"prepare": prepare, "show": show}[step]()


if __name__ == "__main__":
    main()
