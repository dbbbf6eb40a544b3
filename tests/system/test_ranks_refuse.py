"""What one rank refuses all do: none waits for the others."""

import json
import subprocess
import sys

import pytest

from tests.system.ranks import ROOT
from tests.system.test_killed_rank import start


@pytest.mark.slow
def test_another_run_name_ends_both_ranks(world, tmp_path):
    first = start(world, tmp_path, False, last=2)
    assert first.wait(200) == 0, (tmp_path / "log").read_text()
    job = json.loads((tmp_path / "job.json").read_text())
    job["runs"]["run"]["run_name"] = "another"
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker = str(ROOT / "tests/system/rank_worker.py")
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", worker, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "another run_name: full, now another" in done.stderr + done.stdout
