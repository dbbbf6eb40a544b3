"""The names that users may import, and the examples of docs/python-api.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import foundry_ext
from tests.comparison import records

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/python-api.md"
NAMES = {
    *("Document", "PackCollator", "SmolLM2ForCausalLM", "pack"),
    *("inspect_run", "load_config", "plan_run", "verify_run"),
    *("compare_runs", "load_runs", "read_record", "run_sweep", "write_report"),
    *("analyse_weights", "evaluate_checkpoint", "export_checkpoint", "merge_adapter"),
}


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_names_are_fixed_and_all_there():
    assert set(foundry_ext.__all__) == NAMES == set(foundry_ext._PUBLIC)
    assert set(dir(foundry_ext)) >= NAMES
    for name in NAMES:
        assert callable(getattr(foundry_ext, name)), name
        assert getattr(foundry_ext, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'packs'"):
        foundry_ext.packs  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_no_torch():
    code = "import sys, foundry_ext; foundry_ext.load_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_name_has_an_example():
    used = {
        node.attr
        for example in examples()
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "foundry_ext"
    }
    assert used == NAMES


@pytest.fixture
def folder(tmp_path, tokenizer_folder, make_rows, monkeypatch):
    """Make the files that the page names: a run's YAML, its outputs, a sweep, runs to compare."""
    from omegaconf import OmegaConf

    from tests.sweeps.kit import write_sweep
    from tests.training import kit

    world = kit.make_world(tmp_path / "world", tokenizer_folder, make_rows)
    settings = {"callbacks": {}, "loggers": {"inmemory": {}}, "max_duration": "2ba"}
    config = kit.run_config(world, tmp_path / "outputs/lora", "lora", **settings)
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, {"seed": {"values": [17]}})
    (tmp_path / "yamls").mkdir()
    (tmp_path / "yamls/smollm2_lora.yaml").write_text(OmegaConf.to_yaml(config))
    config.callbacks.spy = {}
    kit.run(config)
    records.write_sweep(tmp_path / "outputs/comparison", seeds=(17, 18, 19))
    loader = OmegaConf.to_container(config.train_loader)
    assert isinstance(loader, dict)
    loader["dataset"] = {**loader["dataset"], "hf_name": str(world.eval_rows), "eval_packs": 1}
    sets = {"held_out": {"role": "learning", "type": "documents", "loader": loader}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"sets": sets}))
    return tmp_path


def test_the_examples_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {}
    for example in examples():
        exec(compile(example, str(PAGE), "exec"), namespace)
    out = capsys.readouterr().out
    assert "[[4], [0, 1], [2, 3]]" in out and "[[-100, 6, 7, -100, 9]]" in out
    assert (folder / "report/index.html").is_file()
    assert (folder / "outputs/lora/merged/model.safetensors").is_file()
