"""Keys of the `dataset` section of a loader's YAML, checked before any row is read."""

from dataclasses import dataclass
from typing import Any

from llmfoundry.data.finetuning.tasks import dataset_constructor

from foundry_ext.data.mixture import check_shares
from foundry_ext.data.prepared_settings import KEYS as PREPARED_KEYS
from foundry_ext.data.tokenize import Preprocess, TokenizeSettings
from foundry_ext.utils.errors import UserError, suggest

_SOURCE_KEYS = frozenset(("hf_name", "split", "hf_kwargs", "safe_load", "holdout", "overlong"))
_PROMPT_KEYS = frozenset(("preprocessing_fn", "target_prompts", "target_responses"))
_COMMON_KEYS = _SOURCE_KEYS | {
    *("datasets", "max_seq_len", "pack_tokens", "eval_packs", "fixed_shape"),
    *("shuffle", "shuffle_seed"),
    *PREPARED_KEYS,
}
STREAM_KEYS = {
    *("streams", "remote", "local", "split", "download_retry", "download_timeout"),
    *("validate_hash", "keep_zip", "cache_limit", "token_encoding_type", "allow_unsafe_types"),
}
# The last two are padding's knobs, harmless where there is none: a stock YAML keeps working.
_STOCK_KEYS = {"decoder_only_format", "allow_pad_trimming", "pad_to_longest"}
_KEYS = {
    "packed_finetuning": _COMMON_KEYS | _PROMPT_KEYS | STREAM_KEYS | _STOCK_KEYS,
    "packed_text": _COMMON_KEYS | {"text_key"} | STREAM_KEYS,
}
# Beyond these something would run out of memory before it says what is wrong.
_MOST_TOKENS, _MOST_PACKS = 2**24, 2**20
_NOT_FOR_STREAMS = ("hf_name", "hf_kwargs", "preprocessing_fn", "safe_load", "holdout")


@dataclass(frozen=True)
class Source:
    """A source of documents, and how its rows are read."""

    hf_name: str
    split: str | None
    options: dict[str, Any]
    """hf_kwargs, safe_load and holdout, as `load_rows` takes them."""
    settings: TokenizeSettings
    preprocess: Preprocess | None
    share: float | None
    """Share of the epoch's tokens; None for the main source."""


def get_sources(dataset: dict[str, Any], name: str) -> list[Source]:
    """Return the sources of `datasets`, or the one that `dataset` itself names.

    Rows are read as in the builder `name`, packed_finetuning or packed_text.

    Raises:
        UserError: unknown or contradictory keys, or shares that make no mixture.
    """
    entries = dataset.get("datasets")
    if entries is None:
        return [_source(dataset, name, "dataset", dataset["max_seq_len"])]
    own = [key for key in (*_SOURCE_KEYS, *_PROMPT_KEYS, "text_key") if dataset.get(key)]
    if own:
        raise UserError(
            f"dataset.{min(own)} does not go with dataset.datasets: move it into the entries it"
            " is meant for"
        )
    if not isinstance(entries, list) or not entries:
        raise UserError("dataset.datasets: give a list of sources, each with its own hf_name")
    sources = []
    for position, entry in enumerate(entries):
        where = f"dataset.datasets[{position}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {entry!r} is no mapping of hf_name, split, share and so on")
        special = _PROMPT_KEYS | {"text_key"} if name == "packed_finetuning" else {"text_key"}
        known = _SOURCE_KEYS | special | {"share"}
        _check_known(entry, known, f"{name}: unknown key {where}.")
        sources.append(_source(entry, name, where, dataset["max_seq_len"]))
    check_shares([source.share for source in sources])
    return sources


def _source(section: dict[str, Any], name: str, where: str, max_seq_len: int) -> Source:
    if section.get("hf_name") is None:
        raise UserError(
            f"set {where}.hf_name: a hub dataset, a local file, or a folder; for MDS shards set"
            " dataset.local, dataset.remote or dataset.streams"
        )
    text_key = get_text_key(section, name)
    prompt_keys = [key for key in sorted(_PROMPT_KEYS) if section.get(key)]
    if text_key and prompt_keys:
        raise UserError(
            f"{where}.{prompt_keys[0]} does not go with {where}.text_key, plain text of which all"
            " is learned: leave one out"
        )
    keys = ("hf_kwargs", "safe_load", "holdout")
    return Source(
        hf_name=section["hf_name"],
        split=section.get("split"),
        options={key: section[key] for key in keys if section.get(key) is not None},
        settings=tokenize_settings(section, max_seq_len, text_key),
        preprocess=None if text_key else get_preprocessing_fn(section),
        share=section.get("share"),
    )


