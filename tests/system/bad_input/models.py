"""Cases of bad models, adapters and tokenizers, and of places where they are looked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.system.bad_input.bench import Bench
from tests.system.bad_input.case import Case, change, data
from tests.training import kit

_MODEL = "pretrained_model_name_or_path: "
_NEEDED = ("give a local folder with config.json and model.safetensors", "hub")
_ADAPTER = "pretrained_lora_id_or_path: adapter "
_TOKENIZER = "tokenizer.name must be a local folder with tokenizer.json"


def model(spoil: Callable[[Path], Any]) -> Callable[[Bench], None]:
    """Return a change that uses a copy of the base model, broken by `spoil`."""

    def make(bench: Bench) -> None:
        folder = bench.folder / "model"
        shutil.copytree(bench.world.base, folder)
        spoil(folder)
        bench.change(model__pretrained_model_name_or_path=str(folder))

    return make


def _config(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def _to_pickle(folder: Path, name: str = "model.safetensors") -> None:
    new = {"model.safetensors": "pytorch_model.bin"}.get(name, "adapter_model.bin")
    torch.save(load_file(folder / name), folder / new)
    (folder / name).unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def adapter(spoil: Callable[[Path], Any] | None = None, **shape: Any) -> Callable[[Bench], None]:
    """Return a change that adds an adapter of the base model, or of a model of another shape."""

    def make(bench: Bench) -> None:
        folder = bench.folder / "adapter"
        adapted = get_peft_model(kit.make_llama(**shape), LoraConfig(**kit.LORA))  # pyright: ignore
        adapted.save_pretrained(str(folder))
        if spoil is not None:
            spoil(folder)
        bench.change(model__pretrained_lora_id_or_path=str(folder))

    return make


def _other_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), "base_model_name_or_path": "other/base"}
    path.write_text(json.dumps(content))


def tokenizer(spoil: Callable[[Any], Any]) -> Callable[[Bench], Path]:
    """Return a function that uses a changed copy of the tokenizer and returns its folder."""

    def make(bench: Bench) -> Path:
        changed, folder = AutoTokenizer.from_pretrained(bench.world.tokenizer), bench.folder / "tok"
        spoil(changed)
        changed.save_pretrained(folder)
        bench.change(tokenizer__name=str(folder))
        return folder

    return make


def _larger(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<x{number}>" for number in range(100)])


def _broken_tokenizer(bench: Bench) -> None:
    folder = tokenizer(lambda _: None)(bench)
    (folder / "tokenizer.json").write_text("{")


def _other_vocabulary(bench: Bench) -> None:
    kit.make_llama(vocab_size=5000).save_pretrained(bench.folder / "model")
    bench.change(model__pretrained_model_name_or_path=str(bench.folder / "model"))


def _pads_with_the_end(bench: Bench) -> None:
    folder = tokenizer(lambda one: setattr(one, "pad_token", one.eos_token))(bench)
    tokens = len(AutoTokenizer.from_pretrained(folder)("two three").input_ids)
    assert tokens == 7  # see _ends_are_learned
    bench.rows([{"prompt": "one", "response": "two three"}] * 9)


def _ends_are_learned(bench: Bench) -> None:
    """Check that 8 of 9 tokens are learned: the response's 7 and the end, not the prompt."""
    tokens = bench.record()["tokens"]
    assert tokens["loss"] * 9 == tokens["real"] * 8 > 0, tokens


