"""FLOPs by formula against torch's count of a forward and backward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from foundry_ext.models.flops import (
    PEAK_FLOPS,
    adapter_parameters,
    forward_flops,
    peak_flops,
    training_flops,
)
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from tests.flops import counter

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [7, 1, 24, 16]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def counted(*, backward: bool, rank: int = 0) -> dict[str, float]:
    """FLOPs by operator; all labels but the documents' first ones."""
    torch.manual_seed(0)
    model, tokens = SmolLM2ForCausalLM(CONFIG), sum(LENGTHS)
    if rank:
        model = adapted(model, rank)
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))
    labels, ends = ids.clone(), torch.tensor([0, *LENGTHS]).cumsum(0)
    labels[0, ends[:-1]] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with counter() as found:
        loss = model(
            input_ids=ids,
            position_ids=positions,
            labels=labels,
            cu_seqlens=ends.int(),
            max_seqlen=max(LENGTHS),
        ).loss
        if backward:
            loss.backward()
    return {str(name): count for name, count in found.get_flop_counts()["Global"].items()}


def adapted(model, rank: int):
    return get_peft_model(model, LoraConfig(r=rank, target_modules=LINEARS, task_type="CAUSAL_LM"))


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


def test_adapters_products_are_those_of_the_operators():
    """The input of the first layer's q, k and v needs no gradient, so torch skips those products;
    for simplicity the formula counts them."""
    rank, hidden, tokens = 4, CONFIG.hidden_size, sum(LENGTHS)
    counts = counted(backward=True, rank=rank)
    products = sum(count for name, count in counts.items() if "attention" not in name)
    parameters = adapter_parameters(adapted(SmolLM2ForCausalLM(CONFIG), rank))
    flops = training_flops(CONFIG, **workload(), frozen_base=True, adapter_parameters=parameters)
    attention = 3 * forward_flops(CONFIG, **workload())["attention"]
    outputs = (CONFIG.num_attention_heads + 2 * CONFIG.num_key_value_heads) * CONFIG.head_dim
    not_wanted = 2 * tokens * (hidden * outputs + 3 * rank * hidden)
    assert products == flops - attention - not_wanted


def test_adapter_parameters_are_those_of_peft():
    model = adapted(SmolLM2ForCausalLM(CONFIG), 4)
    trainable, _ = model.get_nb_trainable_parameters()
    assert adapter_parameters(model) == trainable > 0
    assert adapter_parameters(SmolLM2ForCausalLM(CONFIG)) == 0


def test_dora_s_magnitudes_are_no_products():
    config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(SmolLM2ForCausalLM(CONFIG), config)
    magnitudes = sum(p.numel() for name, p in model.named_parameters() if "magnitude" in name)
    trainable, _ = model.get_nb_trainable_parameters()
    assert adapter_parameters(model) == trainable - magnitudes < trainable


def test_attention_is_half_of_the_dense_squares():
    parts = forward_flops(CONFIG, **workload())
    width = CONFIG.num_attention_heads * CONFIG.head_dim
    dense = sum(4 * length**2 * width for length in LENGTHS) * CONFIG.num_hidden_layers
    assert parts["attention"] == dense / 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NVIDIA GeForce RTX 3090", ("RTX", "3090")),
        ("NVIDIA GeForce RTX 4090", ("RTX", "4090")),
        ("NVIDIA GeForce RTX 5090", ("RTX", "5090")),
        ("NVIDIA A10", ("A10",)),
        ("NVIDIA L40S", ("L40S",)),
        ("NVIDIA A100-SXM4-40GB", ("A100",)),
        ("NVIDIA A100-SXM4-80GB", ("A100",)),
        ("A100-SXM4-40GB", ("A100",)),  # drivers before 470
        ("NVIDIA A100-PCIE-40GB", ("A100",)),
        ("NVIDIA A100 80GB PCIe", ("A100",)),
        ("NVIDIA H100 80GB HBM3", ("H100",)),
        ("NVIDIA H100 PCIe", ("H100", "PCIe")),
        ("NVIDIA H100 NVL", ("H100", "NVL")),
        ("NVIDIA H200", ("H200",)),
        ("NVIDIA H200 NVL", ("H200", "NVL")),
        ("NVIDIA B200", ("B200",)),
    ],
)
def test_peak_of_a_device(name: str, words: tuple[str, ...]):
    assert peak_flops(name) == PEAK_FLOPS[words]


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4",
        "NVIDIA A10G",
        "NVIDIA A16",
        "NVIDIA L4",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX A5000",
    ],
)
def test_another_card_is_not_taken_for_one_that_is_known(name: str):
    assert peak_flops(name) is None


@pytest.mark.parametrize(
    ("words", "multiprocessors", "products", "clock"),
    [
        # Multiply-adds per clock of a multiprocessor, bf16 into fp32, and the boost clock in GHz.
        # GeForce cards do half as many as the same chip with fp16 sums. NVIDIA states no boost
        # clock for the NVL cards and the B200, whose figures rest only on their data sheets.
        (("RTX", "3090"), 82, 256, 1.695),
        (("RTX", "4090"), 128, 256, 2.52),
        (("RTX", "5090"), 170, 256, 2.407),
        (("A10",), 72, 512, 1.695),
        (("L40S",), 142, 512, 2.52),
        (("A100",), 108, 1024, 1.41),
        (("H100", "PCIe"), 114, 2048, 1.62),
        (("H100",), 132, 2048, 1.83),
        (("H200",), 132, 2048, 1.83),
    ],
)
def test_peaks_follow_from_the_chip(
    words: tuple[str, ...], multiprocessors: int, products: int, clock: float
):
    """A figure with sparsity, or with fp16 sums, would be off by a factor of two. Data sheets
    round, and some, such as the L40S's, assume a clock slightly below the boost clock."""
    derived = multiprocessors * products * 2 * clock * 1e9
    assert PEAK_FLOPS[words] == pytest.approx(derived, rel=0.015)
