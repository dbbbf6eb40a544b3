"""Measures of a verification."""

import math

from foundry_ext.preflight.verify.checks import largest


def test_nan_is_the_largest_error():
    """In any order: comparisons with NaN are false, so `max` alone would pass over it."""
    for order in (("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")):
        errors = {"a": math.nan, "b": 2.0, "c": 1.0}
        where, worst = largest({name: errors[name] for name in order})
        assert where == "a" and math.isnan(worst)
    assert largest({"a": 0.0, "b": 2.0}) == ("b", 2.0)
    assert largest({}) == ("nowhere", 0.0)
