"""Removal of secrets from files, logs and output, by names, known values and shapes.

`redact` is the one function for it. The output of commands (output.py), the record and what W&B
gets all pass through it.
"""

import html
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from foundry_ext.utils.secret_shapes import (
    BEARER,
    ENCODED_LOGIN,
    PRIVATE_KEY,
    SHAPES,
    UP_TO_LAST_AT,
    URL_LOGIN,
    WEBHOOKS,
    is_secret_name,
)

__all__ = ["REDACTED", "is_secret_name", "redact", "remember_secrets"]

REDACTED = "[redacted]"
_FOLDERS = {"PWD", "OLDPWD"}  # the shell's folders, not passwords
_LEAST = 8  # characters; shorter values are too common in texts
_remembered: set[str] = set()

# The patterns take linear time: a name is sought only where a run of its characters begins (or
# behind a quote), and the number of backslashes is bounded. Quotes in five nested texts have 31.
_NAME = r"[A-Za-z_][\w.@/-]*"
# All of the characters that follow: what a lookahead has matched is not given back.
_ALL = r"(?=(?P<name>[\w.@/-]+))(?P=name)"
_WHOLE_NAME = rf"(?<![\w.@/-]){_ALL}"
_SLASHES = r"\\{1,31}"
_QUOTE = r"""(?P<quote>\\{0,31}["'])"""
_QUOTED = "|".join(rf"{_SLASHES}{q}(?:(?!{_SLASHES}{q}).)*(?:{_SLASHES}{q})?" for q in "\"'")
_QUOTED += r"""|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?"""
# Up to a space, a quote, or the next `name=` of a query or list.
_WORD = r"""(?:[^\s'",;&\\]|\\(?!["'nrt])|[,;&](?![\w.-]+=|\s|$))+"""
_SCHEME = r"(?:(?:Bearer|Basic|Digest|Token|token)[ ]+)?"
_KEPT = r"(?:None|True|False|null|true|false|none|~)(?![\w])|\[redacted"
_FLAG_VALUE = rf"{_QUOTED}|[^\s'\"-]{_WORD}|[^\s'\"-]"
# (what comes before a value, with the group `name`; the value)
_NAMED = [
    (re.compile(before, re.MULTILINE), re.compile(value))
    for before, value in (
        # `"api_key": "x"`, also as a text inside of JSON or with a list as its value
        (
            rf"""{_QUOTE}(?P<name>{_NAME})(?P=quote)\s*:\s*""",
            rf"""{_QUOTED}|\[[^\]]*\]?|\{{[^}}]*\}}?|[^\s,}}\]]+""",
        ),
        # `["--password", "x"]`, `("password", "x")`
        (rf"""{_QUOTE}(?P<name>--?{_NAME})(?P=quote)\s*,\s*""", _QUOTED),
        (rf"""\([ ]*{_QUOTE}(?P<name>{_NAME})(?P=quote)\s*,\s*""", _QUOTED),
        # `api_key: x y` as a line of YAML, `... api_key: x ...` elsewhere
        (rf"^[ \t]*(?:-[ ]+)?(?P<name>{_NAME}):[ \t]+{_SCHEME}", rf"{_QUOTED}|[^\s'\"].*"),
        (rf"{_WHOLE_NAME}:[ \t]+{_SCHEME}", rf"{_QUOTED}|{_WORD}"),
        # `api_key=x`, `?token=x&`, `password = "x y"`
        (rf"{_WHOLE_NAME}[ \t]?=[ \t]?(?!=){_SCHEME}", rf"{_QUOTED}|{_WORD}"),
        (
            rf"(?:(?<=%[0-9A-Fa-f]{{2}})|(?<![\w.@/%-])){_ALL}%3D",
            r"""(?:(?!%26|%23)[^\s'"&])+""",
        ),
        # `--password x`
        (r"(?<![\w-])(?P<name>--?(?!no-)[A-Za-z][\w-]*)[ \t]+", _FLAG_VALUE),
        # .netrc
        (r"\blogin\s+\S+\s+(?P<name>password)\s+", r"\S+"),
    )
]
_INTERPOLATION = re.compile(r"\$\{[^{}]+\}")  # OmegaConf's, whose value is found elsewhere
_CODE = re.compile(r"[A-Za-z_][\w.]*")
_NUMBER = re.compile(r"[-+]?\d{1,15}(?:[\d,_]*\.?\d*(?:[eE][-+]?\d+)?)%?")

