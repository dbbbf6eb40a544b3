"""SmolLM2 (Llama's architecture) on documents laid end to end, without padding.

T tokens, D documents, V vocabulary, B sequences of S slots where a batch comes padded.
Parameters are named as in the hub's checkpoints, so that those load strictly and what is saved here
loads in stock `AutoModelForCausalLM`. Compared with transformers' LlamaForCausalLM layer by layer
in tests/models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama import LlamaConfig

from foundry_ext.models.attention import varlen_attention
from foundry_ext.models.checks import check_ids, check_packed
from foundry_ext.models.loss import (
    evaluate_linear_head,
    labelled_positions,
    linear_cross_entropy,
)
from foundry_ext.models.padding import Padded
from foundry_ext.models.rope import apply_rotary, rotary_cos_sin
from foundry_ext.utils.errors import UserError

# (q [..., H, N], k [..., K, N], v [..., K, N]) -> [..., H, N]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class PackedCausalLMOutput(CausalLMOutputWithPast):
    """What `forward` returns.

    `loss`: mean nats over labelled positions. `logits`: [1, T, V] or [B, S, V], absent where only a
    loss was asked for. `num_correct`, `num_loss_tokens`: int64 scalars, in packed evaluation only.
    """

    num_correct: Tensor | None = None
    num_loss_tokens: Tensor | None = None


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) with a learned scale."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; `attend` decides who sees whom."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        width, kv_width = (
            heads * self.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(hidden, width, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Autocast keeps the residual stream, hence cos and sin, in fp32 and would leave q and k
        # there with v in bf16, which kernels refuse or upcast: rotate in fp32, then to v's dtype.
        q, k = (apply_rotary(heads, cos, sin).to(v.dtype) for heads in (q, k))
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SmolLM2DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.compiled: DecoderLayer | None = None
        """Takes the place of `decoder_layer` in training; see models/compiled.py."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        # Evaluation's shapes differ from batch to batch, and each would be compiled.
        run = self.compiled if self.compiled is not None and self.training else decoder_layer
        return run(self, x, cos, sin, attend)


DecoderLayer = Callable[[SmolLM2DecoderLayer, Tensor, Tensor, Tensor, Attend], Tensor]


def decoder_layer(
    layer: SmolLM2DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
) -> Tensor:
    """What a layer computes, apart from the module and so from the hooks that FSDP hangs on it."""
    x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, attend)
    return x + layer.mlp(layer.post_attention_layernorm(x))


class SmolLM2PreTrainedModel(PreTrainedModel):
    config_class = LlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SmolLM2DecoderLayer"]  # noqa: RUF012 - transformers reads a list
    _supports_cache_class = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # Complete, so that meta-device initialisation, which calls it for every module, leaves
        # nothing to a match by class name.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class SmolLM2Model(SmolLM2PreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        _check_config(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SmolLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.compiled: Layers | None = None
        """Takes the place of `run_layers` in training; see models/compiled.py."""
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self, hidden: Tensor, position_ids: Tensor, attend_in: Callable[[int], Attend]
    ) -> Tensor:
        """Runs the layers on embedded tokens; the final norm is left to the caller, who may need it
        at a few positions only.

        Args:
            hidden: [..., D]; position_ids: [...].
            attend_in: a layer's number -> the kernel, bound to its documents. The layers do not
                know their numbers, or one of them, compiled, would not do for the others.
        """
        run = self.compiled if self.compiled is not None and self.training else run_layers
        return run(self, hidden, position_ids, attend_in)


Layers = Callable[[SmolLM2Model, Tensor, Tensor, Callable[[int], Attend]], Tensor]


def run_layers(
    model: SmolLM2Model,
    hidden: Tensor,
    position_ids: Tensor,
    attend_in: Callable[[int], Attend],
) -> Tensor:
    cos, sin = rotary_cos_sin(
        position_ids,
        head_dim=model.config.head_dim,
        theta=model.config.rope_theta,
        dtype=hidden.dtype,
    )
    for number, layer in enumerate(model.layers):
        attend = attend_in(number)
        if model.gradient_checkpointing and model.training:
            hidden = model._gradient_checkpointing_func(layer.__call__, hidden, cos, sin, attend)
        else:
            hidden = layer(hidden, cos, sin, attend)
    return hidden


