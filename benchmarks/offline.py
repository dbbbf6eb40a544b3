"""Configuration of a shipped YAML that runs without a network.

What the hub would supply is replaced: weights by random ones of a shipped shape, the tokenizer by
one in which a word is a token, rows by generated ones with the columns that the shipped YAMLs read.
What needs the hub or a server is removed: evaluation, samples, W&B, checkpoints.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.workloads import LENGTHS, LONGEST
from foundry_ext.config.automatic import settle
from foundry_ext.config.loading import load_config

LABELLED = 0.5  # share of a row's tokens that are in its response
VOCABULARY = 49152
END = "<|endoftext|>"
_PROMPTS = ("query", "instruction", "question", "original_question", "url")
_RESPONSES = ("response", "answer")
_DROPPED = ("eval_loader", "eval_loaders", "save_folder", "save_interval", "autoresume")
_DROPPED_CALLBACKS = ("forgetting", "text_samples", "hf_export", "exact_resume")


def make_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Save a tokenizer with ids 3, 4, ... for words w3, w4, ... and 0 (end of text) for others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (END, "<|im_start|>", "<|im_end|>")
    words = {**{word: id for id, word in enumerate(special)}}
    words |= {f"w{id}": id for id in range(len(special), vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(folder)
    return folder


def draw_lengths(name: str, tokens: int, longest: int) -> list[int]:
    """Draw lengths from the named distribution until they sum to at least `tokens`."""
    median, sigma = LENGTHS[name]
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while tokens > 0:
        drawn = (
            rng.lognormal(np.log(median), sigma, 1000).clip(16, min(LONGEST, longest)).astype(int)
        )
        kept = drawn[: int(np.searchsorted(drawn.cumsum(), tokens)) + 1]
        lengths += kept.tolist()
        tokens -= int(kept.sum())
    return lengths


def write_rows(path: Path, lengths: Sequence[int], vocabulary: int = VOCABULARY) -> Path:
    """Write one row per length, the same every time, with every column that a YAML reads."""
    rng = np.random.default_rng(1)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            words = [f"w{id}" for id in rng.integers(3, vocabulary, length)]
            split = length - round(length * LABELLED)
            prompt, response = " ".join(words[:split]), " ".join(words[split:])
            row = dict.fromkeys(_PROMPTS, prompt) | dict.fromkeys(_RESPONSES, response)
            file.write(json.dumps({**row, "text": " ".join(words)}) + "\n")
    return path


def offline_config(
    path: Path,
    folder: Path,
    *,
    model: str | None = None,
    lengths: str = "a",
    steps: int,
    overrides: Sequence[str] = (),
    keep_wandb: bool = False,
) -> dict[str, Any]:
    """Resolve the YAML at `path` for `steps` batches, with its inputs and outputs in `folder`.

    Args:
        model: a shipped shape; None for the shape of the checkpoint that the YAML names.
        overrides: `key=value` as for train.py.

    Raises:
        ValueError: train.py would refuse an override, or the checkpoint has no shipped shape.
    """
    import torch

    from foundry_ext.models.pretrained import HUB_NAMES

    loaded = load_config(path, overrides)
    settle(loaded, has_gpu=torch.cuda.is_available())
    config: Any = OmegaConf.to_container(loaded, resolve=True)
    shape = model or config["model"]["pretrained_model_name_or_path"]
    shape = {hub: name for name, hub in HUB_NAMES.items()}.get(shape, shape)
    if shape not in HUB_NAMES:
        raise ValueError(f"--model {shape}: no shipped shape; choose from {', '.join(HUB_NAMES)}")
    config["model"] |= {"pretrained_model_name_or_path": shape, "pretrained": False}
    vocabulary = config["model"].get("config_overrides", {}).get("vocab_size", VOCABULARY)
    config["tokenizer"]["name"] = str(make_tokenizer(folder / "tokenizer", vocabulary))
    dataset = config["train_loader"]["dataset"]
    needed = steps * config["global_train_batch_size"] * dataset["pack_tokens"]
    longest = dataset["max_seq_len"]
    drawn = draw_lengths(lengths, round(1.1 * needed), longest)
    rows = write_rows(folder / "rows.jsonl", drawn, vocabulary)
    for source in dataset.get("datasets") or [dataset]:
        source |= {"hf_name": str(rows), "split": "train"}
        source.pop("hf_kwargs", None)
    for key in _DROPPED:
        config.pop(key, None)
    for key in _DROPPED_CALLBACKS:
        config["callbacks"].pop(key, None)
    config["callbacks"]["run_record"]["path"] = str(folder / "record.json")
    config["loggers"]["metrics_file"]["path"] = str(folder / "metrics.jsonl")
    if not keep_wandb:
        config["loggers"].pop("wandb_metrics", None)
    if not torch.cuda.is_available():
        config["precision"] = "fp32"  # the only precision that Composer trains in on a CPU
    return config | {"eval_interval": 0, "eval_first": False, "max_duration": f"{steps}ba"}
