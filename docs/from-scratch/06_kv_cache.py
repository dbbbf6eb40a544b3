# %% [markdown]
# # 6. The key/value cache
#
# A model generates one token at a time, and every new token attends to all earlier ones. Their keys
# and values do not change, because no token sees a later one. So they are kept, and each step
# computes the new token only. The logits stay the same, except for rounding: the sums of one row
# and of many rows at once run in another order.

# %%
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from foundry_ext.models.greedy import generate_greedily
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# %% [markdown]
# ## Build
#
# A cache is two tensors that grow. The new queries see all earlier keys, and of the new keys those
# up to their own position. With one new token, that is everything.


# %%
class Cache:
    def __init__(self, num_heads: int, head_dim: int):
        self.k = self.v = torch.empty(num_heads, 0, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add k and v [H, S, N] of S new tokens, and attend with their queries q [H, S, N]."""
        past = self.k.shape[1]
        self.k, self.v = torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1)
        position = torch.arange(self.k.shape[1])
        is_seen = position <= position[past:, None]  # [S, past + S]
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=is_seen)


torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 40, 16)
whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
cache = Cache(2, 16)
steps = [cache.attend(*(x[:, t : t + 1] for x in (q, k, v))) for t in range(40)]
torch.testing.assert_close(torch.cat(steps, dim=1), whole)

# %% [markdown]
# ## Compare
#
# Hugging Face's model and this package's take and return the same cache object, so the same loop
# serves both. Greedy generation gives the same tokens with `generate`, which is Hugging Face's, and
# with `generate_greedily`, which packs the prompts and keeps one cache for all rows.

# %%
config = LlamaConfig(hidden_size=144, head_dim=16, num_attention_heads=9, num_key_value_heads=3)
config.update({"intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 300})
config.update({"initializer_range": 0.14, "tie_word_embeddings": True})
theirs = LlamaForCausalLM(config).eval()
ours = SmolLM2ForCausalLM(config).eval()
ours.load_state_dict(theirs.state_dict())
ours.attention_backend = "blockwise"


@torch.no_grad()
def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [T, V] of ids [T], a token at a time."""
    past, logits = None, []
    for token in ids:
        output = model(token.view(1, 1), past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[0])
    return torch.cat(logits)


T = 64
ids = torch.randint(0, 300, (T,))
models = {"Hugging Face": theirs, "foundry_ext": ours}
logits: dict[tuple[str, bool, bool], Tensor] = {}  # by model, in bf16 or fp32, cached or whole
for name, model in models.items():
    for bf16 in (False, True):
        # Autocast runs products in bf16; weights and rotary frequencies stay as they are.
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits[name, bf16, False] = model(ids[None]).logits[0].float()
            logits[name, bf16, True] = stepwise(model, ids).float()


def apart(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().amax(-1)


for name in models:
    by_bf16 = apart(logits[name, True, False], logits[name, False, False])
    by_cache = [
        apart(logits[name, bf16, True], logits[name, bf16, False]) for bf16 in (False, True)
    ]
    assert by_cache[0].max() < 1e-4 and by_cache[1].max() < 2 * by_bf16.max()

prompts = [ids[:9].tolist(), ids[9:12].tolist()]
mine = generate_greedily(ours, prompts, max_new_tokens=12, has_ended=lambda _: False)
for prompt, found in zip(prompts, mine, strict=True):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = theirs.generate(torch.tensor([prompt]), attention_mask=None, **settings)
    assert out[0, len(prompt) :].tolist() == found

# %% [markdown]
# ## Plot
#
# Left: the largest difference of a logit with and without the cache, by position, 0 being drawn at
# the bottom. It is rounding, at most as large as what bf16 changes without any cache. In bf16
# Hugging Face runs the same kernel with and without a cache. This package's `blockwise` rounds
# scores, and its attention over a cache, which is SDPA, does not (page 4).
#
# Right: floating-point operations in the linear layers per generated token, as torch counts them.
# Without a cache they grow with the length, with it they do not.


# %%
def operations(length: int, *, cached: bool) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        past = theirs(ids[None, : length - 1], use_cache=True).past_key_values if cached else None
        before = counter.get_total_flops()
        theirs(ids[None, length - 1 if cached else 0 : length], past_key_values=past)
    return counter.get_total_flops() - before


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for bf16, colour in ((False, "tab:blue"), (True, "tab:orange")):
    for name in models:
        by_position = apart(logits[name, bf16, True], logits[name, bf16, False])
        style = {"color": colour, "linestyle": "-" if name == "foundry_ext" else "--"}
        label = f"cache, {name}, {'bf16' if bf16 else 'fp32'}"
        left.semilogy(by_position.clamp(min=1e-7), label=label, **style)
left.semilogy(by_bf16, color="grey", linestyle=":", label="bf16 from fp32, no cache")
left.set(title="With the cache and without", ylabel="largest difference of a logit")
left.set(xlabel="position, tokens", ylim=(1e-7, 1e3))
left.legend(fontsize=7, loc="upper center", ncols=2)
lengths = list(range(2, T + 1, 6))
for cached in (False, True):
    counts = [operations(length, cached=cached) / 1e6 for length in lengths]
    right.plot(lengths, counts, marker=".", label=f"{'with' if cached else 'without'} cache")
right.set(title="Cost of the next token", ylabel="million operations per token")
right.set_xlabel("length, tokens")
right.legend(fontsize=8)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "06_kv_cache.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# Some models let a token see only the last `window` tokens, itself among them, so the cache stops
# growing. Write `WindowCache(num_heads, head_dim, window)`, whose `attend` takes one new token at a
# time and whose `k` and `v` never hold more than `window` tokens.


# %%
def check(window_cache: Any) -> None:
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position
    for window in (1, 5, 99):
        is_seen = (distance >= 0) & (distance < window)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen)
        cache = window_cache(2, 16, window)
        for t in position:
            found = cache.attend(*(x[:, t : t + 1] for x in (q, k, v)))
            torch.testing.assert_close(found, expected[:, t : t + 1])
            assert cache.k.shape[1] == cache.v.shape[1] <= window


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
class WindowCache(Cache):
    def __init__(self, num_heads: int, head_dim: int, window: int):
        super().__init__(num_heads, head_dim)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        oldest = max(self.k.shape[1] + 1 - self.window, 0)
        self.k, self.v = self.k[:, oldest:], self.v[:, oldest:]
        return super().attend(q, k, v)


check(WindowCache)
