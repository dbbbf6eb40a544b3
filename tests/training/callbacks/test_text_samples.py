"""Continuations at every evaluation are right, and leave no trace in the run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Callback
from composer.loggers import LoggerDestination
from tokenizers import processors

from foundry_ext.training.callbacks.text_samples import COLUMNS, TextSamples, continuations
from tests.training import kit

PROMPTS = ["one bird", "the river of seven stone because", "a"]


class Tables(LoggerDestination):
    """Logger `tables` in a YAML: keeps tables and the random state around them."""

    made: list

    def __init__(self):
        Tables.made = []

    def log_table(self, columns, rows, name="Table", step=None):
        Tables.made.append((name, columns, rows, step))


class Watch(Callback):
    """Callback that keeps random state, mode and tokenizer before and after the samples."""

    seen: list

    def __init__(self):
        Watch.seen = []

    def eval_end(self, state, logger):
        Watch.seen.append(self.look(state))

    def batch_start(self, state, logger):
        Watch.seen.append(self.look(state))

    @staticmethod
    def look(state):
        tokenizer = state.model.tokenizer
        return torch.get_rng_state(), tokenizer.padding_side, tokenizer.pad_token_id


kit.llmfoundry.registry.loggers.register("tables", func=Tables)
kit.llmfoundry.registry.callbacks.register("watch", func=Watch)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_continuations_are_stock_ones(world, method):
    """A batch padded left gives the texts of single prompts, with an adapter that has an effect.

    They end as documents do, with the tokenizer's end of text, whatever the model's is.
    """
    ours = kit.build(world, method=method)
    kit.randomise_adapter(ours)
    ours.eval()
    theirs = kit.stock_model(world, ours)
    tokenizer = kit.load_tokenizer(world)
    got = continuations(
        ours.model, tokenizer, PROMPTS, max_new_tokens=8, device=torch.device("cpu")
    )
    for prompt, text in zip(PROMPTS, got, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        (made,) = theirs.generate(**ids, **ends, max_new_tokens=8, do_sample=False)
        made = made[ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(made, skip_special_tokens=True)
    assert len(set(got)) > 1 and any(got)


def test_a_prompt_begins_as_a_document_and_has_no_end(world):
    """A tokenizer that closes every text would let a sample go on after its end of text."""
    tokenizer, given = kit.load_tokenizer(world), []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )

    class Model:
        def generate(self, input_ids, **settings):
            given.append((input_ids.tolist(), settings["eos_token_id"]))
            return input_ids

    prompts = ["a", "<|im_start|>a"]
    continuations(Model(), tokenizer, prompts, max_new_tokens=1, device=torch.device("cpu"))
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert given == [([[1, a], [1, a]], 0)]


def test_at_every_evaluation_and_without_a_trace(world, tmp_path, capsys):
    def train(name, **callbacks):
        settings = {
            "callbacks": {"spy": {}, **callbacks},
            "loggers": {"inmemory": {}, "tables": {}},
            "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
            "eval_interval": "3ba",
            "eval_first": True,
            "log_to_console": True,
            "save_folder": None,
        }
        # LoRA has dropout here, so an extra random number would change the losses.
        return kit.run(kit.run_config(world, tmp_path / name, "lora", **settings))

    plain = train("plain")
    capsys.readouterr()
    samples = {"prompts": PROMPTS, "max_new_tokens": 4}
    run = train("sampled", text_samples=samples, watch={})
    assert run.losses == plain.losses
    states = {tuple(seen[0].tolist()) for seen in Watch.seen[:2]}
    assert len(states) == 1 and {seen[1:] for seen in Watch.seen} == {("right", 0)}

    tables = Tables.made
    assert [(name, columns, step) for name, columns, _, step in tables] == [
        ("text_samples", COLUMNS, step) for step in (0, 3, 6, 8)
    ]
    for _, _, rows, step in tables:
        assert [row[2] for row in rows] == PROMPTS and {row[0] for row in rows} == {step}
    tokens = [rows[0][1] for _, _, rows, _ in tables]
    assert tokens == sorted(set(tokens)) and tokens[-1] == run.trainer.state.timestamp.token
    assert tables[0][2] != tables[-1][2], "training changes what is written"
    printed = capsys.readouterr().err
    assert printed.count("text samples at step") == 4 and "text samples at step 6:" in printed
    assert f"  {PROMPTS[0]!r} -> {tables[-1][2][0][3]!r}" in printed
    assert "columns" not in printed, "the console logger would repeat the table with every line"


def test_fsdp_is_refused():
    state: Any = SimpleNamespace(fsdp_config=object())
    with pytest.raises(ValueError, match="text_samples: rank 0 cannot generate alone"):
        TextSamples(PROMPTS).init(state, None)  # pyright: ignore


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompts": []}, "prompts: []"),
        ({"prompts": "one"}, "prompts: 'one'"),
        ({"prompts": ["a", ""]}, "prompts: ['a', '']"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        TextSamples(**settings)