_ORDINARY_WORDS = {"cookie", "cookies", "pass", "signature", "signatures"}
# A longer number may be a password.
_SMALL_NUMBER = re.compile(r"[-+]?(?:\d{1,3}|\d*\.\d+)(?:[eE][-+]?\d+)?%?(?=[\s)\]},.;]|$)")


def redact(value: Any) -> Any:
    """Return a copy of nested mappings and lists with every secret replaced by "[redacted]".

    Secrets are the values of keys with a secret's name, and parts of texts: known token formats,
    logins and secret parameters in URLs, values after a secret's name (`password: x`,
    `--password x`, `"password": "x"`), private keys, the values of environment variables with a
    secret's name (WANDB_API_KEY, HF_TOKEN, ...), and the values that `remember_secrets` was given.
    """
    if isinstance(value, Mapping):
        return {
            redact(key): _hide(child) if _hides(key) else redact(child)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return _redact_list(value)
    return _redact_text(value) if isinstance(value, str) else value


def remember_secrets(value: Any) -> None:
    """Remember the secrets of a configuration or a command line; `redact` then removes them.

    They are removed wherever they appear, also without their names, URL-encoded or escaped.

    Args:
        value: nested mappings and lists, or texts such as `variables.api_key=x`.
    """
    _remembered.update(text for text in _secrets_in(value) if _is_distinct(text))


def _redact_list(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Redact the items; after `--password` the next one is hidden."""
    found, hides = [], False
    for value in values:
        found.append(_hide(value) if hides and not _is_flag(value) else redact(value))
        hides = _is_flag(value) and is_secret_name(value)
    return found


def _is_flag(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"--?[A-Za-z][\w-]*", value) is not None


def _hides(key: Any) -> bool:
    return isinstance(key, str) and is_secret_name(key)


def _hide(value: Any) -> Any:
    """Redact everything in `value` but None, "" and booleans, such as `use_auth_token: true`."""
    if isinstance(value, Mapping):
        return {key: _hide(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(child) for child in value]
    return value if value is None or isinstance(value, bool) or value == "" else REDACTED


def _redact_text(text: str) -> str:
    known = _known_values()
    if known:
        text = _pattern_of(known).sub(REDACTED, text)
    text = PRIVATE_KEY.sub(REDACTED, text)
    text = UP_TO_LAST_AT.sub(lambda match: URL_LOGIN.sub(REDACTED, match[0]), text)
    text = ENCODED_LOGIN.sub(REDACTED, text)
    text = SHAPES.sub(REDACTED, text)
    text = WEBHOOKS.sub(REDACTED, text)
    text = BEARER.sub(lambda match: f"{match[1] or match[2]} {REDACTED}", text)
    for before, value in _NAMED:
        text = _without_values(text, before, value)
    return text


def _without_values(text: str, before: re.Pattern[str], value: re.Pattern[str]) -> str:
    """Redact each value that follows a secret's name."""
    parts, done = [], 0
    for match in before.finditer(text):
        if match.start() < done or not _is_secret_here(match["name"]):
            continue
        found = value.match(text, match.end())
        if found is not None:
            parts += [text[done : found.start()], _hide_text(match["name"], found[0])]
            done = found.end()
    return "".join([*parts, text[done:]])


def _is_secret_here(name: str) -> bool:
    return is_secret_name(name) and not name.endswith(("Error", "Exception", "Warning"))


def _hide_text(name: str, value: str) -> str:
    """Return what stands for a value in a text: quotes and closing brackets stay."""
    bare = value.strip("\\\"'")
    if not bare.strip() or re.match(_KEPT, bare) or _is_code(bare) or _is_count(name, bare):
        return value
    mark = re.match(r"""\\*["']""", value)
    if mark is not None:
        closes = len(value) >= 2 * len(mark[0]) and value.endswith(mark[0])
        return f"{mark[0]}{REDACTED}{mark[0] if closes else ''}"
    is_list = value[0] in "[{"
    return REDACTED + ("" if is_list else value[len(value.rstrip(")]},.;")) :])


def _is_code(value: str) -> bool:
    """Return whether it is a name, as in `token=token` or `[--password PASSWORD]`."""
    found = _CODE.match(value)
    return found is not None and not value[found.end() :].strip(")],:") and is_secret_name(found[0])


def _is_count(name: str, value: str) -> bool:
    """Return whether it is a number of tokens, or what follows a word that is not only a secret's.

    Such are `pass: 0.5`, `cookie: 3 cups` and `signature: (a, b)`.
    """
    name = name.lower()
    if name in _ORDINARY_WORDS:
        return _SMALL_NUMBER.match(value) is not None or (name[:4] == "sign" and value[:1] == "(")
    is_token = name.endswith(("token", "tokens"))
    return is_token and _NUMBER.fullmatch(value.rstrip(")]},.;")) is not None


# --- known values --------------------------------------------------------------------------------


def _secrets_in(value: Any, *, is_secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _secrets_in(child, is_secret=is_secret or _hides(key))
    elif isinstance(value, list | tuple):
        for before, child in zip([None, *value], value, strict=False):
            after_flag = _is_flag(before) and is_secret_name(str(before)) and not _is_flag(child)
            yield from _secrets_in(child, is_secret=is_secret or after_flag)
    elif is_secret and not isinstance(value, bool) and value is not None:
        yield from _forms_given(str(value))
    if isinstance(value, str):
        name, equals, given = value.partition("=")
        if equals and re.fullmatch(r"[+~-]*[\w./-]+", name) and is_secret_name(name):
            yield from _forms_given(given)
        for login in [*URL_LOGIN.findall(value), *ENCODED_LOGIN.findall(value)]:
            user, _, password = login.partition(":")
            yield from (password, unquote(password)) if password else (user, unquote(user))


def _forms_given(text: str) -> Iterator[str]:
    """Yield a value, and without the quotes that YAML takes away."""
    if not _INTERPOLATION.search(text):
        yield from (text, text.strip().strip("\"'"))


def _is_distinct(text: str) -> bool:
    """Return whether a text can be searched for without finding ordinary words."""
    mixed = len(text) >= 6 and re.search(r"[A-Za-z]", text) and re.search(r"[^A-Za-z]", text)
    return len(text) >= _LEAST or bool(mixed)


def _known_values() -> frozenset[str]:
    names = (name for name in os.environ.keys() - _FOLDERS if is_secret_name(name))
    values = (os.environ[name] for name in names)
    return frozenset(_remembered | {value for value in values if len(value) >= _LEAST})


@lru_cache(maxsize=8)
def _pattern_of(values: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern of the values in every form; the longest first, as one may hold another."""
    # A key of many lines is printed line by line.
    lines = {line.strip() for value in values for line in value.splitlines()}
    texts = values | {line for line in lines if len(line) >= 16}
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join("".join(map(_forms, text)) for text in longest_first))


@lru_cache(maxsize=1024)
def _forms(character: str) -> str:
    r"""Return a pattern of a character as it is, and as URLs, JSON, repr, YAML and HTML write it.

    Any of these may be applied twice: `/` is also %2F and %252F, `"` also \" and \\\".
    """
    if re.fullmatch(r"[A-Za-z0-9_.~-]", character):
        return re.escape(character)
    encoded = "".join(rf"%(?:25)*{byte:02X}" for byte in character.encode(errors="surrogatepass"))
    utf16 = character.encode("utf-16-be", errors="surrogatepass")
    units = "".join(rf"{_SLASHES}u{utf16[i : i + 2].hex()}" for i in range(0, len(utf16), 2))
    escaped = [rf"{_SLASHES}x{ord(character):02x}", units, rf"{_SLASHES}U{ord(character):08x}"]
    forms = [rf"(?i:{'|'.join([encoded, *escaped])})"]
    forms += map(re.escape, {html.escape(character), character})
    if character.isspace():
        forms += [r"\s+", r"\+", rf"{_SLASHES}[nrt]"]
    if character in "\"'\\":
        forms += [rf"(?:{_SLASHES})?" + re.escape(character), "''", _SLASHES]
    return f"(?:{'|'.join(forms)})"