MODELS = [
    Case("model without weights", model(lambda folder: (folder / "model.safetensors").unlink()),
         (_MODEL, "no model.safetensors", *_NEEDED)),
    Case("model as a pickle", model(_to_pickle),
         (_MODEL, "pytorch_model.bin, a pickle, which could run code", "safe_serialization=True")),
    Case("model cut", model(_cut), (_MODEL, "corrupted weights", *_NEEDED)),
    Case("model folder empty", model(_empty), (_MODEL, "no config.json", *_NEEDED)),
    Case("configuration broken", model(lambda folder: (folder / "config.json").write_text("{")),
         (_MODEL, "cannot be read", "config.json", "not a valid JSON file")),
    Case("another architecture", model(_config(model_type="gpt2")),
         ("is a gpt2 model", "only Llama-shaped ones", "use hf_causal_lm")),
    Case("unknown architecture", model(_config(model_type="foo")),
         (_MODEL, "architecture that transformers does not know", "use hf_causal_lm")),
    Case("weights of another shape", model(_config(hidden_size=64)),
         ("does not fit its configuration", "embed_tokens", "config_overrides must not")),
    Case("model folder missing", change(model__pretrained_model_name_or_path="/no/model"),
         (_MODEL + "/no/model is not a local folder", *_NEEDED)),
    Case("backend", change(model__attention_backend="flash"),
         ("attention_backend: 'flash' is unknown", "choose one of auto, flash_attn")),
    Case("flash_attn on a CPU", change(model__attention_backend="flash_attn"),
         ("attention_backend: 'flash_attn' needs a GPU", "use 'sdpa'")),
    Case("Liger on a CPU", change(model__loss="liger"), ("loss: 'liger' needs a GPU", "'chunked'")),
    Case("a shape has no weights", change(model__pretrained_model_name_or_path="smollm2-135m"),
         ("smollm2-135m is a shape without weights", "set pretrained: false")),
]  # fmt: skip

ADAPTERS = [
    Case("adapter missing", change(model__pretrained_lora_id_or_path="/no/adapter"),
         (_ADAPTER + "/no/adapter is not a folder here", "adapter_model.safetensors")),
    Case("adapter as a pickle", adapter(lambda f: _to_pickle(f, "adapter_model.safetensors")),
         (_ADAPTER, "holds no adapter_model.safetensors", "safe_serialization=True")),
    Case("adapter of a wider base", adapter(hidden_size=64),
         (_ADAPTER, "does not fit the model", "size mismatch", "the one that it was trained on")),
    Case("adapter of a deeper base", adapter(num_hidden_layers=3),
         (_ADAPTER, "does not fit the model", "left over ['base_model.model.model.layers.2")),
    Case("adapter of a shallower base", adapter(num_hidden_layers=1),
         (_ADAPTER, "does not fit the model", "missing ['base_model.model.model.layers.1")),
    Case("adapter's unknown key", change(model__peft_config={**kit.LORA, "lora_alpa": 3}),
         ("peft_config: unknown key 'lora_alpa'", "did you mean 'lora_alpha'")),
]  # fmt: skip

TOKENIZERS = [
    Case("tokenizer missing", change(tokenizer__name="/no/tok"),
         ("(/no/tok): no folder here", _TOKENIZER)),
    Case("tokenizer broken", _broken_tokenizer, ("tok)", "EOF while parsing", _TOKENIZER)),
    Case("no end of text", tokenizer(lambda t: setattr(t, "eos_token", None)),
         ("must have an eos_token", _TOKENIZER)),
    Case("more tokens than the model", tokenizer(_larger),
         ("412 tokens", "model's 320", "allow_embedding_resizing: true")),
]  # fmt: skip

HUB = [
    Case("hub's model", change(model__pretrained_model_name_or_path="nobody/model"),
         (_MODEL + "nobody/model is not a local folder, and the hub does not", *_NEEDED)),
    Case("hub's tokenizer", change(tokenizer__name="nobody/tok"),
         ("(nobody/tok): no folder here", "the hub does not give it", _TOKENIZER)),
    Case("hub's data", data(hf_name="nobody/rows"),
         ("dataset nobody/rows is neither here", "nor on the hub", "a local .jsonl")),
    Case("hub's adapter", change(model__pretrained_lora_id_or_path="nobody/adapter"),
         (_ADAPTER + "nobody/adapter is not a folder here, and the hub does not give it",)),
]  # fmt: skip

ALLOWED = [
    Case("no pad token", tokenizer(lambda t: setattr(t, "pad_token", None)), ()),
    Case("pad is the end of text", _pads_with_the_end, (), holds=_ends_are_learned),
    Case("fewer tokens than the model", _other_vocabulary,
         ("tokenizer has 312 tokens, the model", "5000", "name the model's own")),
    Case("adapter that names another base", adapter(_other_base),
         ("was trained on other/base and continues here on", "does not fit")),
]  # fmt: skip
