"""Fixtures that return functions to make small models and batches.

`ours` is SmolLM2ForCausalLM, `theirs` transformers' LlamaForCausalLM with the same weights.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import foundry_ext.models
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

CONFIGS = Path(foundry_ext.models.__file__).parent / "configs"
VOCABULARY = 131


def _tiny_config(shape="smollm2-135m", **overrides):
    """Return a shipped configuration with its heads, made narrow and shallow.

    `initializer_range` is large, so that attention and logits are far from uniform: with the
    shipped one, scores are near zero and hardly any error of rope or mask would show.
    """
    config = LlamaConfig.from_pretrained(CONFIGS / shape)
    hidden_size = 8 * config.num_attention_heads
    tiny = {
        "hidden_size": hidden_size,
        "head_dim": 8,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 1.7 * hidden_size**-0.5,
    }
    for key, value in (tiny | overrides).items():
        setattr(config, key, value)
    return config


def _make_pair(config=None, *, seed=0):
    config = config or _tiny_config()
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.weight"):  # a weight of ones would not show whether it is used
                parameter.uniform_(0.5, 1.5)
    ours = SmolLM2ForCausalLM(copy.deepcopy(config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _make_documents(lengths, *, vocabulary=VOCABULARY, seed=0):
    """Draw random ids, some of them 0; every document ends with 0, as SmolLM2's do."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]
    for document in documents:
        document[-1] = 0
        document[len(document) // 2] = 0
    return documents


def _make_pack(documents, *, prompt=0, max_seqlen=None):
    """Make a packed batch without its counts; `prompt` tokens of each have no label."""
    labels = [document.clone() for document in documents]
    for label in labels:
        label[: max(prompt, 1)] = -100
    lengths = torch.tensor([len(document) for document in documents])
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "labels": torch.cat(labels)[None],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen": max_seqlen or int(lengths.max()),
    }


def _make_padded(documents, *, side="right", prompt=0):
    """Pad to [B, S] with id 0, which is also a real id."""
    seq_len = max(len(document) for document in documents)

    def pad(x, value):
        width = seq_len - len(x)
        return F.pad(x, (width, 0) if side == "left" else (0, width), value=value)

    labels = [document.clone() for document in documents]
    for label in labels:
        label[: max(prompt, 1)] = -100
    return {
        "input_ids": torch.stack([pad(document, 0) for document in documents]),
        "attention_mask": torch.stack([pad(torch.ones_like(d), 0) for d in documents]),
        "labels": torch.stack([pad(label, -100) for label in labels]),
    }


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation allocates in the context."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        for x in _tensors(out):
            memory = x.untyped_storage()
            if memory.data_ptr() not in given:  # neither a view nor in place
                self.numel = max(self.numel, memory.nbytes() // x.element_size())
        return out


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Use one thread: on tensors this small a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shipped_config():
    return lambda shape: LlamaConfig.from_pretrained(CONFIGS / shape)


@pytest.fixture(scope="session")
def tiny_config():
    return _tiny_config


@pytest.fixture(scope="session")
def make_pair():
    return _make_pair


@pytest.fixture(scope="session")
def make_documents():
    return _make_documents


@pytest.fixture(scope="session")
def make_pack():
    return _make_pack


@pytest.fixture(scope="session")
def make_padded():
    return _make_padded


@pytest.fixture
def largest_tensor():
    return _LargestTensor()
