"""The converter, on a tiny GGUF that the test writes with the package gguf."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foundry_ext.utils.errors import UserError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    torch.manual_seed(0)
    vocabulary = len(SPECIAL) + len(bytes_to_unicode()) + 1
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rope_theta=1e5,
            rms_norm_eps=1e-5,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()


def by_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's order of rows, as its convert_hf_to_gguf.py makes it."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "gpt2") -> None:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model(kind)
    tokens = [*SPECIAL, *bytes_to_unicode().values(), "Ġa"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ a"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.model.state_dict().items():
        pieces = name.removesuffix(".weight").split(".")
        if pieces[0] == "layers":
            part = ".".join(pieces[2:])
            out = f"blk.{pieces[1]}.{parts[part]}.weight"
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            weight = by_pairs(weight, heads) if heads else weight
        else:
            out = f"{names[pieces[0]]}.weight"
        array = weight.numpy().astype(np.float32)
        if array.ndim == 2 and part_is_rounded(out):
            rounded = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(out, rounded, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(out, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def part_is_rounded(name: str) -> bool:
    return name.startswith("blk.1.ffn")


def test_the_model_is_the_files_and_the_tokenizer_round_trips(modules, theirs, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", theirs)
    modules["weights"].convert(tmp_path / "tiny.gguf", tmp_path / "hf")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    for name, weight in theirs.state_dict().items():
        found = ours.state_dict()[name]
        if "layers.1.mlp" in name:  # 16 levels between the least and the largest of 32 weights
            assert 0 < (found - weight).abs().max() < weight.abs().max() * 2 / 15
        else:
            assert torch.equal(found, weight), name
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 1e5 and config["tie_word_embeddings"] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    text = "a 12 é\n\t日本 "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("b a12")["input_ids"]) == ["b", "Ġa", "1", "2"]
    assert tokenizer("<|im_end|>")["input_ids"] == [2] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == 2 and tokenizer.bos_token_id == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_another_tokenizer_is_refused(modules, theirs, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", theirs, kind="llama")
    with pytest.raises(UserError, match="is not a llama with a gpt2 tokenizer"):
        modules["weights"].convert(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_another_file_is_not_converted(modules, tmp_path: Path, monkeypatch):
    weights = modules["weights"]
    monkeypatch.setattr(weights, "PACKAGES", tmp_path)
    path = tmp_path / weights.GGUF
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"SHA-256 .* is not"):
        weights.make_model(tmp_path / "hf")
