"""Strategies for contents of files: a valid file with parts replaced, or a generated one."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

# What readers trip over: NUL, bytes that are no UTF-8, YAML's signs, numbers without a value.
_NASTY = [
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b"\n", b"\t"),
    *(b"${", b"${seed}", b"}", b"{", b"[", b"]", b": ", b"- ", b"&a ", b"*a", b"<<: *a", b"!!set "),
    *(b"!!python/name:os.system ", b"NaN", b"-Infinity", b".inf", b".nan", b"1e999", b"9" * 40),
    *(b"9" * 5000, b"null", b"~", b"true", b'""', b"''", b"[" * 2000, b"{a: " * 500, b"2020-13-45"),
    *(
        b"0x",
        b"1:60",
        b"? ",
        b"|\n",
        b">",
        b"#",
        b"%",
        b"@",
        b"`",
        b"---\n",
        b"...\n",
        b"../",
        b"\\",
    ),
]


@st.composite
def mutated_bytes(draw: Any, valid: st.SearchStrategy[bytes]) -> bytes:
    """Draw bytes with stretches removed, doubled or replaced, or with the end cut off."""
    content = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(start + draw(st.sampled_from([0, 0, 1, 2, 5, 30, 200])), len(content))
        kind = draw(st.sampled_from(["insert", "replace", "remove", "double", "cut"]))
        if kind == "cut":
            del content[start:]
        elif kind == "remove":
            del content[start:end]
        elif kind == "double":
            content[start:start] = content[start:end]
        else:
            new = draw(st.one_of(st.sampled_from(_NASTY), st.binary(max_size=4)))
            content[start : end if kind == "replace" else start] = new
    return bytes(content)


def values() -> st.SearchStrategy[Any]:
    """Return a strategy for all values of JSON, and those that only Python's JSON allows."""
    single = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 10**30, 2**63]),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["../../etc/passwd", "/", "", "\0", "\ud800", "<script>", "nan"]),
    )
    return st.recursive(
        single,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
        ),
        max_leaves=8,
    )


@st.composite
def mutated_json(draw: Any, valid: st.SearchStrategy[bytes]) -> bytes:
    """Draw a JSON object, or lines of them, with values replaced, removed or added."""
    lines = [json.loads(line) for line in _objects(draw(valid))]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = _mutated(draw, lines[place])
    return "\n".join(map(json.dumps, lines)).encode()


def _objects(content: bytes) -> list[bytes]:
    lines = content.splitlines()
    return lines if lines[0].endswith(b"}") else [content]


def _mutated(draw: Any, root: Any) -> Any:
    root = copy.deepcopy(root)
    parent, key, node = None, None, root
    while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 3))):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        parent, key = node, draw(st.sampled_from(keys))
        node = node[key]
    if parent is None:
        return draw(values())
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "double"]))
    if kind == "remove":
        del parent[key]
    elif kind == "replace" or isinstance(parent, dict):
        parent[draw(st.text(max_size=4)) if kind == "add" else key] = draw(values())
    else:
        parent.insert(key, copy.deepcopy(node) if kind == "double" else draw(values()))
    return root


def texts() -> st.SearchStrategy[str]:
    """Return a strategy for lines that resemble YAML or JSON, and others."""
    word = st.one_of(
        st.sampled_from(["method", "grid", "program", "parameters", "values", "prompt", "step"]),
        st.text(max_size=5),
        st.sampled_from([one.decode(errors="replace") for one in _NASTY if len(one) < 50]),
    )
    line = st.builds(
        lambda indent, words, end: " " * indent + "".join(words) + end,
        st.integers(0, 6),
        st.lists(word, max_size=5),
        st.sampled_from(["", ":", ": 1", "- a", ","]),
    )
    return st.lists(line, max_size=8).map("\n".join) | values().map(json.dumps)
