"""The dashboard as wandb-workspaces sends it, to a server on this machine.

golden/workspace.json is the view that arrives, without the ids that are drawn anew each time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.loggers.wandb_server import serving
from tests.training.loggers.wandb_store import Store

pytestmark = pytest.mark.more  # the package wandb keeps a server's address: a process each
GOLDEN = Path(__file__).with_name("golden")


def make(server: Store, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `foundry-ext dashboard me/trials` with this server in W&B's place."""
    own = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40, "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "foundry_ext.cli", "dashboard", "me/trials"],
        env={**os.environ, "NETRC": str(folder / "netrc"), **own, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_ids(view: Any) -> Any:
    if isinstance(view, dict):
        return {key: without_ids(x) for key, x in view.items() if key not in ("__id__", "id")}
    return [without_ids(item) for item in view] if isinstance(view, list) else view


def test_the_view_that_arrives_is_the_golden_one(tmp_path: Path):
    with serving(Store()) as server:
        done = make(server, tmp_path)
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert done.stdout == f"made: {server.address}/me/trials?nw={view['name'][3:-2]}\n"
    assert (view["entityName"], view["projectName"]) == ("me", "trials")
    assert (view["displayName"], view["type"]) == ("foundry_ext", "project-view")
    arrived = without_ids(json.loads(view["spec"]))
    expected = json.loads((GOLDEN / "workspace.json").read_text(encoding="utf-8"))
    assert arrived == expected


def test_the_two_golden_files_have_the_same_panels():
    specification = json.loads((GOLDEN / "dashboard.json").read_text(encoding="utf-8"))
    view = json.loads((GOLDEN / "workspace.json").read_text(encoding="utf-8"))
    sent = view["section"]["panelBankConfig"]["sections"]
    assert [one["name"] for one in sent] == [one["name"] for one in specification["sections"]]
    for section, arrived in zip(specification["sections"], sent, strict=True):
        titles = [panel.get("title") for panel in section["panels"]]
        assert [panel["config"].get("chartTitle") for panel in arrived["panels"]] == titles


def test_a_server_that_refuses_is_one_line(tmp_path: Path):
    class Refusing(Store):
        def _UpsertView2(self, variables):
            return {"upsertView": None}

    with serving(Refusing()) as server:
        done = make(server, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "me/trials: W&B did not take the dashboard" in done.stderr


def test_without_a_login_it_says_so(tmp_path: Path):
    with serving(Store()) as server:
        done = make(server, tmp_path, WANDB_API_KEY="")
    assert done.returncode == 2 and "is there a login" in done.stderr, done.stderr
    assert server.views == []
