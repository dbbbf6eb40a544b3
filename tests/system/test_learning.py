"""A model learns if there is something to learn, so that a stalled loss would be noticed.

On generated word problems, trained and evaluated on different rows, the held-out loss must fall
below the entropy of the labels' unigrams, which a model reaches without any context. With the
labels shuffled among their positions there is nothing more to learn, and it must not fall below.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foundry_ext.utils.constants import IGNORE_INDEX

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ["Ann", "Ben", "Carla", "Dan", "Eve", "Finn"]
THINGS = ["apples", "books", "coins", "marbles", "stamps"]
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def word_problem(rng: random.Random) -> dict[str, str]:
    name, thing, have, more = (
        rng.choice(NAMES),
        rng.choice(THINGS),
        rng.randint(2, 40),
        rng.randint(2, 40),
    )
    return {
        "prompt": f"{name} has {have} {thing} and gets {more}. How many {thing}?",
        "response": f" {name} has {have} + {more} = {have + more} {thing}.",
    }


def shuffle_labels(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Permute the labels over all labelled positions of the batch."""
    labels = [pack["labels"].clone() for pack in batch]
    where = [pack_labels != IGNORE_INDEX for pack_labels in labels]
    values = torch.cat([pack_labels[mask] for pack_labels, mask in zip(labels, where, strict=True)])
    parts = values[torch.randperm(len(values))].split([int(mask.sum()) for mask in where])
    for pack_labels, mask, part in zip(labels, where, parts, strict=True):
        pack_labels[mask] = part
    return [{**pack, "labels": moved} for pack, moved in zip(batch, labels, strict=True)]


def unigram_entropy(loader: Any) -> float:
    """Return the entropy of the labels' unigrams, in nats per label."""
    labels = torch.cat([pack["labels"].flatten() for batch in loader for pack in batch])
    counts = torch.bincount(labels[labels != IGNORE_INDEX]).numpy()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


@pytest.mark.parametrize("shuffled", [False, True], ids=["labels", "labels shuffled"])
def test_held_out_loss_against_the_labels_unigram_entropy(
    shuffled: bool, tokenizer: Any, write_jsonl: Callable[..., Path], tmp_path: Path
):
    from composer import Evaluator, Trainer

    from foundry_ext.data.dataloader import build_packed_finetuning_dataloader
    from foundry_ext.training.model import ComposerSmolLM2

    rng = random.Random(0)
    rows = [word_problem(rng) for _ in range(2400)]

    def loader(part: list[dict[str, str]], name: str, shuffle: bool):
        dataset = {
            "hf_name": str(write_jsonl(part, name)),
            "split": "train",
            "max_seq_len": 128,
            "pack_tokens": 1024,
            "shuffle": shuffle,
        }
        spec = build_packed_finetuning_dataloader(tokenizer, 2, dataset)
        if shuffled:
            spec.batch_transforms = shuffle_labels
        return spec

    train = loader(rows[:2200], "train.jsonl", True)
    held_out = loader(rows[2200:], "held_out.jsonl", False)
    entropy = unigram_entropy(held_out.dataloader)
    torch.manual_seed(0)
    model = ComposerSmolLM2(tokenizer, "smollm2-135m", pretrained=False, config_overrides={**MODEL})
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=Evaluator(
            label="eval",
            dataloader=held_out,
            metric_names=["LanguageCrossEntropy"],
            device_eval_microbatch_size=1,
        ),
        optimizers=torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0),
        max_duration="150ba",
        eval_interval="150ba",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        device="cpu",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    metric = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"]
    loss = float(metric.compute())
    trainer.close()
    assert (loss < 0.5 * entropy) is not shuffled, (loss, entropy)
    assert (loss > 0.98 * entropy) is shuffled, (loss, entropy)
