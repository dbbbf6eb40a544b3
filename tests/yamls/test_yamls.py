"""Promises of the shipped YAMLs: held-out data, names, rates, and that they train.

One combination of each data set and each method also takes a step. Its shape is made tiny and its
sources are replaced by rows of the real schema. Everything else, including loggers, callbacks,
schedules and evaluation, is what users run. The hub itself is not tested here.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import DictConfig, OmegaConf

from foundry_ext.comparison.fairness import differences
from foundry_ext.config.loading import load_config
from foundry_ext.records.record import read_record
from foundry_ext.training.loggers.metrics_file import read_metrics
from tests.yamls.combinations import (
    COMBINATIONS,
    DATA,
    FILES,
    FOLDERS,
    METHODS,
    OWN,
    ROOT,
    SIZES,
    Combination,
    resolved,
)

# Those of one run each, with nothing to choose; yamls/eval/ trains nothing.
SINGLE = sorted({*(ROOT / "yamls").rglob("*.yaml")} - {*FILES, *(ROOT / "yamls/eval").rglob("*")})
QUICKSTART = [path for path in SINGLE if path.parent == ROOT / "yamls/quickstart"]
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
def single(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(load_config(path, []), resolve=True)
    assert isinstance(config, dict)
    return config


# --- what they say -------------------------------------------------------------------------------


def test_there_is_one_file_per_method():
    assert {path.stem for path in (ROOT / "yamls").glob("*.yaml")} == {
        f"smollm2_{method}" for method in METHODS
    }
    assert {path.stem for path in (ROOT / "yamls/pretrain").iterdir()} == {
        f"smollm2_{method}" for method in METHODS
    }
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) < 250 and max(map(len, lines)) <= 140, path


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_files_differ_by_the_methods_own_lines(kind: str):
    """They differ in title, commands, grid of rates and its reason, ranks, peft_config and name."""
    own = re.compile(
        r"# .*of SmolLM2|#   composer train|.*_(full|lora|dora|rslora)$|.*(135m|360m|1.7b): {lowest"
        r"|.*for an adapter|  # (Llama-2-7B|the smaller batch|larger scale)|.*tags: \["
        r"|  ranks: |  rank: |  peft_config:|    (peft_type|task_type|r|lora_alpha|lora_dropout)"
        r"|    (target_modules|use_dora|use_rslora)"
    )
    files = [(FOLDERS[kind] / f"smollm2_{m}.yaml").read_text().splitlines() for m in METHODS]
    rest = [[line for line in lines if not own.match(line)] for lines in files]
    assert len(rest[0]) > 150
    assert all(lines == rest[0] for lines in rest)


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_files_are_fair(kind: str):
    """Four methods with the same size and data set differ only by method and rate."""
    for data in DATA[kind]:
        for size in SIZES:
            runs = [Combination(kind, data, size, method) for method in METHODS]
            assert differences({run.run_name: resolved(run) for run in runs}) == []


@pytest.mark.parametrize("path", [*SINGLE, *FILES], ids=name_of)
def test_every_run_is_resumed_and_guarded(path: Path):
    config = single(path)
    assert config["autoresume"] is True and config["save_folder"] and config["save_interval"]
    assert config["save_num_checkpoints_to_keep"] >= 2, "one before the newest"
    assert {"exact_resume", "guard", "run_record"} <= config["callbacks"].keys()


@pytest.mark.parametrize("run", COMBINATIONS, ids="_".join)
def test_names_folders_and_rates(run: Combination):
    config = resolved(run)
    assert config["run_name"] == run.run_name, "or two runs would write into one folder"
    assert {"exact_resume", "guard", "run_record"} <= config["callbacks"].keys()
    folder = f"outputs/{run.run_name}"
    assert config["variables"]["folder"] == folder
    assert config["callbacks"]["run_record"]["path"] == f"{folder}/record.json"
    assert config["loggers"]["wandb_metrics"]["group"] == run.experiment
    rates = config["variables"]["learning_rates"]
    assert list(rates) == ["lowest", "low", "middle", "high", "highest"]
    assert all(isinstance(rate, float) for rate in rates.values()), "1e-5 without a dot is a text"
    steps = [b / a for a, b in zip(rates.values(), list(rates.values())[1:], strict=False)]
    assert all(3.0 < step < 3.4 for step in steps), "log-spaced"
    assert config["optimizer"]["lr"] == rates["middle"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_learning_rate_is_chosen_by_name(path: Path):
    config = load_config(path, ["variables.learning_rate=highest"])
    assert config.optimizer.lr == config.variables.learning_rates.highest


@pytest.mark.parametrize("run", COMBINATIONS, ids="_".join)
def test_what_is_measured_is_held_out(run: Combination):
    config = resolved(run)
    train = config["train_loader"]["dataset"]
    (main,) = [entry for entry in train.get("datasets", [train]) if "share" not in entry]
    target = config["callbacks"]["forgetting"]["sets"]["target"]["loader"]
    same = ["hf_kwargs", "split", "preprocessing_fn", "text_key", "overlong"]
    for evaluated in (config["eval_loader"]["dataset"], target["dataset"]):
        if run.data == "own":  # another file, which a person has made
            assert evaluated["hf_name"] != main["hf_name"] and "holdout" not in {*evaluated, *main}
        else:
            assert evaluated["hf_name"] == main["hf_name"]
            assert evaluated["holdout"] == {**main["holdout"], "part": "eval"}
            assert main["holdout"]["part"] == "train"
        assert [evaluated.get(key) for key in same] == [main.get(key) for key in same]
    if "metamathqa" in run.data:
        assert main["holdout"]["by"] == "original_question", "rows are rephrasings: trap 37"
    source = config["callbacks"]["forgetting"]["sets"]["source"]["loader"]["dataset"]
    assert source["hf_name"] != main["hf_name"]
    for entry in train.get("datasets", []):
        if entry["hf_name"] == source["hf_name"]:
            assert entry["hf_kwargs"] != source["hf_kwargs"], "replayed what is measured"


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_a_rank_brings_its_alpha(method: str):
    """One sweep over variables.rank therefore gives the paper's 16, 64, 256 with alpha = 2r."""
    for rank in (16, 64, 256):
        path = FOLDERS["finetune"] / f"smollm2_{method}.yaml"
        config = load_config(path, [f"variables.rank=r{rank}"])
        assert config.model.peft_config.r == rank
        assert config.model.peft_config.lora_alpha == 2 * rank


