"""Packing does not change losses, logits or gradients of its documents."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from foundry_ext.models import decoder, smollm2
from foundry_ext.models import loss as loss_module

MAX_SEQ_LEN = 16
LENGTHS = [5, 1, MAX_SEQ_LEN, 3]
PACKED_KEYS = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")


def logits(model, pack):
    return model(**{key: pack[key] for key in PACKED_KEYS}).logits[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_gradients(ours, theirs, *, rel):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm()
        assert error <= rel * gradient.norm(), f"{name}: {error / gradient.norm():.1e}"


@pytest.fixture
def ours(make_pair):
    return make_pair()[0]


@pytest.fixture
def pack(make_documents, make_pack):
    return make_pack(make_documents(LENGTHS), max_seqlen=MAX_SEQ_LEN)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "torch_cpu", "flex"])
@pytest.mark.parametrize("shape", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b"])
def test_packed_is_each_document_alone(
    shape, backend, tiny_config, make_pair, make_documents, make_pack
):
    ours, theirs = make_pair(tiny_config(shape))
    ours.attention_backend = backend
    documents = make_documents(LENGTHS)
    with torch.no_grad():
        packed = logits(ours, make_pack(documents)).split(LENGTHS)
        for document, ours_in_pack in zip(documents, packed, strict=True):
            alone = theirs(document[None]).logits[0]
            assert (ours_in_pack - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "torch_cpu", "flex"])
def test_documents_do_not_see_each_other(backend, ours, pack):
    """Trap 3: changing one document does not change a bit of the others' logits."""
    ours.attention_backend = backend
    ends = pack["cu_seqlens"].tolist()
    with torch.no_grad():
        before = logits(ours, pack)
        for start, end in itertools.pairwise(ends):
            changed = copy.deepcopy(pack)
            changed["input_ids"][:, start:end] = (pack["input_ids"][:, start:end] + 1) % 131
            after = logits(ours, changed)
            others = torch.ones(ends[-1], dtype=torch.bool)
            others[start:end] = False
            assert torch.equal(after[others], before[others])
            assert (after[~others] - before[~others]).abs().max() > 0.1


def test_gradients_do_not_cross_documents(ours, pack):
    """The loss of one document alone reaches no embedding of another."""
    start, end = pack["cu_seqlens"][2:4].tolist()
    labels = torch.full_like(pack["labels"], -100)
    labels[:, start + 1 : end] = pack["labels"][:, start + 1 : end]
    embedded = ours.get_input_embeddings()(pack["input_ids"]).detach().requires_grad_()
    batch = {key: pack[key] for key in PACKED_KEYS if key != "input_ids"}
    ours(inputs_embeds=embedded, labels=labels, **batch).loss.backward()
    reached = embedded.grad[0].norm(dim=-1) > 0
    assert reached[start : end - 1].all()
    assert not reached[:start].any()
    assert not reached[end - 1 :].any(), "the last token of a document predicts nothing"


@pytest.mark.parametrize("prompt", [0, 2])
def test_any_packing_gives_the_gradients_of_one_padded_batch(
    prompt, make_pair, make_documents, make_pack, make_padded
):
    """Trap 5: losses weighed by their labels, packs of unequal size, one document without any."""
    ours, theirs = make_pair()
    documents = make_documents([5, 1, MAX_SEQ_LEN, 3, 9, 2])
    expected_loss = theirs(**make_padded(documents, prompt=prompt)).loss
    expected = gradients(theirs, expected_loss)
    for bounds in ([0, 6], [0, 1, 6], [0, 2, 3, 6]):
        packs = [
            make_pack(documents[start:end], prompt=prompt, max_seqlen=MAX_SEQ_LEN)
            for start, end in itertools.pairwise(bounds)
        ]
        counts = [(pack["labels"] != -100).sum().item() for pack in packs]
        loss = sum(
            ours(**pack).loss * (count / sum(counts))
            for pack, count in zip(packs, counts, strict=True)
        )
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        assert_same_gradients(gradients(ours, loss), expected, rel=1e-5)


