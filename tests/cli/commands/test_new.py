"""`foundry-ext new`: a folder whose commands work as they stand."""

import json
import re
from pathlib import Path

import pytest

from foundry_ext.cli import main as cli
from foundry_ext.cli.main import main
from foundry_ext.config.loading import load_config

METHODS = ("full", "lora", "dora", "rslora")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "an/experiment"]) == 0
    monkeypatch.chdir(tmp_path / "an/experiment")
    return Path()


def test_it_writes_what_its_readme_lists(folder: Path, capsys):
    yamls = {f"yamls/smollm2_{method}.yaml" for method in METHODS}
    data = {"data/train.jsonl", "data/eval.jsonl"}
    written = {path.as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {"train.py", "sweep.yaml", "README.md", *data, *yamls}
    readme = Path("README.md").read_text(encoding="utf-8")
    assert [name for name in written - {"README.md"} - yamls if name not in readme] == []
    assert "yamls/" in readme


def test_the_yamls_read_the_rows_of_the_folder_and_compare_fairly(folder: Path):
    configs = {}
    for method in METHODS:
        config = load_config(folder / f"yamls/smollm2_{method}.yaml", [])
        configs[method] = config
        for loader, name in (("train_loader", "train"), ("eval_loader", "eval")):
            path = Path(config[loader].dataset.hf_name)
            assert path == Path(f"data/{name}.jsonl")
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            assert rows and all(row.keys() == {"prompt", "response"} for row in rows)
    paths = [str(folder / f"yamls/smollm2_{method}.yaml") for method in METHODS]
    assert main(["check-fair", *paths]) == 0


def test_no_row_is_both_trained_and_held_out(folder: Path):
    train, held_out = (
        set(Path(f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines())
        for name in ("train", "eval")
    )
    assert len(train) == 400 and len(held_out) == 50 and not train & held_out


def test_the_sweep_lists_its_runs(folder: Path, capsys):
    assert main(["sweep", "sweep.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "12 runs" in printed and printed.count("composer train.py") == 12


def test_its_readme_names_commands_and_files_that_exist(folder: Path):
    text = Path("README.md").read_text(encoding="utf-8")
    (first, *rest) = re.findall(r"(?m)^(foundry-ext|composer) (.+)$", text)
    assert first[0] == "foundry-ext" and len(rest) >= 7
    for program, arguments in (first, *rest):
        words = arguments.split()
        assert program == "composer" or words[0] in cli.COMMANDS
        for word in words:
            if word.endswith((".yaml", ".py")):
                assert list(folder.glob(word)), word


def test_what_is_there_already_stays(tmp_path: Path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (
        ("full", "not empty; give the name"),
        ("file", "give the name of a new folder"),
    ):
        assert main(["new", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    assert (tmp_path / "file").read_text() == "mine"
