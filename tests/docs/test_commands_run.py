"""Commands of README and docs run, unless a comment marks them as needing the hub or GPUs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from foundry_ext.launch import train
from tests.comparison import records
from tests.docs.test_pages import PAGES, ROOT, commands
from tests.system import preloaded

UNMARKED = sorted({shlex.join(c.words) for page in PAGES for c in commands(page) if not c.needs})
# Placeholders and options with which a command can run here.
PLACEHOLDERS = {"GRID_RUNS...": "grid_*", "MATCHED_RUNS...": "matched_*", "ENTITY/PROJECT": "me/p"}
ADDED = {"dashboard": ["--dry-run"]}  # which no server is there for
# Short, but as documented otherwise.
BRIEF = ["max_duration=4ba", "callbacks.text_samples.max_new_tokens=2"]


def foundry_ext_commands() -> list[str]:
    return [command for command in UNMARKED if command.startswith("foundry-ext ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that has what the commands' readers have by then."""
    for name in ("experiments", "train.py", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_runs(folder: Path) -> None:
    """Write finished runs of two methods, on a grid and at matched rates."""
    for method, rates in (("full", (1e-3, 2e-3)), ("lora", (5e-3, 1e-2))):
        for rate in rates:
            run = records.write_run(folder / "scratch", method, rate, 17, num_items=20)
            for name in ("outputs/smollm2-135m_metamathqa_", "grid_"):
                shutil.copytree(run, folder / f"{name}{run.name}")
        for seed in (17, 18, 19):
            run = records.write_run(folder / "scratch2", method, rates[0], seed, num_items=20)
            shutil.copytree(run, folder / f"matched_{run.name}")


def test_every_command_is_run_or_marked():
    """By this file, by .ci/run, or by the tests of the pages from scratch."""
    run = (ROOT / ".ci" / "run").read_text()
    for command in UNMARKED:
        program, first = command.split()[:2]
        assert (
            program == "foundry-ext"
            or (program == "make" and (first == "install" or f"make {first}" in run))
            or first.startswith("docs/from-scratch/")
            or "variables.model=outputs/quickstart/base/hf" in command
        ), f"{command}: run it in a test, or say in a comment that it needs the hub or GPUs"
    assert len(foundry_ext_commands()) >= 8


@pytest.mark.more
@pytest.mark.parametrize("command", foundry_ext_commands())
def test_a_command_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    write_runs(folder)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
    arguments = []
    for word in words:
        found = sorted(map(str, Path().glob(word))) if "*" in word else []
        arguments += found or [word]
    try:
        code = main([*arguments, *ADDED.get(words[0], [])])
    except SystemExit as end:  # --version
        code = end.code
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out.strip()


@pytest.mark.more
def test_the_laptop_s_training_runs_without_the_hub(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, make_rows
):
    from tests.training import kit

    (command,) = {c for c in UNMARKED if c.startswith("composer train.py")}
    made = kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)
    model = folder / "outputs/quickstart/base/hf"
    shutil.copytree(made.base, model)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, model)
    shutil.copy(made.rows, folder / "train.jsonl")
    shutil.copy(made.eval_rows, folder / "eval.jsonl")
    pages = folder / "outputs/quickstart/data/library_eval.jsonl"
    pages.parent.mkdir(parents=True)
    pages.write_text('{"text": "a bird because the river"}\n' * 8)
    words = [re.sub("max_seq_len=512", "max_seq_len=64", word) for word in shlex.split(command)[2:]]
    log = folder / "log"
    process = preloaded.start(
        train.main, "train.py", [*words, *BRIEF], log=log, folder=folder, HF_HUB_OFFLINE="1"
    )
    assert preloaded.wait([process], 240) == [0], log.read_text()[-6000:]
    assert list((folder / "outputs").glob("*/record.json")), log.read_text()[-3000:]