def test_order_in_the_pack_does_not_matter(ours, make_documents, make_pack):
    documents = make_documents(LENGTHS)
    with torch.no_grad():
        one = logits(ours, make_pack(documents)).split(LENGTHS)
        other = logits(ours, make_pack(documents[::-1])).split(LENGTHS[::-1])[::-1]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_fixed_shape(ours, pack):
    """Padding without labels, and cu_seqlens padded by repeating T, change nothing else."""
    num_tokens, num_filled = sum(LENGTHS), 7
    total = num_tokens + num_filled
    ends = torch.tensor([total] * 10, dtype=torch.int32)
    fixed = {
        "input_ids": F.pad(pack["input_ids"], (0, num_filled)),
        "position_ids": torch.cat((pack["position_ids"], torch.arange(num_filled)[None]), dim=1),
        "labels": F.pad(pack["labels"], (0, num_filled), value=-100),
        "cu_seqlens": torch.cat((pack["cu_seqlens"], ends)),
        "max_seqlen": MAX_SEQ_LEN,
    }
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours, fixed)[:num_tokens], logits(ours, pack), rtol=0, atol=1e-5
        )
    expected = ours(**pack).loss
    for extra in ({}, {"num_loss_tokens": sum(LENGTHS) - len(LENGTHS)}):
        loss = ours(**fixed, **extra).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert_same_gradients(gradients(ours, loss), gradients(ours, ours(**pack).loss), rel=1e-5)


def test_known_count_changes_nothing(ours, pack):
    count = (pack["labels"] != -100).sum().item()
    unknown, known = ours(**pack).loss, ours(**pack, num_loss_tokens=count).loss
    assert torch.equal(unknown, known)


@pytest.mark.parametrize("num_loss_tokens", [None, 0])
@pytest.mark.parametrize("num_tokens", [sum(LENGTHS), 1])
def test_no_label_at_all(num_tokens, num_loss_tokens, ours, pack, make_documents, make_pack):
    """Trap 6: the loss is 0, not NaN. Every parameter gets a gradient, so no rank waits for
    another. One token is the empty pack that completes a last batch."""
    if num_tokens == 1:
        pack = make_pack(make_documents([1]), max_seqlen=MAX_SEQ_LEN)
    pack["labels"] = torch.full_like(pack["labels"], -100)
    out = ours(**pack, num_loss_tokens=num_loss_tokens)
    assert out.loss.item() == 0.0
    for name, gradient in gradients(ours, out.loss).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name
    with torch.no_grad():
        evaluated = ours.eval()(**pack)
    assert evaluated.loss.item() == 0.0
    assert evaluated.num_correct.item() == evaluated.num_loss_tokens.item() == 0


def test_no_label_in_a_padded_batch(ours, make_documents, make_padded):
    padded = make_padded(make_documents(LENGTHS))
    padded["labels"] = torch.full_like(padded["labels"], -100)
    loss = ours(**padded).loss
    assert loss.item() == 0.0
    for name, gradient in gradients(ours, loss).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_training_computes_no_logits(ours, pack):
    out = ours(**pack)
    assert out.logits is None
    assert out.num_correct is None


