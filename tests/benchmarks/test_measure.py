"""Clocks, ratios, memory, counts."""

import torch

from benchmarks import measure


def test_the_ratio_is_of_pairs():
    # Medians alone would say 20 / 5; the machine was three times slower in the last two rounds.
    found = measure.pairwise([10, 20, 60], [5, 10, 20])
    assert found == {"median": 2, "least": 2, "most": 3}


def test_variants_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "seconds", lambda run, device: run())
    runs = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    assert measure.alternate(runs, "cpu", repeats=2) == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == ["a", "b", "a", "b"]


def test_a_cpus_clock_stands_still_while_the_process_sleeps():
    import time

    assert measure.seconds(lambda: time.sleep(0.2), "cpu") < 0.1


def allocate(mebibytes):
    torch.ones(mebibytes * 2**18).sum()


def test_peak_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(400 * 2**18)  # of this process; none of the child's business
    small, large = (measure.process_peak_memory(allocate, size) for size in (64, 320))
    assert 0.2 < large - small < 0.3
    assert small < 0.2
    assert ballast.sum() > 0


def test_operators_are_counted():
    x = torch.ones(4)

    def run():
        (x + 1).mul(2)

    assert measure.count_kernels(run, "cpu") == 2
