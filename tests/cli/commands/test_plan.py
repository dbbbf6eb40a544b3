"""`foundry-ext plan` and `train.py --dry-run`: same text, no training, one-line errors."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foundry_ext.cli.main import main
from foundry_ext.launch import train as launch
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture
def write(world, tmp_path, monkeypatch):
    """Return write("a.yaml", seed=3): write a run's file in an empty folder; return its name."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, **overrides) -> str:
        overrides = {"callbacks": {}, "loggers": {}, **overrides}
        config = kit.run_config(world, Path("outputs", name), **overrides)
        Path(name).write_text(OmegaConf.to_yaml(config))
        return name

    return make


def without_time(text: str) -> str:
    """Remove the time, which is measured again, and what follows it; the process grows."""
    return text.partition("\ntime\n")[0]


def test_both_commands_say_the_same_and_write_nothing(write, capsys):
    path = write("a.yaml", max_duration="4ba")
    before = sorted(Path().rglob("*"))
    assert main(["plan", path, "seed=3"]) == 0
    planned = capsys.readouterr().out
    assert launch.main("train.py", [path, "--dry-run", "seed=3"]) == 0
    dry = capsys.readouterr().out
    assert without_time(planned) == without_time(dry) != planned
    assert "plan of a.yaml: nothing is trained" in dry and "4 optimizer steps" in dry
    assert sorted(Path().rglob("*")) == before
    assert max(map(len, dry.splitlines())) < 200


STEPS = {
    "plan": ["loading", "data of train_loader", "sets page", "measuring"],
    "inspect": ["loading", "data of train_loader", "measuring"],
}


@pytest.mark.parametrize("command", STEPS)
def test_each_long_step_is_announced_on_a_terminal(write, world, monkeypatch, capsys, command):
    page = {"role": "forgetting", "type": "documents", "loader": kit.loader_config(world.eval_rows)}
    path = write("a.yaml", max_duration="4ba", callbacks={"forgetting": {"sets": {"page": page}}})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([command, path]) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    assert len(shown) == len(STEPS[command])
    assert all(part in line for part, line in zip(STEPS[command], shown, strict=True))


def test_overrides_are_planned(write, capsys):
    assert main(["plan", write("a.yaml"), "max_duration=6ba", "--memory", "12GB"]) == 0
    out = capsys.readouterr().out
    assert "6 optimizer steps" in out and "\n  12 GB " in out


def test_several_files_are_planned_one_after_another(write, capsys):
    files = [write("a.yaml"), write("bad.yaml", max_duration="9sec"), write("b.yaml")]
    assert launch.main("train.py", [*files, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert [name for name in files if f"plan of {name}:" in said.out] == ["a.yaml", "b.yaml"]
    (line,) = said.err.splitlines()
    assert line.startswith("train.py: error: bad.yaml: max_duration, '9sec', ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1"], "no .yaml file given"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["a.yaml", "sede=1"], "unknown top-level key, 'sede', did you mean 'seed'"),
        (["a.yaml", "train_loader.dataset.hf_name=gone.jsonl"], "gone.jsonl"),
        (["a.yaml", "train_loader.dataset.pack_tokens=8"], "pack_tokens: 8 is below max_seq_len"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(write, capsys, arguments, message):
    write("a.yaml")
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and not said.out
    assert launch.main("train.py", [*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_other_ranks_leave_it_to_the_first(write, capsys, monkeypatch):
    path = write("a.yaml", global_train_batch_size=4)
    for name in launch.ALONE:  # set back after the test
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launch.main("train.py", [path, "--dry-run"]) == 0
    assert not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert launch.main("train.py", [path, "--dry-run"]) == 0
    assert ", 2 processes: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["-3GB", "0", "much"])
def test_a_memory_that_is_none(text: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "a.yaml", f"--memory={text}"])
    assert ended.value.code == 2
    assert "give a number of gigabytes" in capsys.readouterr().err
