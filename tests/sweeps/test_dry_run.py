"""What a sweep says before it starts: its cost, and with --dry-run the command that starts it."""

import shlex
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from tests.sweeps.kit import enter, names, run, write_sweep

SEEDS = {"seed": {"values": [17, 18]}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_epochs_are_unknown_until_the_data_is_read(folder: Path):
    path = write_sweep(folder, {"max_duration": {"values": ["1ep", "5_000tok", "2ba"]}})
    _, said = run(path, dry_run=True, tokens_per_second=10.0)
    assert said[1] == (
        "tokens: unknown until the data is read, for 2 of 6 runs; "
        "time: unknown until the first runs have finished"
    )
    path = write_sweep(folder, {"max_duration": {"values": ["5_000tok", "2ba"]}})
    _, said = run(path, dry_run=True, tokens_per_second=10.0)
    assert said[1] == "tokens: at most 11,024; time: about 18 min"  # 2 x (5,000 + 2 x 4 x 64) / 10


def test_a_dry_run_prints_the_commands_and_starts_nothing(folder: Path):
    _, said = run(
        write_sweep(folder, SEEDS, command=["composer", "${program}", "${args_no_hyphens}"]),
        dry_run=True,
    )
    assert said[2:] == [
        f"composer train.py config={name}.yaml seed={seed}" for name in "ab" for seed in (17, 18)
    ]
    assert names(folder) == []


def test_a_dry_run_ends_with_the_next_command(folder: Path, capsys):
    """It starts what is left, with the same options, or compares what is finished."""
    write_sweep(folder, {"seed": {"values": [17]}})
    options = ["--launcher", "subprocess", "--parallel", "2", "--results", "kept"]
    assert main(["sweep", "sweep.yaml", "--dry-run", *options]) == 0
    label, _, command = capsys.readouterr().out.splitlines()[-1].partition(": ")
    assert label == "start" and sorted(options) == sorted(shlex.split(command)[3:-1])
    assert main(shlex.split(command)[1:]) == 0
    summary = capsys.readouterr().out
    assert main(["sweep", "sweep.yaml", "--dry-run"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("compare: foundry-ext compare outputs/a") and last in summary


def test_an_estimate_below_the_limit_asks_nothing(folder: Path):
    statuses, said = run(write_sweep(folder, {}), yes=False, tokens_per_second=1e6)
    assert set(statuses.values()) == {"finished"}
    assert "time: about 0 s" in said[1]
