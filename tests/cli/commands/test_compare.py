"""`foundry-ext compare`, with arguments as typed."""

from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from tests.comparison import records


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    records.write_run(tmp_path / "runs", "full", 2e-3, 17, num_items=20)
    records.write_run(tmp_path / "runs", "lora", 1e-2, 17, num_items=20, steps=81)
    return tmp_path / "runs"


def test_a_difference_ends_it_with_2_and_one_line(runs: Path, tmp_path: Path, capsys):
    assert main(["compare", str(runs), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("foundry-ext: error: these runs differ")
    assert "steps: 80 in full_0.002_s17; 81 in lora_0.01_s17" in shown.err
    assert "--allow" in shown.err
    assert not (tmp_path / "out").exists()


def test_an_allowed_difference_is_compared(runs: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", str(runs), "--out", str(out), "--allow", "steps", "tokens"]
    arguments += ["--forgetting", "source_kl"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "In these runs, full learns more than LoRA on target (loss)" in shown
    assert "on source (kl)" in shown and str(out / "index.html") in shown
    assert (out / "index.html").is_file() and (out / "tradeoff.png").is_file()


def test_a_measure_that_is_not_there_is_named(runs: Path, tmp_path: Path, capsys):
    arguments = ["compare", str(runs), "--out", str(tmp_path / "out"), "--allow", "steps"]
    assert main([*arguments, "--learning", "gsm8k_acc"]) == 2
    assert "gsm8k_acc: not a metric of learning" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys):
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no record.json" in capsys.readouterr().err
