"""The files for rented machines, without their tools: names, and what a signal does."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.docs.rented import (
    MODAL,
    ROOT,
    SKY,
    SLURM,
    check_kept,
    lines,
    program,
    project,
    sky_sections,
    wait_for,
)
from tests.docs.test_pages import folder as page_folder
from tests.docs.test_pages import problem

folder = page_folder  # a fixture
PAGE = ROOT / "docs/how-to/rented-machines.md"
FILES = [SLURM, SKY, MODAL, PAGE]
BEGINNING = r"(?:(?:composer|python) train\.py|foundry-ext (?:sweep|tasks)|make install)"


def named_commands(text: str) -> list[list[str]]:
    """Return the project's own commands that the text names, as words."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(rf"({BEGINNING}[^\"'`\n]*)", text.replace(" ...", ""))
    return [shlex.split(command.partition("  #")[0], comments=True) for command in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_and_files_that_it_names_exist(path: Path, folder: None):
    text = path.read_text(encoding="utf-8")
    commands = named_commands(text)
    assert [words for words in commands if words[0] in ("composer", "foundry-ext")]
    for words in commands:
        try:
            wrong = problem(words) if words[1] != "tasks" else None
        except (SystemExit, ValueError) as error:
            wrong = str(error)
        assert wrong is None, f"{shlex.join(words)}: {wrong}"
    for name in re.findall(r"docs/[\w/-]+\.(?:sh|yaml|py|md)|requirements\.lock", text):
        assert (ROOT / name).is_file(), name


def test_a_wrong_name_is_noticed(folder: None):
    (words,) = named_commands('--command "composer train.py yamls/smollm2_lorra.yaml"')
    assert problem(words) == "no file yamls/smollm2_lorra.yaml"


def test_all_run_the_same_yaml_and_set_the_same_environment_up():
    default = yaml.safe_load(SKY.read_text(encoding="utf-8"))["envs"]["COMMAND"]
    for path in (SLURM, MODAL):
        assert default in path.read_text(encoding="utf-8"), path.name
    setup, run = sky_sections()
    for text in (SLURM.read_text(encoding="utf-8"), setup):
        assert "\nmake install" in text and "\nsource .venv/bin/activate" in text
    assert "source .venv/bin/activate" in run


def test_no_file_holds_a_key():
    for path in FILES:
        for value in re.findall(r"(?:API_KEY|TOKEN)[=:] *(\S*)", path.read_text(encoding="utf-8")):
            assert value in ("null", "..."), f"{path}: {value}"


class Slurm:
    """The job script under a stand-in of Slurm's commands, which say that the job is in `state`."""

    def __init__(self, folder: Path, state: str):
        self.folder, self.metrics = folder, folder / "outputs/run/metrics.jsonl"
        self.requeued = folder / "requeued"
        project(folder)
        program(folder / "bin/squeue", f"#!/bin/bash\necho {state}\n")
        program(folder / "bin/scontrol", f'#!/bin/bash\necho "$@" >> {self.requeued}\n')
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        words = ["bash", str(SLURM), *command]
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment, start_new_session=True
        )


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_slurm_saves_on_a_signal_and_requeues_a_job_that_runs(tmp_path: Path, state: str):
    """Only the script is signalled while the job runs; all processes when it is pre-empted."""
    slurm, is_running = Slurm(tmp_path, state), state == "RUNNING"
    job = slurm.start("./command")
    wait_for(lambda: lines(slurm.metrics))
    job.terminate()
    if not is_running:
        os.kill(int((tmp_path / "pid").read_text("utf-8")), signal.SIGTERM)
    time.sleep(0.3)
    job.terminate()  # Slurm repeats it
    assert job.wait(20) == (130 if is_running else 143)
    assert lines(slurm.requeued) == (["requeue 7"] if is_running else [])
    assert (tmp_path / "outputs/run/checkpoints/ba1.pt").exists()

    assert slurm.start("./command").wait(20) == 0
    assert lines(slurm.metrics) == ["started", "started", "continued"]
    assert len(lines(slurm.requeued)) == is_running


def test_slurm_requeues_no_run_that_fails_or_finishes(tmp_path: Path):
    slurm = Slurm(tmp_path, "RUNNING")
    assert slurm.start("false").wait(20) == 1
    assert slurm.start("true").wait(20) == 0
    assert slurm.start().wait(20) == 2  # no command
    program(
        tmp_path / "last",
        "#!/bin/bash\ntrap 'exit 0' INT\ntouch begun\nwhile sleep 0.1; do :; done\n",
    )
    job = slurm.start("./last")  # finishes although a signal came
    wait_for((tmp_path / "begun").exists)
    job.terminate()
    assert job.wait(20) == 0
    assert lines(slurm.requeued) == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync; the slow test brings one")
def test_skypilot_keeps_a_stopped_command(tmp_path: Path):
    check_kept(tmp_path, Path(shutil.which("rsync") or "").parent)


def test_skypilot_does_not_empty_the_bucket_if_it_cannot_be_read(tmp_path: Path):
    project(tmp_path)
    log = tmp_path / "log"
    program(tmp_path / "bin/rsync", f'#!/bin/bash\necho "$@" >> {log}\nexit 23\n')
    text = sky_sections()[1].replace("/kept/", f"{tmp_path}/kept/")
    environment = {**os.environ, "COMMAND": "true", "RUN": "one"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment).returncode == 23
    (copied,) = lines(log)
    assert "--delete" not in copied


STAND_IN = """
import sys, types, unittest.mock
modal = sys.modules["modal"] = unittest.mock.MagicMock()
modal.App.return_value.function = lambda **_: lambda function: function
modal.App.return_value.local_entrypoint = lambda: lambda function: function
sys.path.insert(0, {folder!r})
import modal_train
modal_train.PROJECT = "."
modal_train.outputs.commit = lambda: print("committed", flush=True)
print("returned", modal_train.train(sys.argv[1]))
"""


def test_modal_saves_and_commits_before_a_container_ends(tmp_path: Path):
    project(tmp_path)
    code = STAND_IN.format(folder=str(MODAL.parent))
    command = [sys.executable, "-B", "-c", code]
    metrics = tmp_path / "outputs/run/metrics.jsonl"

    def start(words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, words], cwd=tmp_path, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    container = start("./command")
    wait_for(lambda: lines(metrics))
    os.killpg(container.pid, signal.SIGINT)
    said, error = container.communicate(timeout=20)
    assert said == "committed\n" and "KeyboardInterrupt" in error, "raised, so Modal starts again"
    assert (tmp_path / "outputs/run/checkpoints/ba1.pt").exists()
    assert start("./command").communicate(timeout=20)[0] == "committed\nreturned 0\n"
    assert lines(metrics) == ["started", "started", "continued"]
    assert start("false").communicate(timeout=20)[0] == "committed\nreturned 1\n"
