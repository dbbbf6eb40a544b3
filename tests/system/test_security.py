"""Security: no code from data, weights or checkpoints, no shell, nothing outside its folder.

Other tests cover pages (preflight/inspect/test_packs.py, comparison/report/test_report.py), secrets
in the record and in W&B's files (training/callbacks/test_run_record.py,
training/loggers/test_wandb_metrics.py), and models and adapters as pickles (system/bad_input).
"""

import ast
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from omegaconf import OmegaConf

from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.safe_load import load_checkpoint
from foundry_ext.launch.train import train_here
from foundry_ext.records.record import read_record, validate
from tests.training import kit

ROOT = Path(__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "hf_" + "planted" * 5,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted8",
    "AWS_SECRET_ACCESS_KEY": "planted/in/the/environment",
    "MY_PASSWORD": "correct horse planted",
    "PGPASSWORD": "planted+in/the environment",
}
COMMAND_LINE = [
    "variables.other_api_key=planted-1",
    "variables.command_line_url=https://user:planted%2Fpassword-2@example.org/x",
    f"variables.hub_token=glpat-{'planted' * 4}",
]
# Prints secrets in many forms as a component of the user's would, and then ends the run.
PRINTER = """
import json, logging, os, sys
from urllib.parse import quote
from composer.core import Callback
from llmfoundry.registry import callbacks

@callbacks.register("printer")
class Printer(Callback):
    def fit_start(self, state, logger):
        for name in ("AWS_SECRET_ACCESS_KEY", "PGPASSWORD"):
            value = os.environ[name]
            print(value, repr(value), quote(value, safe=""), json.dumps({"x": value}))
            logging.getLogger("printer").warning("it is %s", value)
        print("of the command line: planted-1, planted/password-2", end="")
    def fit_end(self, state, logger):
        raise RuntimeError(f"no answer of https://me:planted-7@host/x with {dict(os.environ)}")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


# --- no code from files --------------------------------------------------------------------------


class Payload:
    """Object that makes a folder when an ordinary unpickler reads it."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_the_payload_is_one(tmp_path: Path):
    torch.save({"state": Payload(tmp_path / "made")}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "made").is_dir()


@pytest.fixture
def trap(world, tmp_path: Path) -> tuple[Path, Path]:
    """Return a checkpoint with a payload in a callback's state, and the folder it would make."""
    run = {"save_interval": "1dur", "max_duration": "1ba"}
    kit.run(kit.run_config(world, tmp_path, **run))
    path = kit.checkpoint(tmp_path, 1)
    state = torch.load(path, weights_only=False)
    state["state"]["callbacks"]["Spy"] = Payload(tmp_path / "made")
    torch.save(state, tmp_path / "trap.pt")
    return tmp_path / "trap.pt", tmp_path / "made"


def test_a_checkpoint_is_exported_without_running_code(trap: tuple[Path, Path], tmp_path: Path):
    path, made = trap
    with pytest.raises(ValueError, match=r"trap.pt holds (os|posix).mkdir, which could run code"):
        export_checkpoint(path, tmp_path / "out")
    assert not made.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["trap.pt", "trap", "trap.ckpt", "trap.pt.gz", "trap-0.pt"])
@pytest.mark.parametrize("way", ["callback", "train.py"])
def test_a_checkpoint_is_not_loaded_before_it_is_looked_at(world, trap, name: str, way: str):
    path, made = trap
    other = path.with_name(name)
    content = path.read_bytes()
    other.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    named = str(other).replace("-0", "-{rank}")
    callbacks: dict[str, Any] = {"spy": {}} if way == "train.py" else {"exact_resume": {}}
    settings = {"callbacks": callbacks, "load_path": named}
    config = kit.run_config(world, path.parent / "other", **settings)
    if way == "callback":
        with pytest.raises(ValueError, match=r"load_path: .*trap.* which could run code"):
            kit.run(config)
    else:
        (path.parent / "run.yaml").write_text(OmegaConf.to_yaml(config))
        assert train_here(path.parent / "run.yaml", config) == 2
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "extension"), [("../made", ".json"), ("made", ".py"), ("/tmp/made", ".txt")]
)
def test_a_checkpoint_s_tokenizer_writes_no_file_elsewhere(trap, name: str, extension: str):
    path, _ = trap
    state = torch.load(path.parent / "checkpoints/latest-rank0.pt", weights_only=False)
    files = state["state"]["integrations"]["huggingface"]["tokenizer"]
    files[name] = {"file_extension": extension, "content": ["x"]}
    torch.save(state, path)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match=r"the checkpoint's tokenizer has a file .*made"):
        export_checkpoint(path, path.parent / "out")
    assert sorted(path.parent.rglob("*")) == before