def test_an_adapters_rate_times_scale_is_one_for_the_family():
    """rsLoRA's larger scale is then no advantage or handicap at the middle of a grid."""
    from foundry_ext.adapters.methods import method_of_config

    for run in COMBINATIONS:
        if run.method == "lora":
            products = []
            for method in ("lora", "dora", "rslora"):
                config = resolved(run._replace(method=method))
                scale = method_of_config(config["model"]["peft_config"]).effective_scale
                assert scale is not None
                products.append(config["optimizer"]["lr"] * scale)
            assert max(products) / min(products) < 1.05, run


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
    "outputs/quickstart/data/one_step_eval": problem_row,
    "outputs/quickstart/data/one_step_train": text_row,
    "outputs/quickstart/data/problems": problem_row,
    "outputs/own_finetune": problem_row,
    "outputs/own_pretrain": text_row,
}
TASKS = {
    "multiple_choice": {"query": "One and two are", "choices": ["three", "a stone"], "gold": 0},
    "generation": {"question": "1 and 1?", "answer": "1+1=2\n#### 2"},
}


def load_dataset(path: str, *, split: str, data_files: Any = None, **_: Any) -> datasets.Dataset:
    """Stand in for the hub's data sets, with other rows for another file."""
    return datasets.Dataset.from_list(rows_of(path, str(data_files)))


def rows_of(name: str, file: str) -> list[dict[str, Any]]:
    first = 1000 if "shard_01822" in file or "_eval" in file else 0
    return [ROWS[name](first + i) for i in range(160)]


def loaders(config: DictConfig) -> Iterator[DictConfig]:
    yield from (config.train_loader, config.eval_loader)
    for one in sets(config).values():
        if one.type == "documents":
            yield one.loader


def sets(config: DictConfig) -> dict[str, DictConfig]:
    """Return the evaluation sets that are measured; a configuration may also hold others."""
    given = config.callbacks.get("forgetting", {}).get("sets", {})
    return {name: one for name, one in given.items() if one.get("path", "") is not None}


def cut_down(config: DictConfig, tokenizer: Path, precision: str) -> None:
    """Replace the shape, the sources, the precision and the duration."""
    config.model.pretrained_model_name_or_path = "smollm2-135m"
    config.model.pretrained = False
    config.model.config_overrides = TINY
    config.tokenizer.name = str(tokenizer)
    config.precision = precision
    config.max_duration = "1tok" if config.max_duration.endswith("tok") else "1ba"
    config.eval_interval = "1ba"
    config.global_train_batch_size = 2
    for loader in loaders(config):
        loader.num_workers = 0
        loader.dataset.max_seq_len = 128
        loader.dataset.pack_tokens = 256
        for source in loader.dataset.get("datasets") or [loader.dataset]:
            if (source.get("holdout") or {}).get("by"):
                source.holdout.fraction = 0.2
            if source.hf_name.startswith("outputs/"):
                write_rows(source.hf_name)
    for one in sets(config).values():
        if one.type != "documents":
            touch(one.path).write_text((json.dumps(TASKS[one.type]) + "\n") * 7)
        if one.type == "generation":
            one.max_new_tokens = 3
    if "text_samples" in config.callbacks:
        config.callbacks.text_samples.max_new_tokens = 3


