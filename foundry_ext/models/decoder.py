"""SmolLM2's decoder (Llama's architecture): embedding, decoder layers and final norm.

D hidden size, H query heads, K key/value heads, N head dimension. The layers work on tokens of any
leading shape [..., D] and leave it to an `Attend` function which tokens see each other.
Parameters are named as in the hub's checkpoints.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama import LlamaConfig

from foundry_ext.models.rope import apply_rotary, rotary_cos_sin
from foundry_ext.utils.errors import UserError

# (q [..., H, N], k [..., K, N], v [..., K, N]) -> [..., H, N]; decides which tokens see each other.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square and scale (arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Rotate queries and keys by their positions."""
    # Autocast keeps the residual stream, and so cos and sin, in fp32. Rotated q and k would stay in
    # fp32 while v is bf16, which kernels refuse or upcast: cast them to v's dtype.
    return [apply_rotary(heads, cos, sin).to(dtype) for heads in (q, k)]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return the gated linear unit's product (arXiv 2002.05202)."""
    return F.silu(gate) * up


class Pieces(NamedTuple):
    """A layer's functions besides products and attention; models/compiled.py has another set."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], list[Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]


PLAIN = Pieces(rms_norm, rotate, swiglu)
LEAST_FUSED = 1024
"""Tokens of a pass from which other pieces pay. Below, a GPU waits for the host, which they cost
more than they save; in generation there are only a few tokens."""


def can_fuse(hidden: Tensor) -> bool:
    """Return whether a pass may use other pieces: a pack's on a GPU, without gradients."""
    is_pack = hidden.ndim == 2 and hidden.shape[0] >= LEAST_FUSED
    return is_pack and hidden.is_cuda and not torch.is_grad_enabled()


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) with a learned scale."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor, pieces: Pieces = PLAIN) -> Tensor:
        return pieces.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

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

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, pieces: Pieces = PLAIN
    ) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = pieces.rotate(q, k, cos, sin, v.dtype)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor, pieces: Pieces = PLAIN) -> Tensor:
        return self.down_proj(pieces.swiglu(self.gate_proj(x), self.up_proj(x)))


class SmolLM2DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.compiled: DecoderLayer | None = None
        """Replacement of `decoder_layer` in training, set by models/compiled.py."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, pieces: Pieces = PLAIN
    ) -> Tensor:
        # Shapes differ between evaluation batches, and a whole layer would be compiled for each.
        if self.compiled is not None and self.training:
            return self.compiled(self, x, cos, sin, attend)
        return decoder_layer(self, x, cos, sin, attend, pieces)


DecoderLayer = Callable[[SmolLM2DecoderLayer, Tensor, Tensor, Tensor, Attend], Tensor]


def decoder_layer(
    layer: SmolLM2DecoderLayer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    pieces: Pieces = PLAIN,
) -> Tensor:
    """Compute a decoder layer.

    This is a function, not a method, so compiling it leaves out the hooks that FSDP puts on the
    module.
    """
    normed = layer.input_layernorm(x, pieces)
    x = _add(x, layer.self_attn(normed, cos, sin, attend, pieces))
    return _add(x, layer.mlp(layer.post_attention_layernorm(x, pieces), pieces))


def _add(x: Tensor, change: Tensor) -> Tensor:
    """Add a change to the residual stream, which autocast keeps in fp32."""
    # Inductor fuses a sum and the product before it into one addmm without looking at their dtypes
    # (pytorch#159492, torch 2.7), and addmm takes no two. The cast stands between them.
    return x + (change.to(x.dtype) if torch.compiler.is_compiling() else change)


class SmolLM2PreTrainedModel(PreTrainedModel):
    """Settings of SmolLM2 that transformers reads from the class."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SmolLM2DecoderLayer"]  # noqa: RUF012 - transformers reads a list
    _supports_cache_class = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # Covers every kind of module, because meta-device initialisation calls it for each and
        # would otherwise recognise norms only by their class name.
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
        """Replacement of `run_layers` in training, set by models/compiled.py."""
        self.evaluation_pieces = PLAIN
        """Pieces of passes that `can_fuse`, set by models/compiled.py."""
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self, hidden: Tensor, position_ids: Tensor, attend_in: Callable[[int], Attend]
    ) -> Tensor:
        """Run the layers on embedded tokens.

        The final norm is left to the caller, who may need it only at a few positions.

        Args:
            hidden: [..., D].
            position_ids: [...].
            attend_in: a function from a layer's index to its `Attend`. Layers do not hold their
                index, because then a compiled layer could not serve the others.
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
    """Run all layers; arguments are those of `SmolLM2Model.forward`."""
    cos, sin = rotary_cos_sin(
        position_ids,
        head_dim=model.config.head_dim,
        theta=model.config.rope_theta,
        dtype=hidden.dtype,
    )
    pieces = model.evaluation_pieces if can_fuse(hidden) else PLAIN
    for index, layer in enumerate(model.layers):
        attend = attend_in(index)
        if model.gradient_checkpointing and model.training:
            hidden = model._gradient_checkpointing_func(layer.__call__, hidden, cos, sin, attend)
        else:
            hidden = layer(hidden, cos, sin, attend, pieces)
    return hidden


def _check_config(config: LlamaConfig) -> None:
    """Check for settings of a Llama configuration that this model would silently ignore.

    Raises:
        UserError: there is one.
    """
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
            f"config: attention_dropout={config.attention_dropout!r} must be a probability, from 0"
            " to below 1"
        )
