"""Handling of train.py's arguments, its files and failed runs."""

import dataclasses
import errno
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import MISSING, OmegaConf

from foundry_ext.config.loading import (
    load_config,
    record_path,
    split_arguments,
)
from foundry_ext.config.run_name import SWEEP_VARIABLES, sweep_run_name
from foundry_ext.config.top_level_keys import REQUIRED_KEYS, TOP_LEVEL_KEYS
from foundry_ext.launch.failures import explain
from foundry_ext.launch.sequence import ChildRunner, train_in_turn
from foundry_ext.launch.train import check_all, main, train_recorded
from foundry_ext.records.record import mark_failed, new_record, now, read_record, write_record
from foundry_ext.utils.errors import UserError

ROOT = Path(__file__).parents[2]
VALID = """
variables: {rows: 8}
max_seq_len: 32
model: {name: smollm2_packed, size: 135m}
tokenizer: {name: tok}
train_loader: {name: packed_finetuning, dataset: {rows: "${variables.rows}"}}
callbacks: {lr_monitor: {}}
eval_loader: [{label: a}]
optimizer: {name: decoupled_adamw, lr: 1e-3}
scheduler: {name: constant}
max_duration: 1ep
global_train_batch_size: 4
device_train_microbatch_size: 1
"""


RECORD = {
    "run_name": "a",
    "experiment": "e",
    "method": "full",
    "seed": 17,
    "learning_rate": 1e-3,
    "config": {},
    "environment": {
        "python": "3.11",
        "packages": {},
        "commit": None,
        "dirty": None,
        "device": "a CPU",
        "device_kind": "cpu",
        "world_size": 1,
    },
    "data": {
        "train": {
            "name": None,
            "revision": None,
            "fingerprint": None,
            "documents": None,
            "tokens": None,
            "counts": {},
        },
        "eval": {},
    },
    "model": {
        "name": "m",
        "parameters": 1,
        "trainable_parameters": 1,
        "rank": None,
        "alpha": None,
        "effective_scale": None,
        "target_modules": None,
        "init": None,
    },
}


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return write(tmp_path / "valid.yaml", VALID)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in (*ranks, *SWEEP_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_and_overrides_are_told_apart():
    files, overrides = split_arguments(["a.yaml", "seed=1", "b.yml", "load_path=x.yaml"])
    assert files == [Path("a.yaml"), Path("b.yml")]
    assert overrides == ["seed=1", "load_path=x.yaml"]


def test_a_sweep_gives_the_file_as_config():
    files, overrides = split_arguments(["config=a.yaml", "seed=1", "config=x"])
    assert files == [Path("a.yaml")]
    assert overrides == ["seed=1", "config=x"]  # which is refused as an unknown key


@pytest.mark.parametrize("arguments", [["a.yaml", "lr"], ["seed=1"], ["a.json"]])
def test_bad_arguments_are_refused(arguments: list[str]):
    with pytest.raises(UserError, match=r"(no|neither a) \.yaml file"):
        split_arguments(arguments)


def test_overrides_reach_nested_keys(valid: Path):
    config = load_config(valid, ["optimizer.lr=1e-4", "callbacks=null", "model.new=[1, 2]"])
    assert config.optimizer == {"name": "decoupled_adamw", "lr": 1e-4}
    assert config.callbacks is None
    assert config.model.new == [1, 2]
    assert config.train_loader.dataset.rows == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=3", "no key before '='"),
        ("model..name=3", "no key before '='"),
        ("seed=", "no value after '='"),
        ("seed=[1,", "value is not YAML"),
        ("model=3", "model is a mapping, which '3' would replace"),
        ("eval_loader=3", "eval_loader is a list, which '3' would replace"),
        ("eval_loader[0].label=b", "eval_loader is a list, not a mapping"),
        ("model.name.x=3", "model.name is a single value"),
        ("optimiser.lr=3", "unknown top-level key, 'optimiser', did you mean 'optimizer'"),
        ("max_duraton=3ba", "unknown top-level key, 'max_duraton', did you mean 'max_duration'"),
        ("variables.row=3", "no variable 'row', did you mean 'rows'? the file has rows"),
        ("seed=${variables.sed}", "seed, Interpolation key 'variables.sed' not found"),
        ("device_train_microbatch_size=auto", "'auto', does not go with train_loader packed_fine"),
    ],
)
def test_wrong_overrides_are_refused(valid: Path, override: str, message: str):
    with pytest.raises(UserError) as raised:
        load_config(valid, [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_compile_goes_with_packs_of_one_shape(valid: Path):
    for shape in ([], ["train_loader.dataset.fixed_shape=true"]):
        assert load_config(valid, ["model.compile=layers", *shape]).model.compile == "layers"
    expected = "model.compile, 'layers', needs packs of one shape; set train_loader.dataset.fixed"
    with pytest.raises(UserError, match=expected):
        load_config(valid, ["model.compile=layers", "train_loader.dataset.fixed_shape=false"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "not valid YAML at line 3"),
        ("a: 1\na: 2\n", "not valid YAML at line 2"),
        ("- a\n- b\n", "a list, not a mapping"),
        ("3\n", "a single value, not a mapping"),
        ("", "empty, not a mapping"),
        (VALID + "modle: 3\n", "unknown top-level key, 'modle', did you mean 'model'?"),
        (VALID + "zzz: 3\n", "'zzz'; put values of your own under variables:"),
        (VALID + "seed: ${variables.no}\n", "seed, Interpolation key 'variables.no' not found"),
        (VALID.replace("max_duration: 1ep", ""), "missing top-level key, max_duration"),
        (VALID.replace("device_train_microbatch_size: 1", ""), "missing; set it to 1"),
        (VALID.replace("microbatch_size: 1", "microbatch_size: auto"), "'auto', does not go with"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(UserError) as raised:
        load_config(path, [])
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


GRID = VALID.replace("rows: 8", "rows: 8, rates: {low: 1e-4, high: 1e-3}, rate: low").replace(
    "lr: 1e-3", 'lr: "${variables.rates.${variables.rate}}"'
)


def test_a_rate_is_chosen_from_the_methods_own_grid_by_name(tmp_path: Path):
    path = write(tmp_path / "run.yaml", GRID)
    assert load_config(path, []).optimizer.lr == 1e-4
    assert load_config(path, ["variables.rate=high"]).optimizer.lr == 1e-3
    with pytest.raises(UserError) as raised:
        load_config(path, ["variables.rate=hihg"])
    assert str(raised.value) == (
        f"{path}: optimizer.lr, Interpolation key 'variables.rates.hihg' not found; "
        "known: low, high, did you mean 'high'?"
    )


@pytest.mark.parametrize("variable", SWEEP_VARIABLES)
def test_runs_of_a_sweep_have_a_name_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
):
    text = GRID + 'run_name: lora\nsave_folder: "outputs/${run_name}"\n'
    path = write(tmp_path / "run.yaml", text)
    overrides = ["seed=18", "variables.rate=high"]
    assert load_config(path, overrides).run_name == "lora"
    monkeypatch.setenv(variable, "x1")
    config = load_config(path, overrides)
    assert config.run_name == "lora-seed_18-rate_high"
    assert config.save_folder == "outputs/lora-seed_18-rate_high"
    assert load_config(path, overrides[::-1]).run_name == config.run_name
    assert load_config(path, [*overrides, "run_name=mine"]).run_name == "mine"
    assert load_config(path, []).run_name == "lora"
    path = write(tmp_path / "nameless.yaml", VALID)
    assert load_config(path, ["seed=18"]).run_name == "nameless-seed_18"


def test_no_secret_is_in_a_sweep_run_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = VALID.replace("rows: 8", "rows: 8, api_key: x, url: y")
    path = write(tmp_path / "lora.yaml", text)
    monkeypatch.setenv(SWEEP_VARIABLES[0], "x1")
    secrets = ["variables.api_key=planted-1", "variables.url=https://me:planted-2@host"]
    name = load_config(path, ["seed=18", *secrets]).run_name
    assert name.startswith("lora-seed_18") and "planted" not in name and "api_key" not in name


def test_names_of_runs_are_short_safe_and_different():
    name = sweep_run_name
    assert name("a", {"model.peft_config": {"r": 16, "lora_alpha": 32}}) == "a-lora_alpha_32-r_16"
    assert name("a", {"x.lr": 1e-4, "y.lr": 3.0}) == "a-x.lr_0.0001-y.lr_3"  # told apart
    assert name("a", {"lr": 3}) == name("a", {"lr": 3.0})
    odd = [name("a", {"f": text}) for text in ("x/y", "x_y", "../x", "x y", "x" * 300, "x" * 301)]
    assert len(set(odd)) == len(odd)
    for text in odd:
        assert re.fullmatch(r"a-f_[A-Za-z0-9._-]+", text) and len(text) <= 100
    assert "/" not in name("a/../b", {"f": 1})


def test_auto_is_left_to_other_loaders(tmp_path: Path):
    text = VALID.replace("packed_", "").replace("microbatch_size: 1", "microbatch_size: auto")
    assert load_config(write(tmp_path / "run.yaml", text), [])


def test_a_missing_file_brings_near_names(valid: Path):
    with pytest.raises(UserError, match=r"vaild\.yaml: no such file, did you mean .*valid\.yaml"):
        load_config(valid.with_name("vaild.yaml"), [])


def test_a_mistake_in_one_file_is_reported_and_leaves_the_others(valid: Path, tmp_path: Path):
    wrong = write(tmp_path / "wrong.yaml", VALID + "modle: 3\n")
    configs, complaints = check_all([wrong, valid, tmp_path / "none.yaml"], [])
    assert [path for path, _ in configs] == [valid]
    assert [line.split(":")[0] for line in complaints] == [str(wrong), str(tmp_path / "none.yaml")]


def test_main_trains_the_files_without_a_mistake_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    stub = write(tmp_path / "stub.py", STUB)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", VALID)
    assert main(str(stub), ["a.yaml", "bad.yaml", "b.yaml"]) == 1
    assert Path("log").read_text() == "a.yaml\nbad.yaml\nb.yaml\n"
    assert capsys.readouterr().err.startswith("train.py: error: bad.yaml: no such file")
    assert main(str(stub), ["bad.yaml", "worse.yaml"]) == 2  # nothing to train
    assert Path("log").read_text() == "a.yaml\nbad.yaml\nb.yaml\n"


@pytest.mark.parametrize("override", ["run_name=x", "save_folder=x"])
def test_one_name_for_several_runs_is_refused(valid: Path, tmp_path: Path, override: str):
    other = write(tmp_path / "other.yaml", VALID)
    assert check_all([valid], [override])
    with pytest.raises(UserError, match="overwrite one another"):
        check_all([valid, other], [override])


def test_one_save_folder_for_several_runs_is_refused(tmp_path: Path):
    texts = {name: f"{VALID}run_name: {name}\nsave_folder: out/{{run_name}}\n" for name in "ab"}
    a, b = (write(tmp_path / f"{name}.yaml", text) for name, text in texts.items())
    assert check_all([a, b], [])
    with pytest.raises(UserError, match="is that of"):
        check_all([a, a], [])


OUTPUTS = {
    "save_folder": "save_folder: PLACE\n",
    "run_record": "callbacks: {run_record: {path: PLACE, experiment: e}}\n",
    "items": "callbacks: {forgetting: {items: PLACE, sets: {}}}\n",
    "hf_export": "callbacks: {hf_export: {folder: PLACE}}\n",
    "metrics": "loggers: {metrics_file: {path: PLACE}}\n",
}


def with_output(path: Path, name: str, output: str, place: str) -> Path:
    text = VALID.replace("callbacks: {lr_monitor: {}}\n", "")
    return write(path, f"{text}run_name: {name}\n{OUTPUTS[output].replace('PLACE', place)}")


@pytest.mark.parametrize("first", OUTPUTS)
@pytest.mark.parametrize("second", OUTPUTS)
def test_one_place_for_several_runs_is_refused_before_the_first(
    tmp_path: Path, first: str, second: str
):
    a = with_output(tmp_path / "a.yaml", "a", first, "out/x")
    b = with_output(tmp_path / "b.yaml", "b", second, "out/../out/x")
    with pytest.raises(UserError, match=r"b\.yaml: .*x', is that of .*a\.yaml"):
        check_all([a, b], [])
    assert check_all([a, with_output(tmp_path / "c.yaml", "c", second, "'out/{run_name}'")], [])


@pytest.mark.parametrize(
    "name",
    [
        *("../../esc", "..", ".", "/tmp/esc", "a/b", "a\\b", "''", "' '", "x" * 201, "ä" * 101),
        *('"a\\tb"', '"a\\x1b[31m"', '"a\\nb"', '"a\\0"', '"\\u202ea"', "'{rank}'", "'{run_name}'"),
    ],
)
def test_names_of_runs_are_names(tmp_path: Path, name: str):
    path = write(tmp_path / "run.yaml", f"{VALID}run_name: {name}\n")
    with pytest.raises(UserError, match=r"run\.yaml: run_name, ") as refused:
        load_config(path)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)
    if not name.startswith(("'", '"')):
        with pytest.raises(UserError, match="run_name, "):
            load_config(write(tmp_path / "valid.yaml", VALID), [f"run_name={name}"])


@pytest.mark.parametrize("name", ["lora", "a b", "lora-seed_17", "1.7b", ".hidden", "ü", "..a"])
def test_other_names_are_kept(tmp_path: Path, name: str):
    assert load_config(write(tmp_path / "run.yaml", f"{VALID}run_name: {name}\n")).run_name == name


def test_a_full_disk_names_the_key_of_the_file():
    config = {
        "run_name": "a",
        "max_seq_len": 8,
        "save_folder": "out/{run_name}/checkpoints",
        "callbacks": {"hf_export": {"folder": "out/a/hf"}, "run_record": {"path": "r.json"}},
        "loggers": {"metrics_file": {"path": "/elsewhere/{run_name}.jsonl"}},
    }
    for path, key in {
        "out/a/hf": "callbacks.hf_export.folder",
        "out/a/hf/model.safetensors": "callbacks.hf_export.folder",
        "r.json": "callbacks.run_record.path",
        "/elsewhere/a.jsonl": "loggers.metrics_file.path",
        "out/a/checkpoints/x.pt": "save_folder",
    }.items():
        said = explain(OSError(errno.ENOSPC, "No space left on device", path), config)
        assert said is not None and path in said and f"another disk in {key}," in said


def test_a_run_without_a_step_left_says_what_to_do():
    said = explain(
        ValueError("... elapsed (4). No training would occur. "), {"max_duration": "4ba"}
    )
    assert said is not None and said.startswith("max_duration, 4ba: ")
    assert "extend max_duration, or add callbacks.exact_resume" in said


def test_a_hidden_error_explains_nothing():
    try:
        try:
            raise FloatingPointError("hidden")
        except FloatingPointError:
            raise KeyError("shown") from None
    except KeyError as error:
        assert explain(error, {}) is None


def test_several_files_on_several_nodes_are_refused(
    valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several nodes"):
        check_all([valid, write(tmp_path / "other.yaml", VALID)], [])


def test_main_prints_one_line_on_rank_0_alone(
    valid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main("train.py", [str(valid), "modle=3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"train.py: error: {valid}: unknown top-level key, 'modle'")
    assert err.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main("train.py", [str(valid), "modle=3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_the_command_itself_answers_without_llm_foundry(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "nothing.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "train.py: error: nothing.yaml: no such file\n"
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert spent < 5  # CPU seconds, of which llm-foundry's import takes more


@pytest.mark.parametrize("error", [ValueError("x y"), KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_run_is_in_its_record(tmp_path: Path, error: BaseException):
    config = OmegaConf.create(
        {"run_name": "a", "callbacks": {"run_record": {"path": f"{tmp_path}/{{run_name}}/r.json"}}}
    )
    path = tmp_path / "a" / "r.json"
    assert record_path(config) == path

    def train(_: object) -> None:
        write_record(path, new_record(**RECORD))
        raise error

    with pytest.raises(type(error)):
        train_recorded(train, config)
    record = read_record(path)
    assert record["status"] == "failed"
    assert record["error"] == f"{type(error).__name__}: {error}"
    write_record(path, {**record, "status": "running", "ended": None})
    mark_failed(path, error, since=now())  # it was written before: an earlier process's
    assert read_record(path)["status"] == "running"
    with pytest.raises(type(error)):  # without a record there is nothing to say
        train_recorded(train, OmegaConf.create({"callbacks": None}))


STUB = """
import os, sys
path, *overrides = sys.argv[1:]
with open("log", "a") as log:
    print(path, *overrides, file=log)
sys.exit(3 if "bad" in path else 0)
"""


def test_one_failing_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    stub = write(tmp_path / "stub.py", STUB)
    files = [Path("a.yaml"), Path("bad.yaml"), Path("b.yaml")]
    assert train_in_turn(str(stub), files, ["seed=1"]) == 1
    assert Path("log").read_text() == "a.yaml seed=1\nbad.yaml seed=1\nb.yaml seed=1\n"
    summary = capsys.readouterr().out.splitlines()[-4:]
    assert summary[0] == "train.py: 2 of 3 runs succeeded"
    assert [line.split(" ")[2] for line in summary[1:]] == ["ok", "exit", "ok"]
    assert train_in_turn(str(stub), files[::2], []) == 0


def test_other_ranks_leave_the_sequence_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert train_in_turn("no_such_script.py", [tmp_path / "a.yaml"], []) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_launcher", [False, True])
def test_a_launcher_below_gets_an_environment_of_its_own(
    monkeypatch: pytest.MonkeyPatch, is_launcher: bool
):
    monkeypatch.setenv("MASTER_PORT", "1234")
    check = "import os, sys; sys.exit('MASTER_PORT' in os.environ)"
    runner = ChildRunner(is_launcher=is_launcher)
    assert runner.run([sys.executable, "-c", check]) == (0 if is_launcher else 1)


SIGNALLED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
open("started", "w").close()
time.sleep(60)
"""


def test_a_signal_reaches_the_child_and_ends_the_sequence(tmp_path: Path):
    stub = write(tmp_path / "stub.py", SIGNALLED)
    code = (
        "import sys; from pathlib import Path;"
        "from foundry_ext.launch.sequence import train_in_turn;"
        f"sys.exit(train_in_turn({str(stub)!r}, [Path('a.yaml'), Path('b.yaml')], []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    summary = out.splitlines()[-3:]
    assert summary[0] == "train.py: 0 of 2 runs succeeded"
    assert "exit code 5" in summary[1]
    assert "not started" in summary[2]


TRAIN = "llmfoundry.command_utils.train"
PLAN = "foundry_ext.preflight.plan.plan.plan_config"


def fails(monkeypatch: pytest.MonkeyPatch, folder: Path, target: str, error: Exception) -> int:
    """The exit code of a run, or of its plan, in which `target` raises `error`."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(target, fail)
    text = VALID.replace("size: 135m", "pretrained_model_name_or_path: smollm2-135m")
    text = text.replace("eval_loader: [{label: a}]\n", "")
    text = text.replace("name: constant", "name: constant_with_warmup, t_warmup: 0ba")
    path = write(folder / "run.yaml", text)
    return main("train.py", [str(path), *["--dry-run"] * (target == PLAN)])


@pytest.mark.parametrize("target", [TRAIN, PLAN])
@pytest.mark.parametrize("error", [UserError("x"), OSError("x")])
def test_a_mistake_of_the_user_or_of_the_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, target: str, error: Exception
):
    code = fails(monkeypatch, tmp_path, target, error)
    assert code == (1 if target == TRAIN and isinstance(error, OSError) else 2)
    expected = f"train.py: error: {tmp_path}/run.yaml: x (--traceback shows the traceback)"
    said = capsys.readouterr().err  # llm-foundry's import may warn
    assert [line for line in said.splitlines() if line.startswith("train.py")] == [expected]
    assert "Traceback" not in said


@pytest.mark.parametrize("target", [TRAIN, PLAN])
def test_a_bug_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, target: str
):
    bug = ValueError("a bug")
    with pytest.raises(ValueError) as raised:
        fails(monkeypatch, tmp_path, target, bug)
    assert raised.value is bug
    assert raised.traceback[-1].name == "fail"
    assert "train.py: error" not in capsys.readouterr().err


def test_llm_foundry_is_itself_again_after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module(TRAIN)
    before = dict(vars(module))
    assert fails(monkeypatch, tmp_path, TRAIN, OSError("x")) == 1
    changed = {name for name, value in vars(module).items() if value is not before.get(name)}
    assert changed == set()


def test_top_level_keys_are_those_of_llm_foundry():
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig

    derived = {"device_eval_batch_size", "device_train_batch_size", "device_train_grad_accum"}
    without_default = {
        field.name for field in dataclasses.fields(TrainConfig) if field.default == MISSING
    }
    # The four that llm-foundry derives, and the two batch sizes that it reads without a default.
    batch_sizes = {"device_train_microbatch_size", "global_train_batch_size"}
    assert without_default - derived - {"n_gpus"} | batch_sizes == REQUIRED_KEYS
    assert TOP_LEVEL_KEYS == TRAIN_CONFIG_KEYS
