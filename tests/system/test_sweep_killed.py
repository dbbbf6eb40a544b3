"""State that a stopped or killed sweep leaves, and how the next start uses it."""

import os
import signal
from pathlib import Path

import pytest

from foundry_ext.sweeps.state import is_free, read_state
from foundry_ext.utils.errors import UserError
from tests.sweeps.kit import (
    enter,
    lines,
    names,
    run,
    run_and_kill,
    start_sweep,
    wait_for,
    write_sweep,
)

pytestmark = pytest.mark.more
SEEDS = {"seed": {"values": [17, 18]}}
RUNS = ["a-seed_17", "a-seed_18", "b-seed_17", "b-seed_18"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_runs_and_leaves_a_state_that_resumes(folder: Path, number: int):
    path = write_sweep(folder, {**SEEDS, "variables.seconds": {"value": 30}})
    sweep = start_sweep(folder, "--yes", "--parallel", "2", "--launcher", "subprocess")
    started = [f"{name}-seconds_30" for name in RUNS[:2]]
    wait_for(lambda: all((folder / "outputs" / n / "record.json").exists() for n in started))
    sweep.send_signal(number)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert "ending 2 runs" in out and "0 of 4 runs finished" in out
    state = read_state(folder / "outputs/sweeps/stand-in/state.json")
    statuses = [state[f"{name}-seconds_30"].status for name in RUNS]
    assert statuses == ["stopped", "stopped", "waiting", "waiting"]
    for name in started:
        assert is_free(folder / "outputs/sweeps/stand-in/locks" / name)
    _, said = run(path, dry_run=True)
    assert "4 to start" in said[0]


def test_two_sweeps_of_one_name_do_not_run_at_once(folder: Path):
    path = write_sweep(folder, {"variables.seconds": {"value": 30}})
    sweep = start_sweep(folder, "--yes", "--launcher", "subprocess")
    wait_for(lambda: names(folder))
    with pytest.raises(UserError, match=f"is running already, as process {sweep.pid}"):
        run(path)
    sweep.send_signal(signal.SIGINT)
    sweep.communicate(timeout=30)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = []
    for child in children.get(pid, []):
        found += [child, *descendants(child)]
    return found


@pytest.mark.parametrize("with_children", [False, True], ids=["orphans-go-on", "children-too"])
def test_a_sweep_killed_at_random_moments_ends_with_every_run_once(
    folder: Path, with_children: bool
):
    # Three seconds of work at least, so that a quiet machine too is killed in the middle of it.
    write_sweep(folder, {"seed": {"values": [1, 2, 3]}, "variables.seconds": {"value": 1}})
    run_and_kill(
        folder,
        lambda: start_sweep(folder, "--yes", "--parallel", "2", "--launcher", "subprocess"),
        descendants if with_children else lambda _: [],
    )
    assert len(names(folder)) == 6
    for name in names(folder):
        assert len(lines(folder, name, "ends")) == 1, name
        assert lines(folder, name, "overlaps") == []
        if not with_children:  # who was left alone was waited for, not started again
            assert len(lines(folder, name, "starts")) == 1, name


def test_a_child_of_a_killed_launcher_is_found_by_its_arguments(folder: Path):
    """Arguments identify it, because Composer's launcher does not pass its lock on to ranks."""
    (folder / "launch.py").write_text(
        "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    )
    write_sweep(
        folder,
        {"config": {"value": "a.yaml"}, "variables.seconds": {"value": 2}},
        command=["python", "launch.py", "${program}", "${args_no_hyphens}"],
    )
    sweep = start_sweep(folder, "--yes", "--launcher", "subprocess")
    wait_for(lambda: (folder / "outputs/a-seconds_2/record.json").exists())
    launcher = descendants(sweep.pid)[0]
    for pid in (sweep.pid, launcher):
        os.kill(pid, signal.SIGKILL)
    sweep.communicate()
    statuses, said = run(folder / "sweep.yaml")
    assert statuses == {"a-seconds_2": "finished"}
    assert any("still running since an earlier sweep" in line for line in said)
    assert len(lines(folder, "a-seconds_2", "starts")) == 1
