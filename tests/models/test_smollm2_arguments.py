"""Wrong or contradictory batches are refused."""

import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM


@pytest.fixture
def ours(make_pair):
    return make_pair()[0]


@pytest.fixture
def pack(make_documents, make_pack):
    """cu_seqlens 0 5 6 22 25."""
    return make_pack(make_documents([5, 1, 16, 3]), max_seqlen=16)


def test_every_argument_is_named():
    """Trap 2: Composer passes what the signature names; **kwargs would swallow the rest."""
    parameters = inspect.signature(SmolLM2ForCausalLM.forward).parameters
    assert {"input_ids", "position_ids", "labels", "cu_seqlens", "max_seqlen"} <= parameters.keys()
    assert "num_loss_tokens" in parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_unknown_argument(ours, pack):
    with pytest.raises(TypeError, match="sequence_id"):
        ours(**pack, sequence_id=pack["position_ids"])


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "message"),
    [
        ([0, 5, 6], 16, "25.*split_batch"),  # trap 1: cut, with input_ids left complete
        ([0, 5, 6, 22, 26], 16, "25.*split_batch"),
        ([1, 5, 6, 22, 25], 16, "25.*split_batch"),
        ([0, 6, 5, 22, 25], 16, "25.*split_batch"),
        ([0, 5, 6, 22, 25], 15, "max_seqlen: 15 .*16"),
        ([25], 25, r"cu_seqlens is \[1\]"),
        ([[0, 25]], 25, r"cu_seqlens is \[1, 2\]"),
    ],
)
def test_wrong_cu_seqlens(cu_seqlens, max_seqlen, message, ours, pack):
    pack["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    pack["max_seqlen"] = max_seqlen
    with pytest.raises(ValueError, match=message):
        ours(**pack)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "succeeds"),
    [([0, 2, 5, 5], 3, True), ([0, 2, 4], 3, False), ([0, 2, 5], 2, False)],
)
def test_wrong_cu_seqlens_on_a_gpu(cu_seqlens, max_seqlen, succeeds):
    """The device checks without the host waiting. A failed check ends its process, so each check
    runs in a separate one."""
    code = f"""
import torch
from foundry_ext.models.checks import check_packed
cu_seqlens = torch.tensor({cu_seqlens}, dtype=torch.int32, device="cuda")
check_packed(torch.zeros(1, 5, 8), torch.zeros(1, 5), cu_seqlens, {max_seqlen})
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert succeeds or "assert" in done.stderr


WRONG_IDS = {
    "the vocabulary's size": ("input_ids", 3, 131, "input_ids: 131 at position 3"),
    "negative": ("input_ids", 24, -1, "input_ids: -1 at position 24"),
    "ignored": ("input_ids", 0, -100, "input_ids: -100 at position 0"),
    "label beyond": ("labels", 7, 10**6, "labels: 1000000 at position 7"),
    "label below": ("labels", 7, -101, "labels: -101 at position 7"),
    "label of -1": ("labels", 7, -1, "labels: -1 at position 7"),
}


@pytest.mark.parametrize("way", ["packed", "padded", "evaluation", "scores", "cached"])
@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_outside_the_vocabulary(name, way, ours, pack):
    """In every mode the error is the model's, not a kernel's."""
    key, place, value, message = WRONG_IDS[name]
    pack[key][0, place] = value
    ours.train(way == "packed")
    if way == "cached":
        if key == "labels":
            pytest.skip("a cache takes no labels")
        run = partial(ours, pack["input_ids"], use_cache=True)
    elif way == "padded":
        run = partial(ours, pack["input_ids"], labels=pack["labels"])
    elif way == "scores":
        run = partial(ours.states_at_labels, **pack)
    else:
        run = partial(ours, **pack)
    with torch.no_grad(), pytest.raises(ValueError, match=message + ".* vocabulary of 131"):
        run()


def test_the_last_id_of_the_vocabulary(ours, pack):
    pack["input_ids"][0, 3] = pack["labels"][0, 7] = 130
    assert ours(**pack).loss.isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("ids", "labels", "succeeds"),
    [([0, 9], [-100, 9], True), ([0, 10], [-100, 9], False), ([0, 9], [-1, 9], False)],
)
def test_wrong_ids_on_a_gpu(ids, labels, succeeds):
    code = f"""
import torch
from foundry_ext.models.checks import check_ids
ids, labels = torch.tensor({ids}).cuda(), torch.tensor({labels}).cuda()  # which waits
torch.cuda.set_sync_debug_mode("error")
check_ids(ids, labels, 10)
torch.cuda.set_sync_debug_mode("default")
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert succeeds or "assert" in done.stderr


def test_default_split_of_a_batch_is_refused(ours, pack):
    """Trap 1, as Composer's default does it: every tensor in two along its first dimension."""
    halves = {key: x.chunk(2)[0] if isinstance(x, torch.Tensor) else x for key, x in pack.items()}
    assert halves["input_ids"].shape == pack["input_ids"].shape
    with pytest.raises(ValueError, match="split_batch"):
        ours(**halves)


CONTRADICTIONS = {
    "mask": ({"attention_mask": torch.ones(1, 25)}, "no attention_mask"),
    "cache": ({"use_cache": True}, "no cache"),
    "logits_to_keep": ({"logits_to_keep": 1}, "no logits_to_keep"),
    "no positions": ({"position_ids": None}, "needs position_ids and max_seqlen"),
    "no max_seqlen": ({"max_seqlen": None}, "needs position_ids and max_seqlen"),
    "flat positions": ({"position_ids": torch.arange(25)}, r"position_ids is \[25\]"),
    "short positions": ({"position_ids": torch.zeros(1, 1).long()}, r"position_ids is \[1, 1\]"),
    "batch": ({"input_ids": torch.zeros(5, 5).long()}, r"\[1, T\], not \[5, 5\]"),
    "no input": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "two inputs": ({"inputs_embeds": torch.zeros(1, 25, 72)}, "either input_ids or inputs_embeds"),
    "attentions": ({"output_attentions": True}, "AutoModelForCausalLM"),
    "hidden states": ({"output_hidden_states": True}, "AutoModelForCausalLM"),
    "tuple": ({"return_dict": False}, "return_dict=False"),
    # Without cu_seqlens the pack would count as one long document.
    "no cu_seqlens": ({"cu_seqlens": None}, "cu_seqlens is missing"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictory_arguments(name, ours, pack):
    change, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        ours(**(pack | change))


def test_lost_cu_seqlens(ours, pack):
    del pack["cu_seqlens"], pack["max_seqlen"]
    with pytest.raises(ValueError, match="cu_seqlens is missing"):
        ours(**pack, num_loss_tokens=21)


def test_labels_with_a_cache(ours, pack):
    with pytest.raises(ValueError, match="use_cache=False"):
        ours(pack["input_ids"], labels=pack["labels"], use_cache=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_unsupported_configuration(change, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        SmolLM2ForCausalLM(tiny_config(**change))
