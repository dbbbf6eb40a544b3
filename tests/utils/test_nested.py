"""Dotted keys."""

import doctest

from foundry_ext.utils import nested
from foundry_ext.utils.nested import get, is_below, leaves

NODE = {"a": {"b": 1, "c": [2, {"d": 3}]}, "e": None, 5: {}}


def test_examples():
    found = doctest.testmod(nested)
    assert found.failed == 0 and found.attempted > 0


def test_get():
    assert get(NODE, "a.b") == 1
    assert get(NODE, "a.b.c") is None and get(NODE, "a.x") is None and get(None, "a") is None


def test_leaves():
    assert dict(leaves(NODE)) == {"a.b": 1, "a.c": [2, {"d": 3}], "e": None}
    assert dict(leaves(NODE, into_lists=True)) == {
        "a.b": 1,
        "a.c[0]": 2,
        "a.c[1].d": 3,
        "e": None,
    }
    assert dict(leaves(NODE, "top", skip=lambda name: name == "c")) == {"top.a.b": 1, "top.e": None}
    assert dict(leaves(3, "x")) == {"x": 3}


def test_is_below():
    assert is_below("a.b", "a.b") and is_below("a.b[1]", "a.b") and is_below("a.b (names)", "a.b")
    assert not is_below("a.bc", "a.b") and not is_below("a", "a.b")
