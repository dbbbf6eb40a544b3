"""Rotary positions against transformers' Llama, bit for bit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from foundry_ext.models.rope import apply_rotary, rotary_cos_sin

HEAD_DIM = 64
DTYPES = (torch.float32, torch.bfloat16)
# Three documents: one over all of SmolLM2's positions, a short one, a single token.
RESTARTING = torch.cat((torch.arange(8192), torch.arange(5), torch.zeros(1, dtype=torch.long)))


def their_cos_sin(position_ids, theta, dtype):
    config = LlamaConfig(hidden_size=HEAD_DIM, num_attention_heads=1, rope_theta=theta)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), position_ids[None])
    return cos[0], sin[0]


def random_heads(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HEAD_DIM, generator=generator).to(dtype)


def their_rotation(x_THN, cos, sin):
    """Apply theirs to [T, H, N], through their layout [1, H, T, N]."""
    x = x_THN.transpose(0, 1)[None]
    return apply_rotary_pos_emb(x, x, cos[None], sin[None])[0][0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", [100_000, 130_000])
def test_cos_sin(theta, dtype):
    ours = rotary_cos_sin(RESTARTING, head_dim=HEAD_DIM, theta=theta, dtype=dtype)
    theirs = their_cos_sin(RESTARTING, theta, dtype)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype
        # Theirs holds every angle twice, once for each half of the head.
        assert torch.equal(torch.cat((our, our), dim=-1), their)


def test_positions_restart():
    cos, sin = rotary_cos_sin(RESTARTING, head_dim=HEAD_DIM, theta=1e5, dtype=torch.float32)
    for x in (cos, sin):
        assert torch.equal(x[8192:8197], x[:5])
        assert torch.equal(x[8197], x[0])
    assert not torch.equal(cos[8191], cos[0])


# The last pair is autocast's: projections in bf16; the residual stream, cos and sin in fp32.
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "angle_dtype"), DTYPE_PAIRS)
def test_rotation(dtype, angle_dtype):
    positions = RESTARTING[-300:]
    x = random_heads(300, 3, dtype=dtype)
    cos, sin = rotary_cos_sin(positions, head_dim=HEAD_DIM, theta=1e5, dtype=angle_dtype)
    ours = apply_rotary(x, cos, sin)
    theirs = their_rotation(x, *their_cos_sin(positions, 1e5, angle_dtype))
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_rotation_of_a_batch():
    """[B, S] positions, as in cached decoding, where rows are at different positions."""
    positions = torch.tensor([[0, 0, 1, 2], [5, 6, 7, 8]])
    x = random_heads(2, 4, 3, dtype=torch.float32)
    ours = apply_rotary(x, *rotary_cos_sin(positions, head_dim=HEAD_DIM, theta=1e5, dtype=x.dtype))
    for row in range(2):
        theirs = their_rotation(x[row], *their_cos_sin(positions[row], 1e5, x.dtype))
        assert torch.equal(ours[row], theirs)


@pytest.mark.parametrize(("dtype", "angle_dtype"), DTYPE_PAIRS)
def test_gradient(dtype, angle_dtype):
    positions = RESTARTING[-300:]
    ours = random_heads(300, 3, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    cos, sin = rotary_cos_sin(positions, head_dim=HEAD_DIM, theta=1e5, dtype=angle_dtype)
    out = apply_rotary(ours, cos, sin)
    grad = random_heads(300, 3, dtype=out.dtype, seed=1)
    out.backward(grad)
    their_rotation(theirs, *their_cos_sin(positions, 1e5, angle_dtype)).backward(grad)
    assert ours.grad.dtype == dtype
    if dtype == angle_dtype:
        assert torch.equal(ours.grad, theirs.grad)
    else:  # ours is summed in fp32 before it is rounded, theirs after
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-7, atol=2**-7)


def test_gradcheck():
    positions = torch.tensor([0, 1, 2, 0, 1, 0])
    cos, sin = rotary_cos_sin(positions, head_dim=8, theta=100.0, dtype=torch.float64)
    x = torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, cos, sin), x)
