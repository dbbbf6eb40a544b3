"""Packs through Composer's and peft's wrappers: inputs arrive, documents do not see each other."""

import pytest
import torch

from foundry_ext.models.decoder import SmolLM2DecoderLayer
from foundry_ext.packing.batch import join_packs
from foundry_ext.utils.constants import IGNORE_INDEX
from tests.training import kit

LENGTHS = (7, 1, 12, 3, 9)


@pytest.fixture(params=kit.METHODS)
def model(world, request):
    model = kit.build(world, method=request.param)
    kit.randomise_adapter(model)
    return model.eval()


def pack(lengths=LENGTHS, **settings):
    return kit.make_pack(kit.make_documents(lengths, **settings))


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


def test_every_key_of_a_pack_reaches_the_model(model, monkeypatch):
    """Composer's wrapper passes on only keys that `forward` names, and drops others silently.

    (Trap 2.)
    """
    seen = {}
    forward = model.inner_model.forward

    def look(**kwargs):
        seen.update(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(model.inner_model, "forward", look)
    batch = join_packs([pack(), pack(seed=1)])
    model(batch)
    for key in ("input_ids", "position_ids", "labels", "cu_seqlens"):
        assert torch.equal(seen[key], batch[key]), key
    assert seen["max_seqlen"] == batch["max_seqlen"]
    assert seen["num_loss_tokens"] == batch["num_loss_tokens"]
    assert seen.get("attention_mask") is None


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_no_document_sees_another(model, changed):
    """The logits of all other documents stay the same, bit for bit. (Trap 3.)"""
    batch = without(pack(), "labels")
    other = dict(batch, input_ids=batch["input_ids"].clone())
    start, end = batch["cu_seqlens"][changed : changed + 2].tolist()
    other["input_ids"][0, start:end] = (other["input_ids"][0, start:end] + 1) % kit.VOCABULARY
    with torch.no_grad():
        before, after = (model(b).logits[0] for b in (batch, other))
    assert (before[start:end] != after[start:end]).any(dim=-1).all()
    outside = torch.ones(len(before), dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(before[outside], after[outside])


def test_a_document_s_loss_moves_no_other_document(model):
    """The gradient of one document's loss with respect to the others' embeddings is zero."""
    model.train()
    batch = pack()
    start, end = batch["cu_seqlens"][2:4].tolist()
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[0, start:end] = batch["labels"][0, start:end]
    count = int((labels != IGNORE_INDEX).sum())
    hidden = model.inner_model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    settings = dict(without(batch, "input_ids"), labels=labels, num_loss_tokens=count)
    names = model.model_forward_args
    model.model(
        inputs_embeds=hidden, **{k: v for k, v in settings.items() if k in names}
    ).loss.backward()
    moved = (hidden.grad[0] != 0).any(dim=-1)
    assert moved[start : end - 1].all()
    moved[start:end] = False
    assert not moved.any()


def test_packed_logits_are_those_of_stock_models(world, model):
    """Logits equal those of transformers' LlamaForCausalLM, one document at a time."""
    theirs = kit.stock_model(world, model)
    batch = pack()
    with torch.no_grad():
        ours = model(without(batch, "labels")).logits[0]
        for ids, logits in zip(
            (ids for ids, _ in kit.documents_of([batch])),
            ours.split(list(LENGTHS)),
            strict=True,
        ):
            torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_generates_as_stock_models_do(world, model):
    """In-context generation tasks are padded left, with `mode: generate`."""
    theirs = kit.stock_model(world, model)
    batch = {
        "mode": "generate",
        "input_ids": torch.tensor([[0, 0, 0, 17, 5], [9, 8, 0, 4, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "labels": [["x"], ["y"]],
        "generation_kwargs": {"max_new_tokens": 6, "do_sample": False},
    }
    expected = theirs.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pad_token_id=model.tokenizer.pad_token_id,
        **batch["generation_kwargs"],
    )
    texts = model.tokenizer.batch_decode(expected[:, 5:], skip_special_tokens=True)
    assert [text.strip() for text in model.eval_forward(batch)] == [t.strip() for t in texts]
    assert model.labels == [["x"], ["y"]]


@pytest.mark.parametrize("method", ["full", "dora"])
def test_activation_checkpointing_changes_no_gradient(world, method):
    """It is set on the model because llm-foundry ignores fsdp_config on one GPU. (Trap 10.)"""
    calls = {}
    gradients = {}
    for checkpointing in (False, True):
        model = kit.build(world, method=method, activation_checkpointing=checkpointing).train()
        kit.randomise_adapter(model)
        calls[checkpointing] = 0

        def count(*_, key=checkpointing):
            calls[key] += 1

        for module in model.modules():
            if isinstance(module, SmolLM2DecoderLayer):
                module.register_forward_pre_hook(count)
        model(pack()).loss.backward()
        gradients[checkpointing] = kit.gradients(model.model)
    assert calls == {False: 2, True: 4}  # two layers, each computed again in the backward pass
    assert gradients[False].keys() == gradients[True].keys()
    for name, gradient in gradients[False].items():
        assert torch.equal(gradients[True][name], gradient), name
