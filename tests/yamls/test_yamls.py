"""Every shipped YAML is what its template says, loads, and measures on what it does not train on.

One of each data set and method also takes a step: its shape is cut tiny and its sources replaced
by rows of the true schema; all the rest, loggers, callbacks, schedules and evaluation included, is
what users run. Not tried here: the hub itself.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import DictConfig, OmegaConf

from foundry_ext.config.loading import load_config
from foundry_ext.records.record import read_record
from foundry_ext.training.loggers.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
YAMLS = [  # yamls/eval/ trains nothing: tests of evaluation read it
    path for path in sorted((ROOT / "yamls").rglob("*.yaml")) if path.parent.name != "eval"
]
FAMILIES = [path for path in YAMLS if path.parent.name in ("finetune", "pretrain")]
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}


ONLY_WITH_WANDB = "smollm2-135m_metamathqa_lora"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "yamls"))


@cache
def resolved(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(load_config(path, []), resolve=True)
    assert isinstance(config, dict)
    return config


# --- what they say -------------------------------------------------------------------------------


def test_the_files_are_what_the_generator_writes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "yamls"))
    import generate

    written = {str(path): text for path, text in generate.render()}
    sys.modules.pop("generate")
    generated = [*FAMILIES, *(path for path in YAMLS if path.parent.name == "fsdp")]
    found = {str(path.relative_to(ROOT)): path.read_text() for path in generated}
    assert sorted(written) == sorted(found), "run `python yamls/generate.py`, remove what is left"
    for path, text in written.items():
        assert found[path] == text, f"{path}: run `python yamls/generate.py`"


def test_all_sizes_data_sets_and_methods_are_there():
    parts = [path.stem.split("_") for path in FAMILIES]
    sizes, data, methods = ({part[i] for part in parts} for i in range(3))
    assert sizes == {"smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
    assert {"metamathqa", "magicoder", "gsm8k", "python-edu", "openwebmath", "finemath"} < data
    assert methods == {"full", "lora", "dora", "rslora"}
    assert len(FAMILIES) == len(sizes) * len(data) * len(methods)


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_run_goes_on_where_it_stopped_and_is_guarded(path: Path):
    config = resolved(path)
    assert config["autoresume"] is True and config["save_folder"] and config["save_interval"]
    assert config["save_num_checkpoints_to_keep"] >= 2, "one before the newest"
    assert {"exact_resume", "guard", "run_record"} <= config["callbacks"].keys()


@pytest.mark.parametrize("path", FAMILIES, ids=name_of)
def test_names_folders_and_rates(path: Path):
    config = resolved(path)
    assert config["run_name"] == path.stem, "or two files would write into one folder"
    assert config["autoresume"] is True
    folder = f"outputs/{path.stem}"
    assert config["variables"]["folder"] == folder
    assert config["callbacks"]["run_record"]["path"] == f"{folder}/record.json"
    assert config["loggers"]["wandb_metrics"]["group"] == path.stem.split("_")[1]
    rates = config["variables"]["learning_rates"]
    assert list(rates) == ["lowest", "low", "middle", "high", "highest"]
    assert all(isinstance(rate, float) for rate in rates.values()), "1e-5 without a dot is a text"
    steps = [b / a for a, b in zip(rates.values(), list(rates.values())[1:], strict=False)]
    assert all(3.0 < step < 3.4 for step in steps), "log-spaced"
    assert config["optimizer"]["lr"] == rates["middle"]


def test_a_learning_rate_is_chosen_by_name():
    config = load_config(FAMILIES[0], ["variables.learning_rate=highest"])
    assert config.optimizer.lr == config.variables.learning_rates.highest


@pytest.mark.parametrize("path", FAMILIES, ids=name_of)
def test_what_is_measured_is_held_out(path: Path):
    config = resolved(path)
    train = config["train_loader"]["dataset"]
    (main,) = [entry for entry in train.get("datasets", [train]) if "share" not in entry]
    target = config["callbacks"]["forgetting"]["sets"]["target"]["loader"]
    for evaluated in (config["eval_loader"]["dataset"], target["dataset"]):
        same = ("hf_name", "hf_kwargs", "split", "preprocessing_fn", "text_key", "overlong")
        assert [evaluated.get(key) for key in same] == [main.get(key) for key in same]
        assert evaluated["holdout"] == {**main["holdout"], "part": "eval"}
        assert main["holdout"]["part"] == "train"
    if "metamathqa" in path.stem:
        assert main["holdout"]["by"] == "original_question", "rows are rephrasings: trap 37"
    source = config["callbacks"]["forgetting"]["sets"]["source"]["loader"]["dataset"]
    for entry in train.get("datasets", []):
        if entry["hf_name"] == source["hf_name"]:
            assert entry["hf_kwargs"] != source["hf_kwargs"], "replayed what is measured"


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_a_rank_brings_its_alpha(method: str):
    """So that one sweep over variables.rank is the paper's 16, 64, 256 with alpha = 2r."""
    path = ROOT / f"yamls/finetune/smollm2-360m_gsm8k_{method}.yaml"
    for rank in (16, 64, 256):
        config = load_config(path, [f"variables.rank=r{rank}"])
        assert config.model.peft_config.r == rank
        assert config.model.peft_config.lora_alpha == 2 * rank


