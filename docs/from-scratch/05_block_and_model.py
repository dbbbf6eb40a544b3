# %% [markdown]
# # 5. The block and the whole model, layer by layer
#
# A decoder layer is attention and an MLP, each with a norm before it and a residual connection
# around it. SmolLM2 is an embedding, such layers, a last norm, and a head that is the embedding
# again. This page writes all of it as functions of a checkpoint's tensors, and then looks for the
# place where two implementations part.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# SmolLM2-135M's head layout, made narrow and shallow. The large initializer_range keeps attention
# from being nearly uniform, which would hide errors.
CONFIG = LlamaConfig(hidden_size=144, head_dim=16, num_attention_heads=9, num_key_value_heads=3)
CONFIG.update({"intermediate_size": 384, "num_hidden_layers": 8, "vocab_size": 300})
CONFIG.update({"rope_theta": 1e5, "rms_norm_eps": 1e-5, "initializer_range": 0.14})
CONFIG.tie_word_embeddings = True
N = CONFIG.head_dim
Weights = dict[str, Tensor]

# %% [markdown]
# ## Build
#
# These functions compute in the dtype of the weights, so the same code in fp64 is the reference.


# %%
def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, CONFIG.rms_norm_eps)


def turn(x: Tensor) -> Tensor:
    """Turn x [T, H, N] by the positions 0, 1, ..., with angles in fp32."""
    frequency = 1.0 / CONFIG.rope_theta ** (torch.arange(0, N, 2).float() / N)
    angle = torch.arange(len(x)).float()[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def layer(w: Weights, index: int, x: Tensor) -> Tensor:
    """Compute one decoder layer: x [T, D] -> [T, D]."""
    w = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in w.items()}
    normed = norm(x, w["input_layernorm.weight"])
    q, k, v = (
        (normed @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, N)) for name in "qkv"
    )
    by_head = (heads.transpose(0, 1)[None] for heads in (turn(q), turn(k), v))
    out = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
    x = x + out[0].transpose(0, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
    normed = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (normed @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def model(w: Weights, ids: Tensor) -> list[Tensor]:
    """Return the embedding, the output of every layer, and the logits, for ids [T]."""
    outputs = [w["model.embed_tokens.weight"][ids]]
    for index in range(CONFIG.num_hidden_layers):
        outputs.append(layer(w, index, outputs[-1]))
    return [*outputs, norm(outputs[-1], w["model.norm.weight"]) @ w["lm_head.weight"].T]


# %% [markdown]
# ## Compare
#
# Forward hooks record the same outputs in Hugging Face's model and in this package's. Parameters
# have the same names in all three, so one `state_dict` serves all. The reference is this page's
# model in fp64, with the same weights after rounding.


# %%
def run(kind: type, w: Weights, ids: Tensor) -> list[Tensor]:
    """Return what `model` returns, of a class with Hugging Face's names."""
    # Not .to(dtype), which would round Hugging Face's rotary frequencies: see page 2.
    module = kind._from_config(CONFIG, torch_dtype=w["lm_head.weight"].dtype).eval()
    module.load_state_dict(w)
    module.attention_backend = "blockwise"  # this package's; Hugging Face does not look at it
    outputs: list[Tensor] = []
    for part in (module.model.embed_tokens, *module.model.layers, module.lm_head):
        part.register_forward_hook(
            lambda _module, _args, out: outputs.append(out if torch.is_tensor(out) else out[0])
        )
    module(ids[None])
    return [x.view(len(ids), -1) for x in outputs]


torch.manual_seed(0)
ids = torch.randint(0, CONFIG.vocab_size, (48,))
weights = LlamaForCausalLM(CONFIG).state_dict()
for name, tensor in weights.items():
    if name.endswith("norm.weight"):
        tensor.uniform_(0.5, 1.5)  # ones would not show where a norm rounds
errors: dict[torch.dtype, dict[str, list[float]]] = {}
for dtype in (torch.float32, torch.bfloat16):
    rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
    exact = model({name: tensor.double() for name, tensor in rounded.items()}, ids)
    results = {
        "this page": model(rounded, ids),
        "Hugging Face": run(LlamaForCausalLM, rounded, ids),
        "foundry_ext": run(SmolLM2ForCausalLM, rounded, ids),
    }
    errors[dtype] = {
        name: [((x - y).norm() / y.norm()).item() for x, y in zip(outputs, exact, strict=True)]
        for name, outputs in results.items()
    }
    mine, theirs, ours = (torch.tensor(found) for found in errors[dtype].values())
    assert (mine <= 3 * theirs).all() and (ours <= 3 * theirs).all()

# %% [markdown]
# ## Plot
#
# Every layer adds its own rounding to that of the layers before. In bf16 this page is off the
# least: it rounds norms once, where Hugging Face does so twice (page 1), and SDPA keeps the scores
# in fp32, where `blockwise` rounds them (page 4). None of the curves has a step that the others
# lack, as a fault would make. `foundry-ext parity MODEL` draws this for your own model.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
places = ["embedding", *(f"layer {i}" for i in range(CONFIG.num_hidden_layers)), "logits"]
for axes, (dtype, by_name) in zip(panels, errors.items(), strict=True):
    for marker, (name, values) in zip("os^", by_name.items(), strict=True):
        axes.plot(values, marker=marker, alpha=0.7, label=name)
    axes.set(title=f"Activations in {dtype}", xlabel="place in the model", ylim=(0, None))
    axes.set_xticks(range(len(places)), places, rotation=45, ha="right", fontsize=8)
panels[0].set_ylabel("relative error")
panels[0].legend(fontsize=8)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "05_block_and_model.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# Write `wrong_layers(right, wrong, ids)`, which returns the layers that compute something else with
# the weights `wrong` than with the weights `right`. All layers after the first of them receive
# another input, which must not mislead you.


# %%
def check(wrong_layers) -> None:
    for planted in ([], [0], [2, 5], [7]):
        wrong = dict(weights)
        for index in planted:
            name = f"model.layers.{index}.self_attn.k_proj.weight"
            wrong[name] = weights[name] * 1.01
        assert wrong_layers(weights, wrong, ids) == planted


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def wrong_layers(right: Weights, wrong: Weights, ids: Tensor) -> list[int]:
    inputs = model(right, ids)[:-2]  # every layer gets the right model's input
    return [
        index
        for index, x in enumerate(inputs)
        if not torch.equal(layer(right, index, x), layer(wrong, index, x))
    ]


check(wrong_layers)
