"""Measures of a verification."""

import math

import numpy as np

from foundry_ext.packing.collator import Document
from foundry_ext.preflight.verify.checks import largest
from foundry_ext.preflight.verify.packing import _labels


def test_nan_is_the_largest_error():
    """In any order: comparisons with NaN are false, so `max` alone would pass over it."""
    for order in (("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")):
        errors = {"a": math.nan, "b": 2.0, "c": 1.0}
        where, worst = largest({name: errors[name] for name in order})
        assert where == "a" and math.isnan(worst)
    assert largest({"a": 0.0, "b": 2.0}) == ("b", 2.0)
    assert largest({}) == ("nowhere", 0.0)


def test_labels_of_two_byte_ids():
    """In uint16, -100 is 65436, which numpy does not say."""
    ids = np.array([5, 6, 7, 8], np.uint16)
    labels = _labels(Document(ids, np.array([False, False, True, True])))
    assert labels.tolist() == [-100, 7, 8]
