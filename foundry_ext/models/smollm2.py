"""SmolLM2 (Llama's architecture) on documents laid end to end, without padding.

T tokens, D documents, V vocabulary; a padded batch has B sequences of S positions. Parameters are
named as in the hub's checkpoints, so these load strictly, and saved models load in stock
`AutoModelForCausalLM`. tests/models compares with transformers' LlamaForCausalLM layer by layer.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import LlamaConfig

from foundry_ext.models.attention import varlen_attention
from foundry_ext.models.cached import run_cached
from foundry_ext.models.checks import check_ids, check_packed
from foundry_ext.models.decoder import SmolLM2Model, SmolLM2PreTrainedModel
from foundry_ext.models.loss import evaluate_linear_head, labelled_positions, linear_cross_entropy
from foundry_ext.models.padding import Padded
from foundry_ext.utils.errors import UserError


@dataclass
class PackedCausalLMOutput(CausalLMOutputWithPast):
    """Output of `forward`.

    `loss`: mean nats over labelled positions. `logits`: [1, T, V] or [B, S, V], absent if only the
    loss was computed. `num_correct`, `num_loss_tokens`: int64 scalars, in packed evaluation only.
    """

    num_correct: Tensor | None = None
    num_loss_tokens: Tensor | None = None


class SmolLM2ForCausalLM(SmolLM2PreTrainedModel, GenerationMixin):
    """SmolLM2 with its language-modelling head, tied to the embedding if the config says so.

    It takes three kinds of batches:

    - Packed (`cu_seqlens` given): `input_ids`, `position_ids` and `labels` are [1, T], `cu_seqlens`
      is [D+1] int32, and `max_seqlen` an int that no document exceeds. With labels the result is
      the mean loss over labelled positions, without them logits [1, T, V].
    - Padded [B, S], left or right, with `attention_mask` [B, S] of ones and zeros: padding is
      removed after the embedding and put back at the end, where its logits are zero. With labels
      the result is the loss, and outside training also the logits.
    - Cached (`use_cache` or `past_key_values`): attention over the cache, for `generate`.

    `attention_backend` and `loss_implementation` are plain attributes, set by the Composer model.
    They are not part of the configuration, which stays exactly Llama's.
    """

    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = SmolLM2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.attention_backend = "auto"
        self.loss_implementation = "chunked"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> SmolLM2Model:
        return self.model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save as LlamaForCausalLM, so that any tool can load the checkpoint."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = ["LlamaForCausalLM"]
            self.config.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_loss_tokens: int | None = None,
        logits_to_keep: int = 0,
    ) -> PackedCausalLMOutput:
        """Run a packed, padded or cached batch, see the class, depending on the arguments.

        Labels are unshifted, -100 without loss. `num_loss_tokens`, if known, avoids a device
        synchronisation. `inputs_embeds` replaces `input_ids`. Every argument is named, because
        Composer passes only arguments that the signature names, and `**kwargs` would swallow
        unknown ones.

        Raises:
            ValueError: arguments are contradictory or not supported.
        """
        if output_attentions or output_hidden_states or return_dict is False:
            raise ValueError(
                "output_attentions, output_hidden_states and return_dict=False are not supported by"
                " smollm2_packed; load the checkpoint with AutoModelForCausalLM to use them"
            )
        hidden = self._embed(input_ids, inputs_embeds, labels)
        is_cached = past_key_values is not None or use_cache
        if cu_seqlens is not None:
            if attention_mask is not None or is_cached or logits_to_keep:
                raise ValueError(
                    "a packed batch (cu_seqlens) takes no attention_mask, no cache and no"
                    " logits_to_keep: cu_seqlens alone decides which tokens see each other, and all"
                    " logits or none are returned; leave them out"
                )
            return self._forward_packed(
                hidden, position_ids, cu_seqlens, max_seqlen, labels, num_loss_tokens
            )
        if max_seqlen is not None or num_loss_tokens is not None:
            raise ValueError(
                "max_seqlen and num_loss_tokens need a packed batch, but cu_seqlens is missing"
            )
        if not is_cached:
            return self._forward_padded(
                hidden, attention_mask, position_ids, labels, logits_to_keep
            )
        if labels is not None:
            raise ValueError("labels cannot be used with a cache; set use_cache=False")
        cache = DynamicCache() if past_key_values is None else past_key_values
        hidden = run_cached(
            self.model, hidden, attention_mask, position_ids, cache, cache_position
        )[:, -logits_to_keep:]
        return PackedCausalLMOutput(
            logits=cast(torch.FloatTensor, self._logits(hidden)),
            past_key_values=cache,  # pyright: ignore[reportArgumentType]
        )

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        check_ids(input_ids, labels, self.config.vocab_size)
        return self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _run_packed(
        self, hidden: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Run the layers on embedded tokens: [T, D] -> [T, D] before the final norm."""
        backend = self.attention_backend
        dropout_p = self.config.attention_dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attention(
                q, k, v, cu_seqlens, max_seqlen, backend=backend, dropout_p=dropout_p
            )

        return self.model(hidden, position_ids, lambda _layer: attend)

    def _forward_packed(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        labels: Tensor | None,
        num_loss_tokens: int | None,
    ) -> PackedCausalLMOutput:
        if position_ids is None or max_seqlen is None:
            raise ValueError("a packed batch (cu_seqlens) needs position_ids and max_seqlen")
        check_packed(hidden, position_ids, cu_seqlens, max_seqlen)
        hidden = self._run_packed(hidden[0], position_ids[0], cu_seqlens, int(max_seqlen))
        if labels is None:
            logits = self._logits(hidden)[None]
            return PackedCausalLMOutput(logits=cast(torch.FloatTensor, logits))
        return self._loss(hidden, labels[0], num_loss_tokens)

    def states_at_labels(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        num_loss_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states that predict a packed batch's labels.

        Arguments are those of a packed `forward`.

        Returns:
            (states [L, D], the input of the head; targets [L]; positions [L]). The state at
            position p predicts the token at p + 1.
        """
        hidden = self._embed(input_ids, None, labels)
        check_packed(hidden, position_ids, cu_seqlens, max_seqlen)
        hidden = self._run_packed(hidden[0], position_ids[0], cu_seqlens, int(max_seqlen))
        positions, targets = labelled_positions(labels[0], num_loss_tokens)
        return self.model.norm(hidden[positions]), targets, positions

    def _forward_padded(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int,
    ) -> PackedCausalLMOutput:
        batch, seq_len = hidden.shape[:2]
        padded = Padded.from_mask(
            attention_mask, batch=batch, seq_len=seq_len, device=hidden.device
        )
        packed = self._run_packed(
            padded.unpad(hidden),
            padded.position_ids if position_ids is None else padded.unpad(position_ids),
            padded.cu_seqlens,
            padded.seq_len,
        )
        output = PackedCausalLMOutput()
        if labels is not None:
            output = self._loss(packed, padded.unpad_labels(labels), None)
        if labels is None or not self.training:
            logits = self._logits(padded.repad(packed)[:, -logits_to_keep:])
            # By item: setting the attribute of a ModelOutput made without logits adds no key.
            output["logits"] = logits
        return output

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden))

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head [V, D], for the loss, which does not call the module.

        Raises:
            UserError: the head is wrapped, as by an adapter, which the loss would ignore.
        """
        if type(self.lm_head) is not nn.Linear:
            raise UserError(
                f"lm_head is wrapped in {type(self.lm_head).__name__}, which the loss would ignore;"
                " remove lm_head from peft_config.target_modules"
            )
        return self.lm_head.weight

    def _loss(
        self, hidden: Tensor, labels: Tensor, num_loss_tokens: int | None
    ) -> PackedCausalLMOutput:
        """Return the mean loss, in evaluation with counts.

        Args:
            hidden: [T, D], before the final norm.
            labels: [T].
            num_loss_tokens: number of labels, or None to count them.
        """
        positions, targets = labelled_positions(labels, num_loss_tokens)
        hidden = self.model.norm(hidden[positions])
        # A microbatch without labels has loss 0, not NaN: weighted by 0, NaN stays NaN.
        weight, count = self.head_weight, max(targets.numel(), 1)
        if self.training or torch.is_grad_enabled():
            loss = linear_cross_entropy(
                hidden, weight, targets, implementation=self.loss_implementation
            )
            return PackedCausalLMOutput(loss=cast(torch.FloatTensor, loss / count))
        total = evaluate_linear_head(hidden, weight, targets)
        return PackedCausalLMOutput(
            loss=cast(torch.FloatTensor, total.loss / count),
            num_correct=total.num_correct,
            num_loss_tokens=torch.tensor(targets.numel(), device=hidden.device),
        )