@pytest.mark.parametrize("evaluate", [False, True])
def test_logits_of_all_positions_never_exist(
    evaluate, tiny_config, make_pair, make_documents, make_pack, largest_tensor, monkeypatch
):
    """Traps 19 and 33, in the model: the head runs only at labelled positions, in chunks."""
    chunk, num_tokens = 16, 256
    vocabulary = 4000
    ours, _ = make_pair(tiny_config(vocab_size=vocabulary))
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk * vocabulary)
    batch = make_pack(make_documents([num_tokens // 2] * 2), prompt=100)
    rows = []
    head = "evaluate_linear_head" if evaluate else "linear_cross_entropy"
    run_head = getattr(smollm2, head)

    def recorded(hidden, *args, **kwargs):
        rows.append(hidden.shape[0])
        return run_head(hidden, *args, **kwargs)

    monkeypatch.setattr(smollm2, head, recorded)
    with torch.set_grad_enabled(not evaluate), largest_tensor:
        loss = ours.train(not evaluate)(**batch).loss
        if not evaluate:
            loss.backward()
    assert rows == [(batch["labels"] != -100).sum().item()]
    # The embedding's gradient must be [V, D].
    assert largest_tensor.numel <= vocabulary * max(chunk, ours.config.hidden_size)
    assert largest_tensor.numel < vocabulary * num_tokens / 3


def test_evaluation_is_that_of_logits(ours, make_documents, make_pack):
    """Loss and accuracy equal those from logits, without making logits."""
    pack = make_pack(make_documents(LENGTHS), prompt=2)
    ours.eval()
    with torch.no_grad():
        predictions = logits(ours, pack)[:-1]
        # Make the model right at some positions, because its predictions are random.
        labels = pack["labels"][0, 1:]
        right = (labels != -100) & (torch.arange(len(labels)) % 3 == 0)
        labels[right] = predictions.argmax(-1)[right]
        out = ours(**pack)
    has_label = labels != -100
    expected = F.cross_entropy(predictions[has_label], labels[has_label])
    assert out.logits is None
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.num_loss_tokens.item() == has_label.sum().item()
    num_correct = (predictions.argmax(-1) == labels)[has_label].sum().item()
    assert out.num_correct.item() == num_correct >= right.sum().item() > 0


def test_evaluation_with_gradients_is_the_training_loss(ours, pack):
    """The loss has gradients in eval mode too, as some analyses need."""
    expected = gradients(ours, ours(**pack).loss)
    assert_same_gradients(gradients(ours, ours.eval()(**pack).loss), expected, rel=0)


def test_autocast_reaches_the_kernel_in_one_dtype(ours, pack, monkeypatch):
    """Trap 22: rotation is in fp32, as in transformers, but q and k must not stay in fp32."""
    seen = {"apply_rotary": set(), "varlen_attention": set(), "scaled_dot_product_attention": set()}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            seen[name].add(tuple(x.dtype for x in args[:3]))
            return function(*args, **kwargs)

        return lambda patch: patch.setattr(module, name, recorded)

    record(decoder, "apply_rotary")(monkeypatch)
    record(smollm2, "varlen_attention")(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        ours(**pack).loss.backward()
        ours(pack["input_ids"])
        with monkeypatch.context() as patch:
            record(F, "scaled_dot_product_attention")(patch)
            ours(pack["input_ids"], use_cache=True)
    half = (torch.bfloat16,) * 3
    assert seen == {
        "apply_rotary": {(torch.bfloat16, torch.float32, torch.float32)},
        "varlen_attention": {half},
        "scaled_dot_product_attention": {half},
    }
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing(autocast, use_reentrant, ours, pack, monkeypatch):
    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(**pack).loss

    expected_loss = loss()
    expected = gradients(ours, expected_loss)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    for layer in ours.model.layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    checkpointed = loss()
    assert torch.equal(checkpointed, expected_loss)
    assert_same_gradients(gradients(ours, checkpointed), expected, rel=0)
    assert len(calls) == 2 * len(ours.model.layers), "every layer runs forward again"


def test_chosen_implementations_are_used(ours, pack, monkeypatch):
    """The Composer model sets both as attributes; a backend that cannot run raises."""
    ours.attention_backend = "flash_attn"
    for batch in (pack, {"input_ids": pack["input_ids"]}):
        with pytest.raises(ValueError, match="'flash_attn' needs a GPU"):
            ours(**batch)
    ours.attention_backend = "auto"
    ours.loss_implementation = "liger"
    chosen = []

    def recorded(hidden, weight, target, *, implementation):
        chosen.append(implementation)
        return hidden.sum()

    monkeypatch.setattr(smollm2, "linear_cross_entropy", recorded)
    ours(**pack)
    assert chosen == ["liger"]


LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    "init_lora_weights": False,  # random, so that the adapter does something
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def adapted_pair(make_pair):
    torch.manual_seed(0)
    ours, theirs = (get_peft_model(model, LoraConfig(**LORA)) for model in make_pair())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_packed_through_peft(adapted_pair, make_documents, make_pack, make_padded):
    """Trap 2 again: peft stands between the trainer and the model."""
    ours, theirs = adapted_pair
    documents = make_documents(LENGTHS)
    our_loss = ours(**make_pack(documents)).loss
    their_loss = theirs(**make_padded(documents)).loss
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    our_gradients = gradients(ours, our_loss)
    assert our_gradients and all("lora" in name for name in our_gradients)
    assert_same_gradients(our_gradients, gradients(theirs, their_loss), rel=1e-5)
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


def test_gradient_checkpointing_through_peft(adapted_pair, pack):
    """The embedding is frozen, so no input of the first layer needs a gradient."""
    ours, _ = adapted_pair
    expected = gradients(ours, ours(**pack).loss)
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(ours, ours(**pack).loss), expected, rel=0)


def test_wrapped_head_is_refused(make_pair, pack):
    """The loss uses the head's weight, and would ignore an adapter around it."""
    ours, _ = make_pair()
    adapted = get_peft_model(ours, LoraConfig(**LORA | {"target_modules": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"lm_head .*target_modules"):
        adapted(**pack)
