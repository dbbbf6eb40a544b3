"""One attention for all runs of a sweep, asked for once."""

import sys
from pathlib import Path

import pytest

from foundry_ext.sweeps import attention
from foundry_ext.sweeps.run import run_sweep
from foundry_ext.utils.constants import CPU_ATTENTION
from tests.sweeps.kit import lines, run, write_sweep

pytestmark = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
ASKED = "open('asked', 'a').write('x'); print('{}')"


@pytest.fixture(autouse=True)
def ask(monkeypatch):
    """Return ask(name): let the process that measures answer `name`."""
    monkeypatch.delenv(CPU_ATTENTION)

    def answer(name: str) -> None:
        monkeypatch.setattr(attention, "_ASK", ASKED.format(name))

    answer("torch_cpu")
    return answer


def given(folder: Path, name: str) -> list[str]:
    return [line.partition(" ")[2] for line in lines(folder, name, "attention")]


@pytest.mark.parametrize("launcher", ["fork", "subprocess"])
def test_all_runs_get_it_also_after_a_restart(folder, ask, launcher):
    path = write_sweep(folder, {"seed": {"values": [17, 18]}})
    run_sweep(path, num_runs=2, launcher=launcher)
    ask("sdpa")
    run_sweep(path, launcher=launcher)
    for name in ("a-seed_17", "a-seed_18", "b-seed_17", "b-seed_18"):
        assert given(folder, name) == ["torch_cpu"], name
    assert (folder / "asked").read_text(encoding="utf-8") == "x"


def test_a_sweep_of_an_earlier_version_stays_with_blockwise(folder):
    path = write_sweep(folder, {"seed": {"values": [17]}})
    run(path, num_runs=1)
    (folder / "outputs/sweeps/stand-in/cpu_attention").unlink()
    (folder / "asked").unlink()
    run(path)
    assert (given(folder, "a-seed_17"), given(folder, "b-seed_17")) == (
        ["torch_cpu"],
        ["blockwise"],
    )
    assert not (folder / "asked").exists()


def test_nothing_is_asked_where_the_yaml_or_the_variable_decides(folder, monkeypatch):
    named = {"model.attention_backend": {"values": ["sdpa"]}}
    run(write_sweep(folder, named))
    monkeypatch.setenv(CPU_ATTENTION, "blockwise")
    run(write_sweep(folder, {"seed": {"values": [18]}}))
    assert not (folder / "asked").exists()
    assert given(folder, "a-seed_18") == ["blockwise"]


def test_what_is_asked_is_what_auto_measures(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert attention.subprocess.run(
        [sys.executable, "-c", attention._ASK], capture_output=True, encoding="utf-8", check=True
    ).stdout.split() == ["blockwise"]  # from the variable that all tests have
