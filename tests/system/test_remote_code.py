"""Code that comes with a tokenizer, a model or an adapter never runs, and nobody is asked.

Every trap is a folder whose code makes a file. The terminal's answer to any question is "y".
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.cli.main import main
from foundry_ext.data.sources import load_rows
from foundry_ext.launch import train as launch
from foundry_ext.launch.building import no_questions
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.remote_code import code_only_if_trusted
from tests.training import kit

ROOT = Path(__file__).parents[2]
CODE = """
from transformers import LlamaConfig, PreTrainedTokenizerFast
open({made!r}, "w").close()
class Trap(PreTrainedTokenizerFast):
    pass
class TrapConfig(LlamaConfig):
    model_type = "trap"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory) -> Path:
    """Return a finished run's folder with a LoRA's checkpoint, and its export in `hf`."""
    folder = tmp_path_factory.mktemp("run")
    run = {"save_interval": "1dur", "max_duration": "1ba"}
    kit.run(kit.run_config(world, folder, "lora", **run))
    export_checkpoint(kit.checkpoint(folder, 1), folder / "hf")
    return folder


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch):
    """Yield the file that a trap makes, which no test may leave; no question may be asked."""
    path, questions = tmp_path / "made", []
    monkeypatch.setattr("builtins.input", lambda *text: questions.append(text) or "y")
    monkeypatch.chdir(tmp_path)
    yield path
    assert not questions and not path.exists()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def trap_tokenizer(source: Path, folder: Path, made: Path) -> Path:
    """Copy a folder; its tokenizer has a class that only the folder's code knows."""
    shutil.copytree(source, folder)
    (folder / "trap.py").write_text(CODE.format(made=str(made)))
    auto_map = {"AutoTokenizer": [None, "trap.Trap"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Trap", auto_map=auto_map)
    return folder


def trap_model(source: Path, folder: Path, made: Path, *, model_type: str = "trap") -> Path:
    """Copy a model's folder; its configuration is of a class that only its code knows."""
    shutil.copytree(source, folder)
    (folder / "trap.py").write_text(CODE.format(made=str(made)))
    change(
        folder / "config.json", model_type=model_type, auto_map={"AutoConfig": "trap.TrapConfig"}
    )
    return folder


def write(world, folder: Path, **settings: Any) -> str:
    config = kit.run_config(world, folder / "out", callbacks={}, loggers={}, **settings)
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(config))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("name", ["train.py", "inspect", "plan", "verify"])
def test_a_run_s_tokenizer_brings_no_code(world, tmp_path: Path, made: Path, capsys, name: str):
    folder = trap_tokenizer(world.tokenizer, tmp_path / "tok", made)
    path = write(world, tmp_path, tokenizer__name=str(folder))
    code = launch.main("train.py", [path]) if name == "train.py" else main([name, path])
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and any("tok" in line and "trust_remote_code" in line for line in said), said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["train.py", "inspect"])
def test_a_tokenizer_s_code_runs_if_the_yaml_says_so(world, tmp_path: Path, made: Path, name: str):
    folder = trap_tokenizer(world.tokenizer, tmp_path / f"tok{name[:5]}", made)
    path = write(world, tmp_path, tokenizer__name=str(folder), max_duration="1ba")
    said = [path, "tokenizer.kwargs.trust_remote_code=true"]
    assert (launch.main("train.py", said) if name == "train.py" else main([name, *said])) == 0
    made.unlink()


@pytest.mark.parametrize("name", ["smollm2_packed", "hf_causal_lm"])
def test_a_run_s_model_brings_no_code(world, tmp_path: Path, made: Path, capsys, name: str):
    folder = trap_model(world.base, tmp_path / "base", made)
    model = {"name": name, "pretrained_model_name_or_path": str(folder)}
    loader: Any = {}
    if name == "hf_causal_lm":  # which has no packs
        rows = {"hf_name": "json", "hf_kwargs": {"data_files": {"train": str(world.rows)}}}
        rows |= {"split": "train", "max_seq_len": 64, "decoder_only_format": True, "shuffle": True}
        stock = {"name": "finetuning", "dataset": rows, "num_workers": 1, "drop_last": True}
        loader = {"train_loader": stock, "eval_loader": None}
    path = write(world, tmp_path, model=model, **loader)
    try:
        code = launch.main("train.py", [path])
    except ValueError as error:  # of llm-foundry's own model, which keeps its traceback
        assert name == "hf_causal_lm" and "trust_remote_code" in str(error)
    else:
        assert code in (1, 2) and "base" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["adapter", "base", "base's model"])
