"""Every shipped YAML builds and takes a step.

Its shape is cut tiny and its source replaced by rows of the true schema; all the rest, loggers,
callbacks, schedules and evaluation included, is what users run. Not tried here: the hub itself.
"""

from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf

from foundry_ext.callbacks.metrics_file import read_metrics
from foundry_ext.run_config import load_config

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "yamls").rglob("*.yaml"))
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}


def metamathqa_row(i: int) -> dict[str, str]:
    question = f"What is {i // 2} plus 1?"
    return {
        "type": ("GSM_Rephrased", "GSM_SV")[i % 2],
        "query": f"{question} Say it in way {i % 2}.",
        "original_question": question,
        "response": f"It is {i // 2 + 1}. The answer is: {i // 2 + 1}",
    }


def python_edu_row(i: int) -> dict[str, Any]:
    return {"text": f"def plus_{i}(x):\n    return x + {i}\n" * (1 + i % 9), "score": 4.2}


def library_row(i: int) -> dict[str, str]:
    return {"path": f"m{i}.py", "text": f"import m{i + 1}\n" * (1 + i % 30)}


ROWS = {
    "meta-math/MetaMathQA": metamathqa_row,
    "Avelina/python-edu-cleaned": python_edu_row,
    "json": library_row,
}


def load_dataset(name: str, *, split: str, **_: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list([ROWS[name](i) for i in range(800)])


def cut_down(path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The configuration with its shape, source and duration replaced."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    config = load_config(path, [])
    config.model.pretrained_model_name_or_path = "smollm2-135m"
    config.model.pretrained = False
    config.model.config_overrides = TINY
    config.tokenizer.name = str(tokenizer)
    config.precision = "fp32"
    config.max_duration = "1tok" if config.max_duration.endswith("tok") else "1ba"
    config.eval_interval = "1ba"
    for loader in (config.train_loader, config.eval_loader):
        loader.num_workers = 0
        loader.dataset.max_seq_len = 128
        loader.dataset.pack_tokens = 256
        if loader.dataset.hf_name.startswith("outputs/"):
            file = Path(loader.dataset.hf_name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT / "yamls")))
def test_every_yaml_takes_a_step(
    path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from llmfoundry.command_utils import train

    config = cut_down(path, tokenizer_folder, monkeypatch, tmp_path)
    trainer = train(config)
    trainer.close()
    assert trainer.state.timestamp.batch.value == 1
    metrics = read_metrics(Path(config.loggers.metrics_file.path))
    assert {0, 1} <= metrics["metrics/eval/LanguageCrossEntropy"].keys()
    assert metrics["loss/train/total"][0] > 0
    kind = "adapter_config.json" if "peft_config" in config.model else "config.json"
    assert (Path(config.callbacks.hf_export.folder) / kind).is_file()


def test_the_finetuning_family_differs_by_method_alone():
    family = sorted((ROOT / "yamls" / "finetune").glob("smollm2-135m_*.yaml"))
    assert len(family) == 4
    common = []
    for path in family:
        config = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(config, dict)
        config["model"].pop("peft_config", None)
        config["optimizer"].pop("lr")
        config.pop("run_name")
        config["loggers"]["wandb_metrics"].pop("tags")
        common.append(config)
    assert all(config == common[0] for config in common)
