"""Tiny runs: a pretrained model of 20,000 parameters, a YAML's worth of settings, four methods.

`theirs` is transformers' (and peft's) own model, `ours` smollm2_packed with the same weights.
"""

import copy
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmfoundry.registry
import torch
import torch.nn.functional as F
from composer.core import Callback
from llmfoundry.command_utils import train
from llmfoundry.utils.builders import build_composer_model
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foundry_ext.packing.collator import Document, PackCollator
from foundry_ext.records.result_settings import EFFECTS, Effect
from foundry_ext.training.callbacks.exact_resume import ExactResume
from foundry_ext.training.callbacks.guard import Guard
from foundry_ext.utils.constants import IGNORE_INDEX

VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large, so that attention and logits are far from uniform and errors are visible.
    "initializer_range": 0.2,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {**LORA, "lora_dropout": 0.1},
    "dora": {**LORA, "use_dora": True},
    "rslora": {**LORA, "use_rslora": True},
}
ADAPTERS = [method for method, peft_config in METHODS.items() if peft_config]


@dataclass(frozen=True)
class World:
    """Inputs of a run: a tokenizer, a pretrained folder of stock transformers, rows."""

    tokenizer: Path
    base: Path
    rows: Path
    eval_rows: Path


def make_world(folder: Path, tokenizer_folder: Path, make_rows: Callable[..., list]) -> World:
    base = folder / "base"
    theirs = make_llama()
    theirs.generation_config.max_new_tokens = 77
    theirs.save_pretrained(base)
    world = World(tokenizer_folder, base, folder / "train.jsonl", folder / "eval.jsonl")
    for path, rows in (
        (world.rows, make_rows(40, seed=1, longest=12)),
        (world.eval_rows, make_rows(11, seed=2, longest=12)),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def make_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would be no different from no weight
                parameter.uniform_(0.5, 1.5)
    return model


def load_tokenizer(world: World):
    return AutoTokenizer.from_pretrained(world.tokenizer)


def build(world: World, *, method: str = "full", name: str = "smollm2_packed", **settings: Any):
    """Return the model that llm-foundry builds from a YAML's `model`."""
    settings = {"pretrained_model_name_or_path": str(world.base), **settings}
    if METHODS[method]:
        settings = {"peft_config": copy.deepcopy(METHODS[method]), **settings}
    torch.manual_seed(0)
    return build_composer_model(name, settings, load_tokenizer(world))


def randomise_adapter(model: Any, seed: int = 5) -> None:
    """Fill the adapter: lora_B starts at zero, and an adapter without effect hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1.1).add_(0.1 * noise)


def stock_model(world: World, ours: Any) -> Any:
    """Return transformers' model with our weights, in peft's own wrapper if ours is in one."""
    theirs: Any = LlamaForCausalLM.from_pretrained(world.base)
    if ours.using_peft:
        adapter = ours.model.peft_config["default"].to_dict()
        theirs = get_peft_model(theirs, LoraConfig(**adapter))
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    return theirs.train(ours.training)


# --- batches -------------------------------------------------------------------------------------


def make_documents(lengths: Sequence[int], *, prompt: int = 2, seed: int = 0) -> list[Document]:
    """Return documents of random ids, zeros included; `prompt` tokens of each have no label."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        ids[-1] = 0
        documents.append(
            Document(input_ids=ids.numpy(), loss_mask=(torch.arange(length) >= prompt).numpy())
        )
    return documents


def make_pack(documents: Sequence[Document], *, max_seq_len: int = 64):
    return PackCollator(max_seq_len=max_seq_len, pack_tokens=10**6)(documents)


def documents_of(packs: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (input_ids, labels) of every document; empty packs are left out."""
    found = []
    for pack in packs:
        ends = pack["cu_seqlens"].tolist()
        for start, end in itertools.pairwise(ends):
            if pack["num_documents"] and end > start:
                found.append((pack["input_ids"][0, start:end], pack["labels"][0, start:end]))
    return found


def pad(documents: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return ids [B, S], padded right with id 0, which is a real id too."""
    slots = max(len(ids) for ids, _ in documents)

    def padded(x: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(x, (0, slots - len(x)), value=value)

    return {
        "input_ids": torch.stack([padded(ids, 0) for ids, _ in documents]),
        "attention_mask": torch.stack([padded(torch.ones_like(ids), 0) for ids, _ in documents]),
        "labels": torch.stack([padded(labels, IGNORE_INDEX) for _, labels in documents]),
    }


def their_sums(theirs: Any, packs: Sequence[Any]) -> tuple[torch.Tensor, int, int]:
    """Return (summed loss, labelled tokens, correct predictions) from a padded batch's logits."""
    batch = pad(documents_of(packs))
    labels = batch.pop("labels")[:, 1:]
    logits = theirs(**batch).logits[:, :-1]
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return loss, int((labels != IGNORE_INDEX).sum()), int((logits.argmax(-1) == labels).sum())


def their_gradients(theirs: Any, packs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the gradients of the token-weighted mean loss of the complete batch, padded."""
    theirs.zero_grad()
    loss, count, _ = their_sums(theirs, packs)
    (loss / count).backward()
    return gradients(theirs)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def assert_same_gradients(ours: dict, theirs: dict, *, rtol: float = 1e-5) -> None:
    """Check equality up to fp32 rounding: `rtol` of the largest element of each."""
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).abs().max().item()
        assert difference <= rtol * gradient.abs().max().item(), (name, difference)


def run_the_card(folder: Path) -> dict[str, Any]:
    """Run the Python that a folder's model card gives, as it is; return its variables."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code" not in text
    (code,) = re.findall(r"```python\n(.*?)\n```\n", text, flags=re.DOTALL)
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


# --- runs ----------------------------------------------------------------------------------------


class Spy(Callback):
    """Callback `spy` in a YAML: keeps batches and gradients, and can end a run like a crash.

    `batches` are the loader's; `gradients` are those of each batch, before clipping and step.
    """

    def __init__(self, crash_after: int | None = None, keep_gradients: bool = False):
        self.crash_after, self.keep_gradients = crash_after, keep_gradients
        self.batches: list[Any] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def batch_start(self, state, logger):
        self.batches.append(state.batch)
        self.rates.append(state.schedulers[0].get_last_lr()[0])

    def after_train_batch(self, state, logger):
        if self.keep_gradients:
            model = state.model.module if state.is_model_ddp else state.model
            shards = gradients(model.model).items()
            self.gradients.append(
                {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in shards}
            )

    def batch_end(self, state, logger):
        if self.crash_after is not None and state.timestamp.batch == self.crash_after:
            raise Crash


class Crash(Exception):
    """The end of a run that dies."""


llmfoundry.registry.callbacks.register("spy", func=Spy)
# Tests give it other settings when a run resumes, which a callback of a user's may not have.
EFFECTS["callbacks.spy"] = Effect.SAME_BITS
if "exact_resume" not in llmfoundry.registry.callbacks_with_config:
    # Entry points are read at installation, which may be older than this test.
    llmfoundry.registry.callbacks_with_config.register("exact_resume", func=ExactResume)
if "guard" not in llmfoundry.registry.callbacks:  # its entry point is read at installation
    llmfoundry.registry.callbacks.register("guard", func=Guard)


def run_config(world: World, folder: Path, method: str = "full", **overrides: Any) -> DictConfig:
    """Return a run's YAML; `overrides` are keys, with `a__b` for `a.b`; None removes a key."""
    peft_config = copy.deepcopy(METHODS[method])  # an override may change it
    config: dict[str, Any] = {
        "run_name": method,
        "seed": 17,
        "max_seq_len": 32,
        "model": {
            "name": "smollm2_packed",
            "pretrained_model_name_or_path": str(world.base),
            **({"peft_config": peft_config} if peft_config else {}),
        },
        "tokenizer": {"name": str(world.tokenizer), "kwargs": {"model_max_length": 32}},
        "train_loader": loader_config(world.rows, shuffle=True),
        "optimizer": {
            "name": "decoupled_adamw",
            "lr": 0.01,
            "betas": [0.9, 0.95],
            "weight_decay": 0.0,
        },
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "callbacks": {"spy": {}},
        "loggers": {"inmemory": {}},
        "max_duration": "2ep",
        "eval_interval": 0,
        "global_train_batch_size": 3,
        "device_train_microbatch_size": 1,
        "device_eval_batch_size": 2,
        "precision": "fp32",
        "save_folder": str(folder / "checkpoints"),
        "save_interval": "1ba",
        "progress_bar": False,
        "log_to_console": False,
        "log_config": False,
        "python_log_level": None,
    }
    for key, value in copy.deepcopy(overrides).items():  # a later one may change an earlier one
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        if value is None:
            del node[last]
    return OmegaConf.create(copy.deepcopy(config))


def loader_config(rows: Path, **dataset: Any) -> dict[str, Any]:
    return {
        "name": "packed_finetuning",
        "dataset": {
            "hf_name": str(rows),
            "split": "train",
            "max_seq_len": 32,
            "pack_tokens": 64,
            **dataset,
        },
        "num_workers": 0,
    }


@dataclass(frozen=True)
class Run:
    """A finished run."""

    trainer: Any
    spy: Spy

    @property
    def losses(self) -> list[float]:
        return self.logged("loss/train/total")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        model = self.trainer.state.model
        model = model.module if self.trainer.state.is_model_ddp else model
        return {name: value.clone() for name, value in model.model.state_dict().items()}

    def logged(self, name: str) -> list[float]:
        return self.all_logged(name)[name]

    def all_logged(self, prefix: str) -> dict[str, list[float]]:
        (memory,) = [d for d in self.trainer.logger.destinations if hasattr(d, "data")]
        names = [name for name in memory.data if name.startswith(prefix)]
        return {name: [float(value) for _, value in memory.data[name]] for name in names}


def run(config: DictConfig) -> Run:
    """Run llm-foundry's own train command."""
    trainer = train(config)
    trainer.close()
    return Run(trainer, next(c for c in trainer.state.callbacks if isinstance(c, Spy)))


def checkpoint(folder: Path, batch: int, epoch: int | None = None) -> Path:
    """Return the path of the checkpoint after `batch` batches of the run in `folder`."""
    pattern = f"ep{'*' if epoch is None else epoch}-ba{batch}-rank0.pt"
    (found,) = (folder / "checkpoints").glob(pattern)
    return found