@pytest.mark.parametrize("name", ["merge", "eval", "analyse"])
def test_a_finished_run_s_files_bring_no_code(
    world, adapter: Path, tmp_path: Path, made: Path, capsys, place: str, name: str
):
    folder, base = tmp_path / "hf", world.base
    if place == "adapter":
        trap_tokenizer(adapter / "hf", folder, made)
    else:
        shutil.copytree(adapter / "hf", folder)
        for file in folder.glob("*token*"):
            file.unlink()
        for file in folder.glob("*vocab*"):
            file.unlink()
        if place == "base":
            whole = shutil.copytree(world.base, tmp_path / "whole")
            shutil.copytree(world.tokenizer, whole, dirs_exist_ok=True)
            base = trap_tokenizer(whole, tmp_path / "base", made)
        else:
            base = trap_model(world.base, tmp_path / "base", made)
    out = str(tmp_path / "out")
    words = [
        name,
        str(folder),
        *([out] if name == "merge" else ["--out", out]),
        "--base",
        str(base),
    ]
    if name == "eval":
        loader = kit.loader_config(world.eval_rows)
        content = {"sets": {"target": {"role": "learning", "type": "documents", "loader": loader}}}
        (tmp_path / "sets.yaml").write_text(yaml.safe_dump(content))
        words += ["--sets", str(tmp_path / "sets.yaml")]
    code = main(words)
    assert (code == 2 and "trust_remote_code" in capsys.readouterr().err) or name == "analyse"


def test_a_checkpoint_brings_no_code(adapter: Path, tmp_path: Path, made: Path, capsys):
    state = torch.load(adapter / "checkpoints/latest-rank0.pt", weights_only=False)
    files = state["state"]["integrations"]["huggingface"]["tokenizer"]
    trap = trap_tokenizer(adapter / "hf", tmp_path / "trap", made)
    files["tokenizer_config.json"]["content"] |= {
        "tokenizer_class": "Trap",
        "auto_map": {"AutoTokenizer": [None, f"{trap}--trap.Trap"]},
    }
    torch.save(state, tmp_path / "trap.pt")
    assert main(["export", str(tmp_path / "trap.pt"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "trust_remote_code" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


MODULES = {
    "auto_mapping": {"base_model_class": "x", "parent_library": "planted_module"},
    "megatron_core": "planted_module",
}


@pytest.mark.parametrize("key", MODULES)
@pytest.mark.parametrize("name", ["merge", "export"])
def test_an_adapter_s_configuration_imports_nothing(
    world, adapter: Path, tmp_path: Path, made: Path, monkeypatch, capsys, key: str, name: str
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted_module.py").write_text(f"open({str(made)!r}, 'w').close()\n")
    planted = {key: MODULES[key], "megatron_config": {"a": 1} if key == "megatron_core" else None}
    planted["task_type"] = "CAUSAL_LM"
    if name == "merge":
        source = shutil.copytree(adapter / "hf", tmp_path / "hf")
        change(source / "adapter_config.json", **planted)
    else:
        source = tmp_path / "trap.pt"
        state = torch.load(adapter / "checkpoints/latest-rank0.pt", weights_only=False)
        model = state["state"]["integrations"]["huggingface"]["model"]
        model["peft_config"]["content"] |= planted
        torch.save(state, source)
    code = main([name, str(source), str(tmp_path / "out")])
    assert code == (2 if key == "megatron_core" else 0), capsys.readouterr()
    assert "planted_module" not in sys.modules


def test_other_components_cannot_ask_either(world, tmp_path: Path, made: Path, monkeypatch):
    """Such as llm-foundry's own loaders, which say nothing about remote code."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", None)  # ask
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(f"open({str(made)!r}, 'w').close()\n")
    tokenizer = trap_tokenizer(world.tokenizer, tmp_path / "tok", made)
    with no_questions():
        for load, folder in (
            (datasets.load_dataset, rows),
            (AutoTokenizer.from_pretrained, tokenizer),
        ):
            with pytest.raises(ValueError, match="trust_remote_code"):
                load(str(folder))
    assert datasets.config.HF_DATASETS_TRUST_REMOTE_CODE is None


def test_null_is_no_trust_in_a_data_set(tmp_path: Path, made: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", None)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(f"open({str(made)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="loaded by a script of its own"):
        load_rows(str(rows), "train", hf_kwargs={"trust_remote_code": None})


AUTOMATIC = re.compile(r"Auto\w+\.from_(pretrained|config)|(datasets\.)?load_dataset(_builder)?")


def test_every_call_that_could_bring_code_says_so():
    found = 0
    for folder in ("foundry_ext", "benchmarks", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and AUTOMATIC.fullmatch(ast.unparse(node.func)):
                    found += 1
                    said = ast.unparse(node)
                    assert "trust_remote_code=False" in said or "code_only_if_trusted" in said, said
    assert found >= 6


@pytest.mark.parametrize("value", [None, "yes", "true", 1, "absent"])
def test_only_true_is_trust(value: Any):
    settings = {} if value == "absent" else {"trust_remote_code": value}
    assert code_only_if_trusted({"a": 1, **settings}) == {"a": 1, "trust_remote_code": False}
    assert code_only_if_trusted({"trust_remote_code": True}) == {"trust_remote_code": True}
