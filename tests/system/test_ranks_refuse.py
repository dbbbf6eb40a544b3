"""If one rank refuses a run, all ranks end and none waits for the others."""

import json

import pytest

from tests.system.ranks import fork_ranks
from tests.system.test_killed_rank import start, write_job


@pytest.mark.more
def test_another_run_name_ends_both_ranks(world, tmp_path):
    write_job(world, tmp_path, False, last=2)
    fork_ranks(tmp_path, 2)
    job = json.loads((tmp_path / "job.json").read_text())
    job["runs"]["run"]["run_name"] = "another"
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert start(tmp_path).wait(200) != 0
    assert "another run_name: full, now another" in (tmp_path / "log").read_text()