def test_rows_are_no_pickles(world, tmp_path: Path):
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    dataset = {"hf_name": "pandas", "hf_kwargs": {"data_files": str(tmp_path / "rows.pkl")}}
    config = kit.run_config(world, tmp_path)
    config.train_loader.dataset |= dataset
    with pytest.raises(ValueError, match="dataset pandas reads pickles"):
        kit.run(config)
    assert not (tmp_path / "made").exists()


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"state": Payload(tmp_path / "made")}))
    with pytest.raises(Exception, match=r"(?i)weights_only|could run code"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


def test_a_data_sets_own_script_is_not_run(world, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True)  # as by a variable
    folder = tmp_path / "rows"
    folder.mkdir()
    made = tmp_path / "made"
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    (folder / "train.jsonl").write_bytes(world.rows.read_bytes())
    config = kit.run_config(world, tmp_path, train_loader__dataset__hf_name=str(folder))
    with pytest.raises(ValueError, match=r"rows is loaded by a script of its own, which could run"):
        kit.run(config)
    assert not made.exists()


@pytest.mark.parametrize("given", ["rows.py:f", "__import__('os').mkdir('x')", "os", "no.such:f"])
def test_a_preprocessing_function_is_imported_by_name_alone(world, tmp_path, monkeypatch, given):
    """A file beside the data cannot be imported, and an expression is not a name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as where train.py lies beside it
    (tmp_path / "rows.py").write_text("import os\nos.mkdir('made')\ndef f(row):\n    return row\n")
    config = kit.run_config(world, tmp_path, train_loader__dataset__preprocessing_fn=given)
    with pytest.raises(ValueError, match=r"preprocessing_fn: .* is (no function that can|a file)"):
        kit.run(config)
    assert not (tmp_path / "made").exists() and not (tmp_path / "x").exists()


def test_no_yaml_trusts_remote_code():
    for path in ROOT.glob("yamls/**/*.yaml*"):
        assert "trust_remote_code" not in path.read_text(), path


# --- no shell ------------------------------------------------------------------------------------

CALLS = {"run", "Popen", "call", "check_call", "check_output"}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("pty", "spawn")}


def test_no_command_goes_through_a_shell():
    folders = ("foundry_ext", "benchmarks", "experiments")
    files = [ROOT / "train.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    found = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert tuple(name.split(".")) not in SHELLS and name not in ("eval", "exec"), path
            assert not any(keyword.arg == "shell" for keyword in node.keywords), path
            if name.startswith("subprocess.") and name.split(".")[1] in CALLS:
                found += 1
                command = node.args[0]
                text = isinstance(command, ast.JoinedStr) or (
                    isinstance(command, ast.Constant) and isinstance(command.value, str)
                )
                assert not text, f"{path}:{node.lineno}: a list, not a text"
    assert found >= 5


# --- nothing outside its folder ------------------------------------------------------------------


@pytest.mark.parametrize("items", ["../items.jsonl", "/etc/passwd", "a/../../b"])
def test_a_record_names_no_file_outside_its_folder(items: str, record: dict[str, Any]):
    with pytest.raises(ValueError, match=r"items: .* the record's folder"):
        validate({**record, "items": items})


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict[str, Any]:
    from tests.comparison.records import write_run

    return read_record(write_run(tmp_path_factory.mktemp("run"), "lora", 1e-2, 17) / "record.json")


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.more
def test_secrets_are_in_no_file_and_no_output(world, tmp_path: Path):
    """Secrets planted in the environment and in the YAML are in no file that a run leaves,
    including its checkpoints and W&B's files."""
    config = OmegaConf.to_container(kit.run_config(world, tmp_path))
    assert isinstance(config, dict)
    config["tokenizer"]["kwargs"]["token"] = SECRETS["HF_TOKEN"]
    config["model"]["use_auth_token"] = SECRETS["HF_TOKEN"]
    config["train_loader"]["dataset"]["hf_kwargs"] = {"token": SECRETS["HF_TOKEN"]}
    config |= {
        "variables": {
            "hub_token": SECRETS["HF_TOKEN"],
            "note": SECRETS["AWS_SECRET_ACCESS_KEY"],
            "api_key": "planted of the YAML",
            "other_api_key": "",
            "command_line_url": "",
            "url": "https://someone:planted-login@example.org/x?api_key=planted-parameter",
        },
        "callbacks": {
            "run_record": {"path": str(tmp_path / "record.json"), "experiment": "x"},
            "exact_resume": {},
            "hf_export": {"folder": str(tmp_path / "hf")},
            "printer": {},
        },
        "code_paths": [str(tmp_path / "printer.py")],
        "loggers": {
            "metrics_file": {"path": str(tmp_path / "metrics.jsonl")},
            "wandb_metrics": {
                "project": "x",
                "init_kwargs": {
                    "dir": str(tmp_path),
                    "notes": "planted of the YAML",
                    "config": {"service_password": "planted-5"},
                    "settings": {"console": "wrap", "disable_git": False},
                },
            },
        },
        "log_to_console": True,
        "log_config": True,
        "python_log_level": "debug",
        "max_duration": "2ba",
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
        "eval_interval": "1ba",
    }
    (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (tmp_path / "printer.py").write_text(PRINTER)
    environment = {
        **os.environ,
        **SECRETS,
        **{"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "run.yaml", *COMMAND_LINE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 1, done.stderr.decode()[-3000:]
    assert b"RuntimeError: no answer of https://[redacted]@host/x with" in done.stderr
    (tmp_path / "run.yaml").unlink()
    (tmp_path / "printer.py").unlink()
    (tmp_path / "output").write_bytes(done.stdout + done.stderr)
    assert b"run_name" in done.stdout + done.stderr, "the configuration was logged"
    searched = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    kinds = {path.suffix for path in searched}
    assert {".pt", ".json", ".jsonl", ".safetensors", ".wandb", ".log"} <= kinds
    metadata = next(tmp_path.rglob("wandb-metadata.json")).read_text(encoding="utf-8")
    assert "variables.other_api_key=[redacted]" in metadata
    assert b"of the command line: [redacted], [redacted]" in done.stdout
    shown = {
        f"{path.relative_to(tmp_path)}: {match.decode()}"
        for path in searched
        for match in re.findall(rb"[ -~]{0,40}planted[ -~]{0,20}", path.read_bytes())
    }
    assert not shown
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "failed"
