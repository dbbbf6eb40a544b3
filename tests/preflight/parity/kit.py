"""Small pairs of models, and a fault to plant in one."""

from transformers import LlamaConfig

from foundry_ext.preflight.parity import models
from foundry_ext.preflight.parity.parity import compare


def random_pair(head_dim=8):
    config = LlamaConfig(
        hidden_size=9 * head_dim,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=131,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    return models.random_pair(config)


def run(pair, dtypes=("fp32",), backends=("sdpa",), num_tokens=24):
    return compare(pair, model="tiny", dtypes=dtypes, backends=backends, num_tokens=num_tokens)


def scaled(_module, _args, output):
    return output * 1.01
