"""What the `dataset` section of a loader's YAML may say, checked before any row is read."""

from typing import Any

from foundry_ext.data.tokenize import TokenizeSettings

_COMMON_KEYS = frozenset(
    (
        *("hf_name", "split", "hf_kwargs", "safe_load", "holdout", "max_seq_len", "overlong"),
        *("shuffle", "shuffle_seed", "pack_tokens", "eval_packs", "fixed_shape"),
    )
)
FINETUNING_KEYS = _COMMON_KEYS | {
    *("preprocessing_fn", "target_prompts", "target_responses", "decoder_only_format"),
    *("streams", "remote", "local", "download_retry", "download_timeout", "validate_hash"),
    *("keep_zip", "cache_limit", "token_encoding_type", "allow_unsafe_types"),
    # Padding's knobs, harmless where there is none: a stock YAML keeps working.
    *("allow_pad_trimming", "pad_to_longest"),
}
TEXT_KEYS = _COMMON_KEYS | {"text_key"}
_NOT_FOR_STREAMS = ("hf_name", "hf_kwargs", "preprocessing_fn", "safe_load", "holdout")


def tokenize_settings(dataset: dict[str, Any], special: tuple[str, ...]) -> TokenizeSettings:
    keys = ("max_seq_len", "overlong", *special)
    return TokenizeSettings(**{key: dataset[key] for key in keys if dataset.get(key) is not None})


def stream_key(dataset: dict[str, Any]) -> str | None:
    """What makes the source an MDS stream, if anything.

    Raises:
        ValueError: a key that only rows of other sources heed; without it there might be no
            held-out part, for one.
    """
    key = next((key for key in ("streams", "remote") if dataset.get(key) is not None), None)
    ignored = [name for name in _NOT_FOR_STREAMS if dataset.get(name)]
    if key and ignored:
        raise ValueError(f"dataset.{ignored[0]} does not go with dataset.{key}: leave one out")
    return key


def get_pack_tokens(dataset: dict[str, Any]) -> int:
    pack_tokens, max_seq_len = dataset.get("pack_tokens"), dataset["max_seq_len"]
    if pack_tokens is None:
        return max_seq_len
    if not isinstance(pack_tokens, int):
        raise ValueError(f"pack_tokens: {pack_tokens!r} is not a whole number of tokens")
    if pack_tokens < max_seq_len:
        raise ValueError(
            f"pack_tokens: {pack_tokens} is below max_seq_len {max_seq_len}, so a document might"
            " not fit; raise pack_tokens"
        )
    return pack_tokens


def get_batch_packs(size: int | float) -> int:
    if size != int(size) or size < 1:
        raise ValueError(
            f"batch size {size} is not a whole number of packs; raise the global batch"
        )
    return int(size)


def check_keys(dataset: dict[str, Any], known: frozenset[str] | set[str], name: str) -> None:
    if dataset.get("packing_ratio") is not None:
        raise ValueError(
            f"{name}: replace dataset.packing_ratio by dataset.pack_tokens, the tokens a pack may"
            " hold"
        )
    unknown = sorted(dataset.keys() - known - {"packing_ratio"})
    if unknown:
        raise ValueError(
            f"{name}: unknown key dataset.{unknown[0]}; the keys are {', '.join(sorted(known))}"
        )
    if not isinstance(dataset.get("max_seq_len"), int):
        raise ValueError(f"{name}: set dataset.max_seq_len, the most tokens a document may have")
