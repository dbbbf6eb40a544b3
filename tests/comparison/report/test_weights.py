"""The report's section on what training did to the weights."""

import json
from pathlib import Path

import pytest

from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.report.report import write_report
from foundry_ext.comparison.report.wording import format_mean_over_seeds
from foundry_ext.comparison.runs import load_runs
from tests.comparison import records


def test_means_over_three_seeds_have_an_interval():
    # The t quantile with two degrees of freedom is 4.303, the standard error 1 / sqrt(3).
    assert format_mean_over_seeds([1.0, 3.0], "{:.1f}") == "2.0 (1.0 to 3.0)"
    assert (
        format_mean_over_seeds([1, None, 3, 2], "{:.1f}") == "2.0 [−0.5, 4.5]"
    )  # t of df 2: 4.303


def test_analyses_beside_the_records_are_a_section(tmp_path: Path):
    folder = records.write_run(tmp_path / "runs", "lora", 1e-2, 17, num_items=20)
    line = [
        {"alpha": a, "learning": {"target_loss": 4 * a}, "forgetting": {"source_loss": 2 * a * a}}
        for a in (1.0, 0.0, 0.5)
    ]
    summary = {"matrices": 28, "median_rank_90": 5.5, "total_intruders": 3, "k": 10}
    summary |= {"relative_change": 0.123, "epsilon": 0.5}
    path = folder / "analysis.json"
    path.write_text(json.dumps({"schema_version": 1, "summary": summary, "line": line}))
    write_report(compare_runs(load_runs([str(folder)])), tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| LoRA at 0.01, seed 17 | 5.5 | 3 | 28 | 12.30 |" in text
    assert (tmp_path / "out" / "interpolation.svg").is_file()
    path.write_text("{}")
    with pytest.raises(ValueError, match="foundry-ext analyse"):
        write_report(compare_runs(load_runs([str(folder)])), tmp_path / "out")
