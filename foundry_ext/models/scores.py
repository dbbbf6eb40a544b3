"""Log-probabilities of labelled positions, and their KL divergence from the base model.

L labelled positions, D hidden size, V vocabulary, N documents of a pack. As in loss.py the head
runs over chunks of positions, so [L, V] never exists. Unlike the loss, every position keeps its own
score, which evaluation needs and training does not.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry_ext.models.loss import chunks
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM

# Opens a context in which the base model of a run can be used.
BaseModel = Callable[[], AbstractContextManager[SmolLM2ForCausalLM]]


class Scores(NamedTuple):
    """Scores of L labelled positions."""

    log_prob: Tensor
    """[L] fp32, nats."""
    is_correct: Tensor
    """[L] bool, whether the label is the argmax."""
    kl: Tensor | None
    """[L] fp32, KL(base || tuned) in nats; None without a base model."""


class DocumentScores(NamedTuple):
    """Scores of a pack's N documents, on the CPU."""

    log_prob: Tensor
    """[N] float64, sum over labelled tokens, nats."""
    num_tokens: Tensor
    """[N] int64, labelled tokens."""
    num_correct: Tensor
    """[N] int64, labelled tokens that are the argmax."""
    kl: Tensor | None
    """[N] float64, sum over labelled tokens, nats; None without a base model."""


class BaseStates:
    """The base model's states at the labels of packs, kept for the next measurement of the packs.

    The base model does not change in a run, so every pack is computed once. Its states are kept in
    their dtype, up to `limit` bytes; further packs are computed again each time. They are on the
    CPU, because a GPU's memory is training's, and copying them takes far less time than computing
    them.
    """

    limit = 2**30
    """Limit of the bytes that are kept."""

    def __init__(self, base: BaseModel):
        self.base = base
        self.itself: SmolLM2ForCausalLM | None = None
        """The base model, while it is measured against itself; its states are computed once."""
        self._kept: dict[bytes, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size of the states that are kept."""
        return sum(states.nbytes for states in self._kept.values())

    def forget(self) -> None:
        """Drop all states, because the base model has changed."""
        self._kept.clear()

    def of(
        self, pack: dict[str, Any], model: SmolLM2ForCausalLM, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (states [L, D], head's weight [V, D]) of the base model at a pack's labels.

        `model` is the one that is measured, and `states` [L, D] are its own.
        """
        key = _digest(pack)
        kept = self._kept.get(key)
        with self.base() as base_model:
            weight = base_model.head_weight
            if kept is not None:
                return kept.to(states.device), weight
            if model is not self.itself:
                states, _, _ = base_model.states_at_labels(**pack)
        if self.num_bytes + states.nbytes <= self.limit:
            self._kept[key] = states.cpu()
        return states, weight


def _digest(pack: dict[str, Any]) -> bytes:
    """Return a digest of a pack's content, so that states of other data are never used."""
    digest = hashlib.sha256()
    for name in ("input_ids", "position_ids", "labels", "cu_seqlens"):
        digest.update(pack[name].cpu().numpy().tobytes())
    return digest.digest()


@torch.no_grad()
def score_positions(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    base_states: Tensor | None = None,
    base_weight: Tensor | None = None,
) -> Scores:
    """Score each label under the linear head.

    The head runs in autocast's dtype if autocast is on, the softmax always in fp32.
    KL(base || tuned) is the sum over the vocabulary of p_base (log p_base - log p_tuned). It weighs
    most what the base model knew and the tuned model lost, and is exactly 0 for equal logits.

    Args:
        states: [L, D].
        weight: [V, D].
        targets: [L] int64.
        base_states: [L, D], the base model's at the same positions, or None.
        base_weight: [V, D], the base model's, or None.
    """
    num_rows = targets.shape[0]
    log_prob = torch.empty(num_rows, dtype=torch.float32, device=states.device)
    is_correct = torch.empty(num_rows, dtype=torch.bool, device=states.device)
    kl = None if base_states is None else torch.empty_like(log_prob)
    for rows in chunks(num_rows, weight):
        log_probs = _log_softmax(states[rows], weight)
        log_prob[rows] = log_probs.gather(1, targets[rows, None])[:, 0]
        is_correct[rows] = log_probs.argmax(-1) == targets[rows]
        if kl is not None:
            assert base_states is not None and base_weight is not None
            base = _log_softmax(base_states[rows], base_weight)
            kl[rows] = (base.exp() * (base - log_probs)).sum(-1)
    return Scores(log_prob, is_correct, kl)


def _log_softmax(states: Tensor, weight: Tensor) -> Tensor:
    return F.linear(states.to(weight.dtype), weight).float().log_softmax(-1)


@torch.no_grad()
def score_pack(
    model: SmolLM2ForCausalLM, *, base: BaseStates | None = None, **pack: Any
) -> DocumentScores:
    """Score the labels of a pack with the model, and sum by document.

    Args:
        model: the tuned model, in evaluation mode; the pack's tensors are on its device.
        base: the model before training, or None to skip KL.
        pack: arguments of `states_at_labels`; `cu_seqlens` is [N+1].
    """
    states, targets, positions = model.states_at_labels(**pack)
    base_states, base_weight = (None, None) if base is None else base.of(pack, model, states)
    scores = score_positions(
        states,
        model.head_weight,
        targets,
        base_states=base_states,
        base_weight=base_weight,
    )
    # Summed on the CPU, in the same order for every device, and in float64 for any length.
    ends = pack["cu_seqlens"][1:].cpu().long()
    document = torch.searchsorted(ends, positions.cpu(), right=True)

    def by_document(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        sums = torch.zeros(len(ends), dtype=dtype)
        return sums.index_add_(0, document, values.cpu().to(dtype))

    return DocumentScores(
        log_prob=by_document(scores.log_prob),
        num_tokens=by_document(torch.ones_like(targets), torch.int64),
        num_correct=by_document(scores.is_correct, torch.int64),
        kl=None if scores.kl is None else by_document(scores.kl),
    )
