"""Our share of the start-up time: nothing is imported before it is needed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import _BUILDERS, PARTS, Marks
from tests.pyproject import PYPROJECT

ROOT = Path(__file__).parents[2]
SLOW = {
    *("torch", "numpy", "pandas", "scipy", "matplotlib", "pyarrow", "datasets", "transformers"),
    *("peft", "wandb", "composer", "llmfoundry", "streaming", "tokenizers", "jinja2"),
}
# Rooms and modules that follow a run or come before one.
NOT_FOR_TRAINING = {
    *("analysis", "cli", "comparison", "launch", "preflight", "sweeps"),
    *("checkpoints.merge", "checkpoints.loading", "evaluation.tasks"),
}


def loaded_by(code: str) -> set[str]:
    """Return the names of all modules after `code` has run in a fresh interpreter."""
    code += "\nimport sys; print('\\nMODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.rpartition("MODULES")[2].split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def entry_modules() -> set[str]:
    """Return the modules that a run's YAML can name."""
    points = PYPROJECT["project"]["entry-points"]
    return {value.partition(":")[0] for group in points.values() for value in group.values()}


@pytest.mark.parametrize("command", ["--help", "--version", "compare --help", "inspect --help"])
def test_help_is_there_at_once(command: str):
    code = f"""
from foundry_ext.cli.main import main
try:
    main({command.split()})
except SystemExit:
    pass
"""
    assert not packages(loaded_by(code)) & SLOW


def test_a_yaml_is_checked_before_anything_slow_is_imported():
    yaml = "yamls/smollm2_lora.yaml"
    code = f"""
from pathlib import Path
from foundry_ext.launch.train import check_all
configs, complaints = check_all([Path({yaml!r})], [])
assert configs and not complaints
"""
    assert not packages(loaded_by(code)) & SLOW


@pytest.mark.more
def test_beyond_llm_foundry_a_run_loads_peft_and_little_else():
    """Compare with the packages that llm-foundry has imported by then."""
    code = "import llmfoundry.command_utils"
    before = packages(loaded_by(code))
    modules = loaded_by(f"{code}\nimport {', '.join(sorted(entry_modules()))}")
    added = packages(modules) - before - set(sys.stdlib_module_names)
    added = {name for name in added if name[0] != "_"}
    assert added <= {"foundry_ext", "peft", "accelerate", "psutil"}, added
    assert "foundry_ext.models.smollm2" in modules
    others = {f"foundry_ext.{name}" for name in NOT_FOR_TRAINING}
    assert all(importlib.util.find_spec(name) for name in others), "one has another name now"
    assert not others & modules


def test_packing_loads_without_torch():
    loaded = packages(loaded_by("import foundry_ext.packing.algorithm"))
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "composer", "llmfoundry"}


# --- the benchmark -------------------------------------------------------------------------------


def test_marks_follow_one_another(monkeypatch):
    wall, cpu = iter([3.0, 4.5, 7.0, 9.0]), iter([1.0, 1.5, 3.5, 5.0])
    monkeypatch.setattr("benchmarks.startup.time.perf_counter", lambda: next(wall))
    monkeypatch.setattr("benchmarks.startup.time.process_time", lambda: next(cpu))
    marks = Marks(started=2.0)
    marks.mark("Python")
    assert marks.timed("model", lambda x: x + 1)(1) == 2
    marks.mark("model")
    assert marks.found == {
        "Python": [1.0, 1.0],
        "llm-foundry's train, all else": [1.5, 0.5],
        "model": [4.5, 3.5],
    }


def test_every_part_has_its_row():
    assert set(_BUILDERS.values()) <= PARTS.keys()


@pytest.mark.more
def test_a_start_is_measured(tmp_path, capsys):
    from benchmarks.startup import main

    tiny = ["variables.pack_tokens=64", "variables.max_seq_len=32", "global_train_batch_size=2"]
    tiny += ["model.config_overrides.num_hidden_layers=1", "model.config_overrides.vocab_size=500"]
    main(["--runs", "1", *tiny])
    table = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows[: len(PARTS)]] == list(PARTS)
    spent = {row[0].strip(): float(row[1]) for row in rows}
    for part in ("Python", "import torch", "import composer", "model"):
        assert spent[part] > 0, part
    assert spent["**all**"] == pytest.approx(sum(spent[part] for part in PARTS), abs=0.1)
