"""FLOPs by formula against torch's own count of a forward and backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from foundry_ext.models.flops import forward_flops, peak_flops, training_flops
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

LENGTHS = [7, 1, 24, 16]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def counted(*, backward: bool) -> dict[str, float]:
    """FLOPs by operator; all labels but the documents' first ones."""
    torch.manual_seed(0)
    model, tokens = SmolLM2ForCausalLM(CONFIG), sum(LENGTHS)
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))
    labels, ends = ids.clone(), torch.tensor([0, *LENGTHS]).cumsum(0)
    labels[0, ends[:-1]] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(
            input_ids=ids,
            position_ids=positions,
            labels=labels,
            cu_seqlens=ends.int(),
            max_seqlen=max(LENGTHS),
        ).loss
        if backward:
            loss.backward()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def workload() -> dict[str, int]:
    return {
        "num_tokens": sum(LENGTHS),
        "num_loss_tokens": sum(LENGTHS) - len(LENGTHS),
        "sum_squared_lengths": sum(length**2 for length in LENGTHS),
    }


def test_training_flops_are_those_of_the_operators():
    counts = counted(backward=True)
    products = sum(count for name, count in counts.items() if "attention" not in name)
    parts = forward_flops(CONFIG, **workload())
    assert products == 3 * (parts["linear"] + parts["head"])


def test_frozen_weights_save_a_third_of_the_linear_part():
    parts = forward_flops(CONFIG, **workload())
    full, frozen = (
        training_flops(CONFIG, **workload(), frozen_base=frozen) for frozen in (False, True)
    )
    assert full - frozen == parts["linear"] + parts["head"]


def test_attention_is_half_of_the_dense_squares():
    parts = forward_flops(CONFIG, **workload())
    width = CONFIG.num_attention_heads * CONFIG.head_dim
    dense = sum(4 * length**2 * width for length in LENGTHS) * CONFIG.num_hidden_layers
    assert parts["attention"] == dense / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 3090", 71.2e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_device(name: str, peak: float | None):
    assert peak_flops(name) == peak
