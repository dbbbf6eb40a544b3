"""Secrets taken out of what is written down: by the name of a key, by shape, by the environment."""

import os
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = {
    *("apikey", "auth", "authorization", "credential", "credentials", "passphrase", "passwd"),
    *("password", "pwd", "secret", "secrets"),
    *("sig", "signature"),  # of a URL that is signed for whoever has it
}
# `text_key` is none: a key is secret by what it opens.
_SECRET_KEYS = {
    *("access", "account", "api", "encryption", "license", "private", "secret", "ssh"),
    *("anthropic", "aws", "azure", "comet", "hf", "openai", "wandb"),
}
# `eos_token` is none, and neither are counts: `max_new_tokens`, `time/token`.
_PLAIN_TOKENS = {
    *("additional", "bos", "class", "cls", "decoder", "eos", "first", "image", "last", "mask"),
    *("new", "next", "pad", "per", "sep", "special", "start", "time", "unk"),
}
_FOLDERS = {"PWD", "OLDPWD"}  # of the shell, and no passwords
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
    """Whether a key of this name holds a secret: `WANDB_API_KEY`, `hf_token`, `password`."""
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
    """A copy of nested mappings and lists without secrets, which read "[redacted]".

    A secret is the value of a key named like one; a part of any text that has a known token's
    shape, is a login or a secret parameter in a URL; or the value of an environment variable named
    like a secret (WANDB_API_KEY, HF_TOKEN, ...), wherever it stands.
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
    """Everything in `value` but flags and empty places: `use_auth_token: true` says no secret."""
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
        lambda found: f"{found[1]}={REDACTED}" if is_secret_name(found[1]) else found[0], text
    )


def _environment_secrets() -> list[str]:
    """Longest first. Values below 8 characters are too common to be looked for in texts."""
    secret = (name for name in os.environ if name not in _FOLDERS and is_secret_name(name))
    values = {os.environ[name] for name in secret}
    return sorted((value for value in values if len(value) >= 8), key=len, reverse=True)