def _check_config(config: LlamaConfig) -> None:
    """Refuses what a Llama configuration can say and this model would silently not do."""
    unsupported = {
        "hidden_act": config.hidden_act != "silu",
        "rope_scaling": bool(config.rope_scaling),
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise UserError(
                f"config: {key}={getattr(config, key)!r} is not supported by smollm2_packed;"
                " use hf_causal_lm for it"
            )
    if not 0 <= config.attention_dropout < 1:
        raise UserError(
            f"config: attention_dropout={config.attention_dropout!r}; give a probability from 0 to"
            " below 1"
        )


class SmolLM2ForCausalLM(SmolLM2PreTrainedModel, GenerationMixin):
    """SmolLM2 with its language-modelling head, tied to the embedding where the config says so.

    `attention_backend` and `loss_implementation` are plain attributes, set by the trainer's
    wrapper; they are no part of the configuration, which stays exactly a Llama's.
    """

    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = SmolLM2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.attention_backend = "auto"
        self.loss_implementation = "chunked"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> SmolLM2Model:
        return self.model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers, but the configuration says LlamaForCausalLM, so any tool loads it."""
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
        """Packed, padded or cached, by what is given.

        - Packed (`cu_seqlens` given): `input_ids`, `position_ids`, `labels` are [1, T],
          `cu_seqlens` is [D+1] int32, `max_seqlen` an int no document exceeds. With labels: the
          mean loss over labelled positions and no logits; without: logits [1, T, V].
        - Padded [B, S] with `attention_mask` [B, S] of ones and zeros, padded left or right: the
          padding is removed at the embedding and put back at the end, where its logits are zero.
          With labels: the loss, and outside training the logits too.
        - Cached (`use_cache` or `past_key_values`): padded attention over the cache, for
          `generate`.

        Labels are unshifted, -100 where there is no loss. `num_loss_tokens`, where known, spares a
        device synchronisation. `inputs_embeds` takes the place of `input_ids`.

        Raises:
            UserError: contradictory or unsupported arguments.
        """
        if output_attentions or output_hidden_states:
            raise ValueError(
                "output_attentions and output_hidden_states are not available in smollm2_packed;"
                " load the checkpoint with AutoModelForCausalLM to look inside"
            )
        if return_dict is False:
            raise ValueError("return_dict=False is not available in smollm2_packed; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        check_ids(input_ids, labels, self.config.vocab_size)
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cu_seqlens is not None:
            if attention_mask is not None or past_key_values is not None or use_cache:
                raise ValueError(
                    "a packed batch (cu_seqlens) takes no attention_mask and no cache:"
                    " cu_seqlens alone says which tokens see each other"
                )
            if logits_to_keep:
                raise ValueError("a packed batch (cu_seqlens) gives all logits or none")
            return self._forward_packed(
                hidden, position_ids, cu_seqlens, max_seqlen, labels, num_loss_tokens
            )
        if max_seqlen is not None or num_loss_tokens is not None:
            raise ValueError(
                "max_seqlen and num_loss_tokens belong to a packed batch: its cu_seqlens is missing"
            )
        if past_key_values is not None or use_cache:
            if labels is not None:
                raise ValueError("labels cannot be used with a cache; set use_cache=False")
            return self._forward_cached(
                hidden,
                attention_mask,
                position_ids,
                past_key_values,
                cache_position,
                logits_to_keep,
            )
        return self._forward_padded(hidden, attention_mask, position_ids, labels, logits_to_keep)

    def _run_packed(
        self, hidden: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """[T, D] embedded tokens -> [T, D] before the final norm."""
        dropout_p = self.config.attention_dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attention(
                q,
                k,
                v,
                cu_seqlens,
                max_seqlen,
                backend=self.attention_backend,
                dropout_p=dropout_p,
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
            raise ValueError("a packed batch (cu_seqlens) needs position_ids and max_seqlen too")
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
        """What a packed batch's labels are predicted from, for scores of every position.

        Arguments as in a packed `forward`.

        Returns:
            (states [L, D] as the head takes them, targets [L], positions [L]): the state at
            position p predicts the token at p + 1.
        """
        check_ids(input_ids, labels, self.config.vocab_size)
        hidden = self.model.embed_tokens(input_ids)
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
            # By item: a ModelOutput made without logits would have the attribute and not the key.
            output["logits"] = logits
        return output

    def _forward_cached(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
        logits_to_keep: int,
    ) -> PackedCausalLMOutput:
        """Prefill and decoding: [B, S] new slots over `past` cached ones, by a dense mask.

        One cu_seqlens cannot describe one query over many cached keys, and generation is not what
        training speed hangs on, so this path is the plain one.
        """
        cache = DynamicCache() if cache is None else cache
        batch, seq_len = hidden.shape[:2]
        past = cache.get_seq_length() if cache_position is None else int(cache_position[0])
        if attention_mask is None:
            attention_mask = torch.ones(
                batch, past + seq_len, dtype=torch.long, device=hidden.device
            )
        is_token = attention_mask.bool()
        if position_ids is None:
            position_ids = (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        query = torch.arange(past, past + seq_len, device=hidden.device)[:, None]
        causal = query >= torch.arange(past + seq_len, device=hidden.device)
        mask = (causal & is_token[:, None])[:, None]  # [B, 1, S, past + S]
        # A row of padding sees nothing; let it see itself, for a softmax over nothing is NaN.
        mask = mask | (query == torch.arange(past + seq_len, device=hidden.device))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)

        hidden = self.model(hidden, position_ids, lambda layer: partial(attend, layer))
        hidden = hidden[:, -logits_to_keep:]
        return PackedCausalLMOutput(
            logits=cast(torch.FloatTensor, self._logits(hidden)),
            past_key_values=cache,  # pyright: ignore[reportArgumentType]
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden))

    @property
    def head_weight(self) -> Tensor:
        """[V, D], for the loss, which does not call the module: a plain one, then."""
        if type(self.lm_head) is not nn.Linear:
            raise UserError(
                f"lm_head is wrapped in {type(self.lm_head).__name__}, whose change the loss would"
                " not see; take lm_head out of peft_config's target_modules"
            )
        return self.lm_head.weight

    def _loss(
        self, hidden: Tensor, labels: Tensor, num_loss_tokens: int | None
    ) -> PackedCausalLMOutput:
        """[T, D] before the final norm, [T] labels -> mean loss; in evaluation the counts as well.

        A microbatch without a label has loss 0, not NaN: 0 x NaN would poison the gradient.
        """
        positions, targets = labelled_positions(labels, num_loss_tokens)
        hidden = self.model.norm(hidden[positions])
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
