"""The report's table of values: what was measured, beside the changes of the other tables."""

import re
from statistics import fmean

import numpy as np
import pytest

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.metrics import measured_items
from foundry_ext.comparison.report.document import Table
from foundry_ext.comparison.report.values import value_blocks
from foundry_ext.comparison.statistics import bootstrap_items, seeds_and_items


def test_values_are_the_records(comparison: Comparison):
    (table,) = [block for block in value_blocks(comparison) if isinstance(block, Table)]
    assert table.columns == ["at the end", "base model", *comparison.chosen]
    by_name = {row[0]: row[1:] for row in table.rows}
    assert not [name for name in by_name if name.startswith("eval/")]
    for key, unit in (("source/loss", "nats per token"), ("arc_challenge/acc", "share right")):
        first = next(iter(comparison.chosen.values()))[0].record["evaluations"][0]
        expected = [first["metrics"][key]]
        for runs in comparison.chosen.values():
            expected.append(fmean(run.record["evaluations"][-1]["metrics"][key] for run in runs))
        for cell, value in zip(by_name[f"{key}, {unit}"], expected, strict=True):
            mean, low, high = re.findall(r"[\d.]+", cell)
            assert mean == f"{value:.3f}" and float(low) < float(mean) < float(high)
    assert len(set(by_name["source/loss, nats per token"])) > 2


def test_values_of_three_seeds_vary_seeds_and_items(comparison: Comparison):
    """Every method has three seeds at its chosen rate; the base model, one measurement."""
    (table,) = [block for block in value_blocks(comparison) if isinstance(block, Table)]
    row = next(row for row in table.rows if row[0].startswith("source/loss"))
    for cell, runs in zip(row[2:], comparison.chosen.values(), strict=True):
        items = [measured_items(run, run.final, "source/loss") for run in runs]
        values = np.array([[value for value, _ in each.values()] for each in items])
        weights = np.array([weight for _, weight in items[0].values()])
        expected = seeds_and_items(values, weights)
        low, high = map(float, re.findall(r"[\d.]+", cell)[1:])
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-3)
        items_only = bootstrap_items(values.mean(0), weights)
        assert expected.high - expected.low > items_only.high - items_only.low
