"""SmolLM2 against transformers' Llama, from the norm up to every parameter's gradient."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from foundry_ext.models.attention import varlen_attention
from foundry_ext.models.decoder import MLP, RMSNorm, SmolLM2DecoderLayer
from foundry_ext.models.rope import rotary_cos_sin

SHAPES = ["smollm2-135m", "smollm2-360m", "smollm2-1.7b"]  # heads 9/3, 15/5, 32/32
every_shape = pytest.mark.parametrize("shape", SHAPES)
LENGTHS = [7, 1, 16, 5]


def relative_error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def real_logits(model, padded):
    """Remove padding from logits: [T, V], in the order of a pack."""
    inputs = {key: padded[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs).logits[padded["attention_mask"].bool()]


def packed_logits(model, pack):
    return model(**{key: value for key, value in pack.items() if key != "labels"}).logits[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_norm(scale, dtype):
    torch.manual_seed(0)
    x = (scale * torch.randn(20, 64)).to(dtype)
    ours, theirs = RMSNorm(64, 1e-5).to(dtype), LlamaRMSNorm(64, 1e-5).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.uniform_(0.5, 1.5))
    assert ours(x).dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=0)
    else:  # theirs is rounded before the weight and after, ours after
        exact = copy.deepcopy(theirs).float()(x.float())
        assert relative_error(ours(x), exact) <= relative_error(theirs(x), exact)


def test_mlp(tiny_config):
    config = tiny_config()
    theirs = LlamaMLP(config)
    ours = MLP(config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, config.hidden_size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@every_shape
def test_block(shape, tiny_config, make_pair):
    config = tiny_config(shape, attention_bias=True, mlp_bias=True, head_dim=16)
    ours, theirs = (model.model.layers[1] for model in make_pair(config))
    assert isinstance(ours, SmolLM2DecoderLayer)
    assert isinstance(theirs, LlamaDecoderLayer)
    with torch.no_grad():
        for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            if our.dim() == 1:  # biases start as zeros
                our.copy_(their.uniform_(-1, 1))
    torch.manual_seed(0)
    x = torch.randn(12, config.hidden_size)
    positions = torch.arange(12)
    cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
    angles = rotary_cos_sin(positions, head_dim=16, theta=config.rope_theta, dtype=x.dtype)

    our_out = ours(x, *angles, lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 12))
    their_angles = LlamaRotaryEmbedding(config)(x[None], positions[None])
    their_out = theirs(x[None], position_embeddings=their_angles)[0][0]
    torch.testing.assert_close(our_out, their_out, rtol=1e-6, atol=1e-5)


@every_shape
def test_fp32(shape, tiny_config, make_pair, make_documents, make_pack, make_padded):
    """Documents packed against the same documents padded: logits, loss and gradients."""
    ours, theirs = make_pair(tiny_config(shape))
    documents = make_documents(LENGTHS)
    pack, padded = make_pack(documents, prompt=3), make_padded(documents, prompt=3)

    our_logits, their_logits = packed_logits(ours, pack), real_logits(theirs, padded)
    assert their_logits.std() > 1, "too uniform to show an error"
    assert (our_logits - their_logits).abs().max() <= 1e-5

    our_loss, their_loss = ours(**pack).loss, theirs(**padded).loss
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    our_loss.backward()
    their_loss.backward()
    our_gradients, their_gradients = gradients(ours), gradients(theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert relative_error(our_gradients[name], gradient) <= 1e-5, name


@every_shape
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bf16(shape, autocast, tiny_config, make_pair, make_documents, make_pack, make_padded):
    """Ours is as close to fp32 as theirs."""
    ours, theirs = make_pair(tiny_config(shape))
    if not autocast:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    exact = copy.deepcopy(theirs).float()
    documents = make_documents(LENGTHS)
    pack, padded = make_pack(documents), make_padded(documents)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        our_logits, our_loss = packed_logits(ours, pack), ours(**pack).loss
        their_logits, their_loss = real_logits(theirs, padded), theirs(**padded).loss
    exact_logits, exact_loss = real_logits(exact, padded), exact(**padded).loss

    assert our_loss.dtype == torch.float32
    our_error, their_error = (relative_error(x, exact_logits) for x in (our_logits, their_logits))
    assert our_error <= 1.2 * their_error
    assert abs(our_loss - exact_loss) <= their_error * exact_loss
    for loss in (our_loss, their_loss, exact_loss):
        loss.backward()
    for name, gradient in gradients(exact).items():
        our_error, their_error = (
            relative_error(gradients(model)[name], gradient) for model in (ours, theirs)
        )
        assert our_error <= 1.5 * their_error, name


@every_shape
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(side, shape, tiny_config, make_pair, make_documents, make_padded):
    """Trap 8: id 0 is text if the mask is 1, although padding is also 0."""
    ours, theirs = make_pair(tiny_config(shape))
    padded = make_padded(make_documents(LENGTHS), side=side)
    assert (real_logits(ours, padded) - real_logits(theirs, padded)).abs().max() <= 1e-5

    out, their_loss = ours(**padded), theirs(**padded).loss
    assert set(out.keys()) == {"loss"}, "in training the loss is all that is asked for"
    assert out.loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    out.loss.backward()
    their_loss.backward()
    for name, gradient in gradients(theirs).items():
        assert relative_error(gradients(ours)[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_evaluation(side, make_pair, make_documents, make_padded):
    ours, theirs = (model.eval() for model in make_pair())
    padded = make_padded(make_documents(LENGTHS), side=side)
    with torch.no_grad():
        our_out, their_out = ours(**padded), theirs(**padded)
    real = padded["attention_mask"].bool()
    assert set(our_out.keys()) >= {"loss", "logits"}, "Composer looks in the keys"
    assert our_out["loss"].item() == pytest.approx(their_out.loss.item(), rel=1e-6)
    assert (our_out.logits[real] - their_out.logits[real]).abs().max() <= 1e-5
    assert (our_out.logits[~real] == 0).all()


def test_whole_rows_need_no_mask(make_pair, make_documents):
    ours, theirs = make_pair()
    input_ids = torch.stack(make_documents([9, 9, 9]))
    our_out, their_out = ours(input_ids), theirs(input_ids)
    assert (our_out.logits - their_out.logits).abs().max() <= 1e-5
    our_loss, their_loss = (model(input_ids, labels=input_ids).loss for model in (ours, theirs))
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)


def test_labels_under_the_padding_do_not_count(make_pair, make_documents, make_padded):
    """A collator may copy input_ids to labels unchanged. Only the mask distinguishes padding; the
    first token of a row, which nothing predicts, does not count either."""
    ours, _ = make_pair()
    padded = make_padded(make_documents(LENGTHS), side="left")
    expected = ours(**padded).loss
    padded["labels"] = padded["input_ids"].clone()
    assert ours(**padded).loss.item() == expected.item()


def test_positions_are_taken_as_given(make_pair, make_documents):
    """Rotary attention sees only differences, so these positions must not be consecutive."""
    ours, theirs = make_pair()
    input_ids = torch.stack(make_documents([9, 9]))
    position_ids = torch.tensor([[0, 3, 4, 9, 10, 20, 21, 22, 30], [1, 2, 3, 5, 8, 13, 21, 34, 55]])
    expected = theirs(input_ids, position_ids=position_ids).logits
    assert (expected - theirs(input_ids).logits).abs().max() > 0.1

    padded = ours(input_ids, position_ids=position_ids).logits
    cached = ours(input_ids, position_ids=position_ids, use_cache=True).logits
    packed = ours(
        input_ids.view(1, -1),
        position_ids=position_ids.view(1, -1),
        cu_seqlens=torch.tensor([0, 9, 18], dtype=torch.int32),
        max_seqlen=9,
    ).logits.view_as(expected)
    for logits in (padded, cached, packed):
        assert (logits - expected).abs().max() <= 1e-5


def test_embeddings_in_place_of_ids(make_pair, make_documents, make_pack):
    ours, _ = make_pair()
    pack = make_pack(make_documents(LENGTHS))
    expected = ours(**pack).loss
    embedded = ours.get_input_embeddings()(pack.pop("input_ids"))
    assert ours(inputs_embeds=embedded, **pack).loss.item() == expected.item()


def test_logits_to_keep(make_pair, make_documents, make_padded):
    ours, _ = make_pair()
    padded = make_padded(make_documents(LENGTHS), side="left")
    del padded["labels"]
    for use_cache in (False, True):
        whole = ours(**padded, use_cache=use_cache).logits
        last = ours(**padded, use_cache=use_cache, logits_to_keep=2).logits
        assert torch.equal(last, whole[:, -2:])


@pytest.mark.more
def test_smollm2_135m(shipped_config, make_pair, make_documents, make_pack, make_padded):
    """The complete 135M with random weights: 134.5 million gradients, one by one."""
    config = shipped_config("smollm2-135m")
    ours, theirs = make_pair(config)
    documents = make_documents([20, 1, 33], vocabulary=config.vocab_size)
    pack, padded = make_pack(documents), make_padded(documents)
    our_logits, their_logits = packed_logits(ours, pack), real_logits(theirs, padded)
    assert (our_logits - their_logits).abs().max() <= 1e-5 * their_logits.abs().max()
    our_loss, their_loss = ours(**pack).loss, theirs(**padded).loss
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    our_loss.backward()
    their_loss.backward()
    for name, gradient in gradients(theirs).items():
        assert relative_error(gradients(ours)[name], gradient) <= 1e-5, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "flex", "sdpa"])
def test_on_a_gpu(backend, tiny_config, make_pair, make_documents, make_pack, make_padded):
    """Packed and padded, under autocast, within the error of theirs; head_dim 64 as in SmolLM2."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    config = tiny_config(head_dim=64)
    ours, theirs = (model.cuda() for model in make_pair(config))
    ours.attention_backend = backend
    documents = make_documents([130, 1, 16, 5])
    pack, padded = (
        {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        for batch in (make_pack(documents), make_padded(documents))
    )
    exact_logits, exact_loss = real_logits(theirs, padded), theirs(**padded).loss
    exact_whole = theirs(padded["input_ids"][:1]).logits
    exact_loss.backward()
    exact_gradients = {name: x.clone() for name, x in gradients(theirs).items()}
    theirs.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        their_logits, their_loss = real_logits(theirs, padded), theirs(**padded).loss
        for logits in (packed_logits(ours, pack), real_logits(ours, padded)):
            limit = 1.2 * relative_error(their_logits, exact_logits)
            assert relative_error(logits, exact_logits) <= limit
        # Without a mask, the default one must be created on the device.
        whole = padded["input_ids"][:1]
        limit = 1.2 * relative_error(theirs(whole).logits, exact_whole)
        assert relative_error(ours(whole).logits, exact_whole) <= limit
        our_loss = ours(**pack).loss
    our_loss.backward()
    their_loss.backward()
    for name, gradient in exact_gradients.items():
        limit = 1.5 * relative_error(gradients(theirs)[name], gradient)
        assert relative_error(gradients(ours)[name], gradient) <= limit, name