def write_rows(path: str) -> None:
    """Write the rows of a file of ROWS."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(next(name for name in ROWS if path.startswith(name)), path)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def touch(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{}\n")  # of which only the beginning is looked at
    return Path(path)


def by_stock(path: Path, overrides: list[str]) -> DictConfig:
    """Return the configuration as in `llmfoundry train`: settings that do not apply are null."""
    config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides))
    assert isinstance(config, DictConfig)
    return config


# All methods once, all data sets once; half of them as `llmfoundry train` loads them. All others
# are slow.
STEPS = {
    **{
        f"{kind}_{data}_lora": (by_stock, Combination(kind, data, "135m", "lora"))
        for kind, names in DATA.items()
        for data in names
    },
    **{
        f"finetune_metamathqa_{method}": (
            load_config,
            Combination("finetune", "metamathqa", "135m", method),
        )
        for method in METHODS
    },
    "finetune_gsm8k_dora": (load_config, Combination("finetune", "gsm8k", "1.7b", "dora")),
    "finetune_own_full": (load_config, Combination("finetune", "own", "135m", "full")),
}
MORE = {
    f"finetune_{run}" for run in ("metamathqa_dora", "metamathqa_rslora", "gsm8k_dora", "own_full")
}
TRIED = {(run.kind, run.data, run.method) for _, run in STEPS.values()}
SLOW = {
    "_".join(run): (load_config, run)
    for run in COMBINATIONS
    if run.size == "135m" and (run.kind, run.data, run.method) not in TRIED
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "step",
    [
        *(pytest.param(name, marks=[pytest.mark.more] * (name in MORE)) for name in STEPS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_step(step: str, tokenizer_folder: Path, monkeypatch, tmp_path: Path):
    load, run = (STEPS | SLOW)[step]
    overrides = [
        one.replace("rows/", f"outputs/own_{run.kind}_") + ".jsonl" if one in OWN else one
        for one in run.overrides
    ]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # Starting W&B takes seconds; test_wandb_metrics.py looks into what it writes.
    monkeypatch.setenv("WANDB_MODE", "offline" if run.run_name == ONLY_WITH_WANDB else "disabled")
    monkeypatch.chdir(tmp_path)
    for path in [one.partition("=")[2] for one in overrides if one.endswith(".jsonl")]:
        touch(path)
    config = load(run.path, overrides)
    record = take_step(config, tokenizer_folder)
    assert (record["experiment"], record["method"]) == (run.experiment, run.method)
    fingerprints = {name: one["fingerprint"] for name, one in record["data"]["eval"].items()}
    assert {"target", "source"} <= fingerprints.keys()
    assert record["data"]["train"]["fingerprint"] not in fingerprints.values()
    wanted = resolved(run)["callbacks"]["forgetting"]["sets"].keys()
    assert wanted == fingerprints.keys() - {"eval/eval"}
    # A record has the same settings whichever command trained.
    assert record["config"]["callbacks"]["forgetting"]["sets"].keys() == wanted
    dataset = resolved(run)["train_loader"]["dataset"]
    assert record["config"]["train_loader"]["dataset"].keys() == dataset.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", QUICKSTART, ids=name_of)
def test_a_step_of_the_quickstart(path: Path, tokenizer_folder: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    take_step(load_config(path, []), tokenizer_folder)


def take_step(config: DictConfig, tokenizer: Path, precision: str = "fp32") -> dict[str, Any]:
    """Train one step of the cut down run and return its record."""
    from llmfoundry.command_utils import train

    cut_down(config, tokenizer, precision)
    trainer = train(config)
    trainer.close()
    assert trainer.state.timestamp.batch.value == 1
    latest = Path(config.save_folder, "latest-rank0.pt")
    assert latest.is_symlink() and latest.resolve().name == "ep0-ba1-rank0.pt"
    metrics = read_metrics(Path(config.loggers.metrics_file.path))
    assert {0, 1} <= metrics["metrics/eval/LanguageCrossEntropy"].keys()
    assert metrics["loss/train/total"][0] > 0
    for name, one in sets(config).items():
        measured = [key for key in metrics if key.startswith(f"{one.role}/{name}_")]
        assert measured and all({0, 1} <= metrics[key].keys() for key in measured), name
    kind = "adapter_config.json" if "peft_config" in config.model else "config.json"
    assert (Path(config.callbacks.hf_export.folder) / kind).is_file()
    record = read_record(Path(config.callbacks.run_record.path))
    assert record["status"] == "finished"
    return record


def test_missing_tasks_are_named_with_the_way_to_them(tmp_path, monkeypatch):
    from foundry_ext.evaluation.config import parse_sets

    monkeypatch.chdir(tmp_path)
    run = Combination("finetune", "metamathqa", "135m", "lora")
    with pytest.raises(
        ValueError, match=r"data/tasks/\w+.jsonl' does not exist; `foundry-ext tasks`"
    ):
        parse_sets(resolved(run)["callbacks"]["forgetting"]["sets"])


def test_comments_name_their_own_file_and_its_choices():
    for path in FILES:
        text = path.read_text()
        commands = re.findall(r"^#   composer train.py (\S+\.yaml) ?(.*)$", text, re.MULTILINE)
        assert len(commands) >= 2 and {file for file, _ in commands} == {f"yamls/{name_of(path)}"}
        for _, overrides in commands:
            if "own" not in overrides:
                load_config(path, overrides.split())
        family = re.search(r"check-fair (\S+)_\*\.yaml", text)
        assert family and str(path).removesuffix(".yaml").rpartition("_")[0].endswith(family[1])
