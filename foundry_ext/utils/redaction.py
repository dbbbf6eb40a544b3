"""Removal of secrets from records and logs, by key names, known shapes and the environment."""

import os
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = {
    *("apikey", "auth", "authorization", "credential", "credentials", "passphrase", "passwd"),
    *("password", "pwd", "secret", "secrets"),
    *("sig", "signature"),  # of a signed URL, which gives access to whoever has it
}
# A key is secret if it follows one of these words: `api_key` is, `text_key` is not.
_SECRET_KEYS = {
    *("access", "account", "api", "encryption", "license", "private", "secret", "ssh"),
    *("anthropic", "aws", "azure", "comet", "hf", "openai", "wandb"),
}
# A name that ends in `token` is not secret after these words: `eos_token`, `time/token`.
_PLAIN_TOKENS = {
    *("additional", "bos", "class", "cls", "decoder", "eos", "first", "image", "last", "mask"),
    *("new", "next", "pad", "per", "sep", "special", "start", "time", "unk"),
}
_FOLDERS = {"PWD", "OLDPWD"}  # the shell's folders, not passwords
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,}                          # Hugging Face
        | (?:ghp|gho|ghs|ghu)_[A-Za-z0-9]{16,} | github_pat_\w{16,}
        | sk-[\w-]{16,} | xox[abp]-[\w-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,}
        | eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+            # JSON web token
    )""",
    re.VERBOSE,
)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s?#]+(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
# `?token=...`, `--api-key=...`, `WANDB_API_KEY=...`
_ASSIGNED = re.compile(r"([A-Za-z][\w.-]*)=([^\s&#;,'\"]+)")


def is_secret_name(name: str) -> bool:
    """Return whether a key holds a secret, as `WANDB_API_KEY`, `hf_token` or `password` do."""
    words = [word.lower() for word in _WORDS.findall(name)]
    for before, word in zip(["", *words], words, strict=False):
        if word in _SECRET_WORDS:
            return True
        if word in ("key", "keys") and before in _SECRET_KEYS:
            return True
    if words[-1:] == ["token"]:
        return not set(words[:-1]) & _PLAIN_TOKENS
    return words[-1:] == ["tokens"] and bool({"api", "auth", "access", "hf"} & set(words))


def redact(value: Any) -> Any:
    """Return a copy of nested mappings and lists with every secret replaced by "[redacted]".

    Secrets are the values of keys with a secret's name, and parts of texts: known token formats,
    logins and secret parameters in URLs, and the values of environment variables with a secret's
    name (WANDB_API_KEY, HF_TOKEN, ...).
    """
    return _redact(value, _environment_secrets())


def _redact(value: Any, known: Iterable[str]) -> Any:
    if isinstance(value, dict):
        return {
            _redact(key, known): _hide(child) if _hides(key) else _redact(child, known)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(child, known) for child in value]
    return _redact_text(value, known) if isinstance(value, str) else value


def _hides(key: Any) -> bool:
    return isinstance(key, str) and is_secret_name(key)


def _hide(value: Any) -> Any:
    """Redact everything in `value` but None, "" and booleans, such as `use_auth_token: true`."""
    if isinstance(value, dict):
        return {key: _hide(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(child) for child in value]
    return value if value is None or isinstance(value, bool) or value == "" else REDACTED


def _redact_text(text: str, known: Iterable[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    text = _LOGIN_IN_URL.sub(REDACTED, text)
    text = _SHAPES.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    return _ASSIGNED.sub(
        lambda match: f"{match[1]}={REDACTED}" if is_secret_name(match[1]) else match[0], text
    )


def _environment_secrets() -> list[str]:
    """Return the environment's secrets, longest first because one may contain another."""
    values = {os.environ[name] for name in os.environ.keys() - _FOLDERS if is_secret_name(name)}
    # Shorter values are too common in texts.
    return sorted((value for value in values if len(value) >= 8), key=len, reverse=True)
