"""What a run prints besides its steps: no configuration, and an end that says what to do next."""

import shlex
from pathlib import Path

import pytest

from foundry_ext.launch.console import format_end
from tests.system.bad_input.bench import Bench, environment
from tests.training import kit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Return a bench, and the output of a run that writes all that a run can."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        environment(monkeypatch)
        bench = Bench(tmp_path_factory.mktemp("outputs") / "full run", world, monkeypatch)
        bench.folder.mkdir()
        loader = kit.loader_config(world.eval_rows, eval_packs=1)
        sets = {
            "target": {"role": "learning", "type": "documents", "loader": loader},
            "source": {"role": "forgetting", "type": "documents", "loader": loader},
        }
        bench.change(
            callbacks__forgetting={"items": f"{bench.folder}/items.jsonl", "sets": sets},
            callbacks__exact_resume={},
            callbacks__hf_export={"folder": f"{bench.folder}/hf"},
            loggers__metrics_file={"path": f"{bench.folder}/metrics.jsonl"},
            eval_loader=loader,
            eval_first=True,
            eval_interval="2ba",
            log_to_console=True,
            console_log_interval="1ba",
            autoresume=True,
        )
        yield bench, bench.train("seed=18")


def test_the_configuration_is_not_printed_but_named(trained):
    bench, ended = trained
    assert ended.code == 0, ended.err
    shown = ended.out + ended.err
    assert "pretrained_model_name_or_path" not in shown and "Config:" not in shown
    assert "[batch=2/2]" in shown  # the console logger works on
    command = ["foundry-ext", "config", str(bench.folder / "run.yaml"), "seed=18"]
    assert f"`{shlex.join(command)}`" in ended.err
    assert "pretrained_model_name_or_path" in bench.command(*command[1:]).out
    assert bench.record()["config"]["model"]["pretrained_model_name_or_path"]


def test_the_end_names_files_and_commands_that_are_right(trained):
    bench, ended = trained
    headline, *lines = ended.out.rpartition("train.py: ")[2].splitlines()
    assert headline.startswith("full: finished after 2 steps, ") and "target loss" in headline
    shown = [line.split(maxsplit=1) for line in lines]
    places = {label: Path(place) for label, place in shown if label != "next"}
    names = ["record.json", "metrics.jsonl", "items.jsonl", "checkpoints", "hf"]
    assert [place.name for place in places.values()] == names
    assert all(place.parent == bench.folder for place in places.values())
    evaluate, compare = (shlex.split(text) for label, text in shown if label == "next")
    assert bench.command(*evaluate[1:]).code == 0
    assert (bench.folder / "eval/evaluation.json").is_file()
    assert "OTHER_RUN" in compare
    assert bench.command(*[word for word in compare[1:] if word != "OTHER_RUN"]).code == 0


def test_runs_of_the_same_experiment_are_compared(trained, monkeypatch):
    bench, _ = trained
    other = bench.folder.parent / "lora"
    other.mkdir()
    record = (bench.folder / "record.json").read_text(encoding="utf-8")
    (other / "record.json").write_text(record, encoding="utf-8")
    elsewhere = other.parent / "elsewhere"
    elsewhere.mkdir()
    text = record.replace('"experiment": "e"', '"experiment": "f"')
    (elsewhere / "record.json").write_text(text, encoding="utf-8")
    (other.parent / "broken").mkdir()
    (other.parent / "broken/record.json").write_text("{")
    *_, last = format_end(bench.config).splitlines()
    report = other.parent / "report"
    runs = [str(bench.folder), str(other)]
    assert shlex.split(last)[1:] == ["foundry-ext", "compare", *runs, "--out", str(report)]
    monkeypatch.setenv("FOUNDRY_EXT_SWEEP", "s")  # which prints such a command at its end
    assert "foundry-ext compare" not in format_end(bench.config)


def test_a_run_without_a_record_has_an_end_too(tmp_path):
    (tmp_path / "saved").mkdir()
    config = {"run_name": "a", "save_folder": str(tmp_path / "saved")}
    assert format_end(config).split() == [
        *("train.py:", "a:", "ended", "checkpoints", str(tmp_path / "saved"))
    ]