def get_preprocessing_fn(section: dict[str, Any]) -> Preprocess | None:
    """Return the function that a source names, or the one that llm-foundry has for its rows.

    Raises:
        UserError: there is no such function.
    """
    given = section.get("preprocessing_fn")
    if isinstance(given, str) and given.partition(":")[0].endswith(".py"):
        # An import of rows.py runs rows before it finds no py in it.
        raise UserError(
            f"preprocessing_fn: {given!r} is a file's name; write that of a module on Python's"
            " path, module:function"
        )
    try:
        if isinstance(given, dict):
            return dataset_constructor.get_preprocessing_fn_from_dict(given)
        return dataset_constructor.get_preprocessing_fn_from_str(given, section.get("hf_name"))
    except ValueError as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise UserError(
            f"preprocessing_fn: {given!r} is no function that can be imported{cause}; write"
            " module:function, such as foundry_ext.data.prompts:gsm8k, of a module on Python's path"
        ) from error


def get_text_key(section: dict[str, Any], name: str) -> str | None:
    """Return the column of plain text of a source of the builder `name`, None for prompts."""
    return section.get("text_key") or ("text" if name == "packed_text" else None)


def tokenize_settings(
    section: dict[str, Any], max_seq_len: int, text_key: str | None = None
) -> TokenizeSettings:
    settings: dict[str, Any] = {"overlong": "split"} if text_key else {}
    keys = ("overlong", "target_prompts", "target_responses")
    settings |= {key: section[key] for key in keys if section.get(key) is not None}
    return TokenizeSettings(max_seq_len=max_seq_len, text_key=text_key, **settings)


def stream_key(dataset: dict[str, Any]) -> str | None:
    """Return the key that makes the source an MDS stream, or None.

    Raises:
        UserError: a key that streams would ignore, such as holdout.
    """
    keys = ("streams", "remote", "local")
    key = next((key for key in keys if dataset.get(key) is not None), None)
    ignored = [name for name in (*_NOT_FOR_STREAMS, "datasets") if dataset.get(name)]
    if key and ignored:
        raise UserError(f"dataset.{ignored[0]} does not go with dataset.{key}: leave one out")
    return key


def get_pack_tokens(dataset: dict[str, Any]) -> int:
    pack_tokens, max_seq_len = dataset.get("pack_tokens"), dataset["max_seq_len"]
    if pack_tokens is None:
        return max_seq_len
    if type(pack_tokens) is not int:
        raise UserError(
            f"pack_tokens: {pack_tokens!r} is not a whole number of tokens; give one of at least"
            f" max_seq_len, {max_seq_len}"
        )
    if pack_tokens < max_seq_len:
        raise UserError(
            f"pack_tokens: {pack_tokens} is below max_seq_len {max_seq_len}, so a document might"
            " not fit; raise pack_tokens"
        )
    if pack_tokens > _MOST_TOKENS:
        raise UserError(
            f"pack_tokens: {pack_tokens} is more than any device computes at once; give at most"
            f" {_MOST_TOKENS}, and see what fits with `foundry-ext plan`"
        )
    return pack_tokens


def get_batch_packs(size: int | float) -> int:
    if size != int(size) or size < 1:
        raise UserError(f"batch size {size} is not a whole number of packs; raise the global batch")
    if size > _MOST_PACKS:  # the last batch is completed with empty ones
        raise UserError(
            f"batch size {size}: more packs than a step can have; give at most {_MOST_PACKS}"
        )
    return int(size)


def check_keys(dataset: dict[str, Any], name: str) -> None:
    if dataset.get("packing_ratio") is not None:
        raise UserError(
            f"{name}: replace dataset.packing_ratio by dataset.pack_tokens, the tokens a pack may"
            " hold"
        )
    _check_known(dataset, _KEYS[name] | {"packing_ratio"}, f"{name}: unknown key dataset.")
    if not dataset.get("decoder_only_format", True):
        raise UserError(f"{name}: decoder_only_format: false cannot be packed; set it to true")
    max_seq_len = dataset.get("max_seq_len")
    if type(max_seq_len) is not int:
        raise UserError(
            f"{name}: set dataset.max_seq_len, the most tokens a document may have, to a whole"
            f" number, not {max_seq_len!r}"
        )
    for key, others in (("shuffle", ()), ("fixed_shape", ("auto",))):
        value = dataset.get(key, False)
        if not isinstance(value, bool) and value not in others:
            raise UserError(
                f"{name}: dataset.{key}: {value!r} is neither true nor false"
                f"{''.join(f', nor {other}' for other in others)}"
            )
    for key, least in (("eval_packs", 1), ("shuffle_seed", 0)):
        value = dataset.get(key, least)
        if type(value) is not int or value < least:
            raise UserError(
                f"{name}: dataset.{key}: {value!r} must be a whole number from {least} on"
            )


def _check_known(section: dict[str, Any], known: frozenset[str] | set[str], label: str) -> None:
    unknown = sorted(section.keys() - known, key=str)
    if unknown:
        names = sorted(known - {"packing_ratio"})
        hint = suggest(unknown[0], names) or ";"
        raise UserError(f"{label}{unknown[0]}{hint} the keys are {', '.join(names)}")
