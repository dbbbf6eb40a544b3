"""Tiers of tests: together they run every test, and small ones start fast."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pyproject import PYPROJECT
from tests.tiers import one_of

ROOT = Path(__file__).parents[1]
WITHOUT_TRAINER = ("packing", "comparison", "adapters", "records", "utils")


def test_one_case_is_unmarked_and_none_is_lost():
    cases = one_of(["full", "lora", "dora"], "lora")
    more = [case.values for case in cases if case != "lora"]
    assert more == [("full",), ("dora",)] and "lora" in cases
    assert {mark.name for case in cases if case != "lora" for mark in case.marks} == {"more"}
    with pytest.raises(AssertionError, match="'lore' is none of"):
        one_of(["full", "lora"], "lore")


def test_a_case_of_several_arguments_stays_whole():
    (kept, other) = one_of([("full", 1), ("lora", 2)], ("full", 1))
    assert kept == ("full", 1) and other.values == ("lora", 2)


def test_every_test_is_in_a_tier():
    """For each combination of marks, one of pytest's and make's expressions selects the test."""
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    makefile = (ROOT / "Makefile").read_text()
    pattern = r'^(test-\w+):.*\n\t.*(?:PYTEST\)|pytest).* -m "?(.*?)"?$'
    tiers = dict(re.findall(pattern, makefile, re.MULTILINE))
    assert tiers.keys() == {"test-all", "test-slow", "test-gpu"}
    expressions = [options["addopts"][options["addopts"].index("-m") + 1], *tiers.values()]
    names = [mark.partition(":")[0] for mark in options["markers"]]
    assert set(names) == {"gpu", "more", "nullgpu", "slow"}
    for values in itertools.product([False, True], repeat=len(names)):
        marks = dict(zip(names, values, strict=True))
        assert any(eval(expression, {}, marks) for expression in expressions), marks


@pytest.mark.more
def test_rooms_without_a_trainer_are_tested_without_one():
    """Importing Composer would take most of the time of their tests."""
    folders = [str(ROOT / "tests" / name) for name in WITHOUT_TRAINER]
    code = (
        "import sys, pytest\n"
        f"code = pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', *{folders}])\n"
        "print(int(code), {'composer', 'llmfoundry', 'streaming'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout[-3000:]