def test_an_adapters_rate_times_scale_is_one_for_the_family():
    """So that rsLoRA's larger scale is no advantage or handicap at a grid's middle."""
    from foundry_ext.adapters.methods import method_of_config

    for path in FAMILIES:
        if path.stem.endswith("_lora"):
            products = []
            for method in ("lora", "dora", "rslora"):
                config = resolved(path.with_name(path.name.replace("_lora.", f"_{method}.")))
                scale = method_of_config(config["model"]["peft_config"]).effective_scale
                assert scale is not None
                products.append(config["optimizer"]["lr"] * scale)
            assert max(products) / min(products) < 1.05, path


# --- a step --------------------------------------------------------------------------------------


def metamathqa_row(i: int) -> dict[str, str]:
    question = f"What is {i // 2} plus 1?"
    return {
        "type": ("GSM_Rephrased", "GSM_SV")[i % 2],
        "query": f"{question} Say it in way {i % 2}.",
        "original_question": question,
        "response": f"It is {i // 2 + 1}. The answer is: {i // 2 + 1}",
    }


def magicoder_row(i: int) -> dict[str, str]:
    return {
        "instruction": f"Add {i}.",
        "response": f"```python\ndef f(x):\n    return x + {i}\n```",
    }


def gsm8k_row(i: int) -> dict[str, str]:
    return {"question": f"{i} and 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}


def python_edu_row(i: int) -> dict[str, Any]:
    return {"text": f"def plus_{i}(x):\n    return x + {i}\n" * (1 + i % 9), "score": 4.2}


def web_row(i: int) -> dict[str, Any]:
    return {"url": f"https://example.org/{i}", "text": f"The number {i} is {i}. " * (1 + i % 20)}


def text_row(i: int) -> dict[str, Any]:
    return {"text": f"Page {i} of a book about rivers. " * (1 + i % 5)}


def library_row(i: int) -> dict[str, str]:
    return {"path": f"m{i}.py", "text": f"import m{i + 1}\n" * (1 + i % 30)}


def problem_row(i: int) -> dict[str, str]:
    return {"prompt": f"Question: {i} + 1?\nAnswer:", "response": f" {i + 1}"}


ROWS = {
    "meta-math/MetaMathQA": metamathqa_row,
    "ise-uiuc/Magicoder-Evol-Instruct-110K": magicoder_row,
    "openai/gsm8k": gsm8k_row,
    "Avelina/python-edu-cleaned": python_edu_row,
    "open-web-math/open-web-math": web_row,
    "HuggingFaceTB/finemath": web_row,
    "karpathy/fineweb-edu-100b-shuffle": text_row,
    "outputs/quickstart/data/library": library_row,
    "outputs/quickstart/data/problems": problem_row,
}
TASKS = {
    "multiple_choice": {"query": "One and two are", "choices": ["three", "a stone"], "gold": 0},
    "generation": {"question": "1 and 1?", "answer": "1+1=2\n#### 2"},
}


def load_dataset(path: str, *, split: str, data_files: Any = None, **_: Any) -> datasets.Dataset:
    """In place of the hub's; other rows where the file is another."""
    files = str(data_files)
    if path == "json":
        path = next(name for name in ROWS if name in files)
    first = 1000 if "shard_01822" in files or "_eval" in files else 0
    return datasets.Dataset.from_list([ROWS[path](first + i) for i in range(160)])


def loaders(config: DictConfig) -> Iterator[DictConfig]:
    yield from (config.train_loader, config.eval_loader)
    for one in config.callbacks.get("forgetting", {}).get("sets", {}).values():
        if one.type == "documents":
            yield one.loader


def cut_down(path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The configuration with its shape, sources and duration replaced."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # Starting W&B takes seconds; test_wandb_metrics.py looks into what it writes.
    monkeypatch.setenv("WANDB_MODE", "offline" if path.stem == ONLY_WITH_WANDB else "disabled")
    monkeypatch.chdir(tmp_path)
    config = load_config(path, [])
    config.model.pretrained_model_name_or_path = "smollm2-135m"
    config.model.pretrained = False
    config.model.config_overrides = TINY
    config.tokenizer.name = str(tokenizer)
    config.precision = "fp32"
    config.max_duration = "1tok" if config.max_duration.endswith("tok") else "1ba"
    config.eval_interval = "1ba"
    config.global_train_batch_size = 2
    for loader in loaders(config):
        loader.num_workers = 0
        loader.dataset.max_seq_len = 128
        loader.dataset.pack_tokens = 256
        for source in loader.dataset.get("datasets") or [loader.dataset]:
            if source.get("holdout"):
                source.holdout.fraction = 0.2
            if source.hf_name.startswith("outputs/"):
                touch(source.hf_name)
    for one in config.callbacks.get("forgetting", {}).get("sets", {}).values():
        if one.type != "documents":
            touch(one.path).write_text((json.dumps(TASKS[one.type]) + "\n") * 7)
        if one.type == "generation":
            one.max_new_tokens = 3
    if "text_samples" in config.callbacks:
        config.callbacks.text_samples.max_new_tokens = 3
    return config


def touch(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{}\n")  # of which only the beginning is looked at
    return Path(path)


def in_every_run(path: Path) -> bool:
    """All methods once, all data sets once."""
    size, _, rest = path.stem.partition("_")
    return path.parent.name == "quickstart" or (
        size == "smollm2-135m" and (rest.startswith("metamathqa_") or rest.endswith("_lora"))
    )


STEPS = [
    pytest.param(path, id=name_of(path), marks=() if in_every_run(path) else pytest.mark.slow)
    for path in YAMLS
    if "_" not in path.stem or path.stem.startswith("smollm2-135m")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", STEPS)
def test_a_step(
    path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from llmfoundry.command_utils import train

    config = cut_down(path, tokenizer_folder, monkeypatch, tmp_path)
    trainer = train(config)
    trainer.close()
    assert trainer.state.timestamp.batch.value == 1
    latest = Path(config.save_folder, "latest-rank0.pt")
    assert latest.is_symlink() and latest.resolve().name == "ep0-ba1-rank0.pt"
    metrics = read_metrics(Path(config.loggers.metrics_file.path))
    assert {0, 1} <= metrics["metrics/eval/LanguageCrossEntropy"].keys()
    assert metrics["loss/train/total"][0] > 0
    for name, one in config.callbacks.get("forgetting", {}).get("sets", {}).items():
        measured = [key for key in metrics if key.startswith(f"{one.role}/{name}_")]
        assert measured and all({0, 1} <= metrics[key].keys() for key in measured), name
    record = read_record(Path(config.callbacks.run_record.path))
    assert record["status"] == "finished"
    if path in FAMILIES:
        _, data, method = path.stem.split("_")
        assert (record["experiment"], record["method"]) == (data, method)
        fingerprints = {name: one["fingerprint"] for name, one in record["data"]["eval"].items()}
        assert {"target", "source"} <= fingerprints.keys()
        assert record["data"]["train"]["fingerprint"] not in fingerprints.values()
    kind = "adapter_config.json" if "peft_config" in config.model else "config.json"
    assert (Path(config.callbacks.hf_export.folder) / kind).is_file()


def test_missing_tasks_are_named_with_the_way_to_them(tmp_path, monkeypatch):
    from foundry_ext.evaluation.config import parse_sets

    monkeypatch.chdir(tmp_path)
    (path,) = [path for path in FAMILIES if path.stem == "smollm2-135m_metamathqa_lora"]
    sets = resolved(path)["callbacks"]["forgetting"]["sets"]
    with pytest.raises(
        ValueError, match=r"data/tasks/\w+.jsonl does not exist; `foundry-ext tasks`"
    ):
        parse_sets(sets)


def test_comments_name_their_own_file():
    for path in FAMILIES:
        text = path.read_text()
        assert f"composer train.py yamls/{name_of(path)}\n" in text
        family = re.search(r"check-fair (\S+)_\*\.yaml", text)
        assert family and str(path).removesuffix(".yaml").rpartition("_")[0].endswith(family[1])
