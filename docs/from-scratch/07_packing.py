# %% [markdown]
# # 7. Unpadding and packing
#
# Documents differ in length, and a batch is a rectangle. Padding fills it up with tokens that are
# computed and thrown away. Unpadding lays the real tokens end to end, so nothing is wasted, but the
# number of tokens changes from batch to batch. Packing chooses documents that fill a fixed number
# of tokens. For both, attention must know where documents end, and positions must restart there.

# %%
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from foundry_ext import Document, PackCollator, SmolLM2ForCausalLM, pack

torch.manual_seed(0)
LENGTHS, CAPACITY = [11, 3, 7, 2, 5, 9, 4, 6], 16
documents = [torch.randint(1, 300, (n,)) for n in LENGTHS]

# %% [markdown]
# ## Build
#
# Where documents end is written as `cu_seqlens`: 0, and the number of tokens up to each end. The
# example of two documents `5 6 7` and `8 9`, padded to `5 6 7` and `8 9 0`, gives ids 5 6 7 8 9,
# positions 0 1 2 0 1 and cu_seqlens 0 3 5.


# %%
def unpad(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T], positions [T] and cu_seqlens [B + 1] of a batch padded to [B, S]."""
    lengths = mask.sum(1)
    positions = (mask.cumsum(1) - 1)[mask.bool()]
    return padded[mask.bool()], positions, F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill a pack until the next document does not fit, then begin another."""
    packs: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        if sum(lengths[i] for i in packs[-1]) + length > capacity:
            packs.append([])
        packs[-1].append(index)
    return packs


# %% [markdown]
# ## Compare
#
# Hugging Face's `DataCollatorWithFlattening` and this package's `PackCollator` make the same ids
# and positions. `PackCollator` also returns `cu_seqlens`, which attention needs.
#
# The true logits are those of each document alone. Hugging Face's padded batch and this package's
# pack agree with them. The flattened batch does not in Hugging Face's model with SDPA: positions
# restart, but the documents see each other. (Only its flash attention looks at the positions.)

# %%
padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
ids, positions, cu_seqlens = unpad(padded, mask)

flat = DataCollatorWithFlattening()([{"input_ids": x.tolist()} for x in documents])
whole = [Document(x.numpy(), np.ones(len(x), bool)) for x in documents]
ours = PackCollator(max_seq_len=16, pack_tokens=64)(whole)
for found in (flat, ours):
    assert torch.equal(found["input_ids"][0], ids)
    assert torch.equal(found["position_ids"][0], positions)
assert torch.equal(ours["cu_seqlens"], cu_seqlens)

config = LlamaConfig(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, vocab_size=300)
config.update({"intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2})
theirs = LlamaForCausalLM(config).eval()
model = SmolLM2ForCausalLM(config).eval()
model.load_state_dict(theirs.state_dict())
model.attention_backend = "blockwise"
keys = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
with torch.no_grad():
    alone = torch.cat([theirs(x[None]).logits[0] for x in documents])
    results = {
        "Hugging Face, padded": theirs(padded, attention_mask=mask).logits[mask.bool()],
        "foundry_ext, packed": model(**{key: ours[key] for key in keys}).logits[0],
        "Hugging Face, flat, SDPA": theirs(ids[None], position_ids=positions[None]).logits[0],
    }
difference = {name: (found - alone).abs().amax(-1) for name, found in results.items()}
by_padding, by_packing, by_leaking = difference.values()
assert by_padding.max() < 1e-4 and by_packing.max() < 1e-4
assert by_leaking[: LENGTHS[0]].max() < 1e-4 and by_leaking[LENGTHS[0] :].max() > 0.1

# %% [markdown]
# ## Plot
#
# The batch, drawn: a colour is a document, and hatching is computed for nothing. `foundry_ext.pack`
# closes the gaps that next fit leaves. Below, the difference of the logits from those of each
# document alone, for every token, with 0 drawn at the bottom.

# %%
best = [list(map(int, members)) for members in pack(LENGTHS, CAPACITY, seed=0, epoch=0)]
layouts = {
    "padded": ([[i] for i in range(len(LENGTHS))], max(LENGTHS)),
    "unpadded": ([list(range(len(LENGTHS)))], sum(LENGTHS)),
    "next fit": (next_fit(LENGTHS, CAPACITY), CAPACITY),
    "foundry_ext.pack": (best, CAPACITY),
}
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6.5), layout="constrained")
row, ticks = 0.0, {}
for name, (rows, width) in layouts.items():
    fill = sum(LENGTHS) / (len(rows) * width)
    ticks[f"{name}, {fill:.0%} full"] = -row - (len(rows) - 1) / 2
    for members in rows:
        ends = np.cumsum([0, *(LENGTHS[i] for i in members)])
        for index, start in zip(members, ends, strict=False):
            top.barh(-row, LENGTHS[index], left=start, color=f"C{index}", edgecolor="white")
        top.barh(
            -row, width - ends[-1], left=ends[-1], color="white", edgecolor="grey", hatch="///"
        )
        row += 1
    row += 1
top.set_yticks(list(ticks.values()), list(ticks))
top.set(title="Batches of the same documents", xlabel="tokens of a row", ylabel="rows of the batch")
for name, found in difference.items():
    bottom.semilogy(found.clamp(min=1e-8), marker=".", label=name)
for end in cu_seqlens[1:-1]:
    bottom.axvline(end - 0.5, color="lightgrey")
bottom.set(title="Logits against those of each document alone", ylim=(5e-9, 1e3))
bottom.set(xlabel="token of the unpadded row", ylabel="largest difference of a logit")
bottom.legend(fontsize=8, loc="upper right", ncols=3)
folder = Path("outputs/from-scratch")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "07_packing.png", dpi=120)

# %% [markdown]
# ## Exercise
#
# Write `first_fit_decreasing(lengths, capacity)`: take documents from the longest to the shortest,
# and put each into the first pack that has room. It returns lists of indices, as `next_fit` does.


# %%
def check(first_fit_decreasing) -> None:
    assert first_fit_decreasing([3, 5, 2, 6], 8) == [[3, 2], [1, 0]]
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    packs = first_fit_decreasing(lengths, 128)
    assert sorted(i for members in packs for i in members) == list(range(300)), (
        "every document once"
    )
    assert max(sum(lengths[i] for i in members) for members in packs) <= 128
    assert len(packs) < len(next_fit(lengths, 128))
    assert len(packs) <= 1.02 * len(pack(lengths, 128, seed=0, epoch=0))


# %% [markdown]
# ### Solution


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [number for number, left in enumerate(room) if left >= lengths[index]]
        if not fits:
            fits = [len(packs)]
            packs.append([])
            room.append(capacity)
        packs[fits[0]].append(index)
        room[fits[0]] -= lengths[index]
    return packs


check(first_fit_decreasing)
