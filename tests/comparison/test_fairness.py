"""One planted difference in a family is found and named; allowed differences are not."""

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from foundry_ext.comparison.fairness import by_design, differences, method
from foundry_ext.config.loading import load_config

ROOT = Path(__file__).parents[2]


def families() -> dict[str, list[Path]]:
    """Return the shipped YAMLs that are meant to differ only by method."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "yamls").rglob("*.yaml")):
        head, _, last = path.stem.rpartition("_")
        if last in ("full", "lora", "dora", "rslora"):
            found.setdefault(f"{path.parent.name}/{head}", []).append(path)
    return found


FAMILIES = families()


def resolved(path: Path, *overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(load_config(path, overrides), resolve=True)
    assert isinstance(config, dict)
    return config


def test_there_are_families():
    assert FAMILIES.keys() == {
        *("quickstart/", "yamls/smollm2", "pretrain/smollm2", "smollm2-135m-gsm8k/")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_families_are_fair(name: str):
    files = FAMILIES[name]
    assert len(files) == 4
    assert differences({path.name: resolved(path) for path in files}) == []


PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
}


def run(name: str, lr: float, peft_config: dict[str, Any] | None = None) -> dict[str, Any]:
    loader = {"hf_name": "a/b", "split": "train", "pack_tokens": 8192, "shuffle_seed": 17}
    return {
        "variables": {
            "folder": f"outputs/{name}",
            "learning_rates": {"low": lr / 2, "high": lr},
            "learning_rate": "high",
        },
        "run_name": name,
        "seed": 17,
        "model": {
            "name": "smollm2_packed",
            **({"peft_config": peft_config} if peft_config else {}),
        },
        "train_loader": {"name": "packed_finetuning", "dataset": loader},
        "eval_loader": [{"label": "a", "dataset": {**loader, "split": "test"}}],
        "optimizer": {"name": "decoupled_lionw", "lr": lr, "betas": [0.9, 0.95]},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "0.1dur"},
        "max_duration": "2ep",
        "global_train_batch_size": 8,
        "loggers": {
            "wandb_metrics": {"name": name, "group": name, "tags": [name], "project": "p"},
            "metrics_file": {"path": f"outputs/{name}/metrics.jsonl"},
        },
        "callbacks": {
            "run_record": {"path": f"outputs/{name}/record.json", "experiment": name},
            "hf_export": {"folder": f"outputs/{name}/hf"},
            "forgetting": {
                "items": f"outputs/{name}/items.jsonl",
                "sets": {
                    "target": {"type": "documents", "loader": {"dataset": dict(loader)}},
                    "arc": {"type": "multiple_choice", "path": "data/arc.jsonl", "max_items": 300},
                },
            },
        },
        "save_folder": f"outputs/{name}/checkpoints",
    }


@pytest.fixture
def family() -> dict[str, dict[str, Any]]:
    return {
        "full.yaml": run("full", 1e-5),
        "lora.yaml": run("lora", 1e-4, copy.deepcopy(PEFT)),
        "dora.yaml": run("dora", 2e-4, {**copy.deepcopy(PEFT), "use_dora": True}),
        "rslora.yaml": run(
            "rslora", 3e-4, {**copy.deepcopy(PEFT), "use_rslora": True, "lora_alpha": 8}
        ),
    }


def plant(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node[int(parent)] if parent.isdigit() else node[parent]
    node[last] = value


def test_method_rate_name_and_folders_may_differ(family):
    assert differences(family) == []


PLANTED = {
    "data": ("train_loader.dataset.hf_name", "c/d"),
    "a share of the data": ("train_loader.dataset.split", "train[:50%]"),
    "order": ("train_loader.dataset.shuffle_seed", 18),
    "packs": ("train_loader.dataset.pack_tokens", 4096),
    "batch": ("global_train_batch_size", 16),
    "schedule": ("scheduler.t_warmup", "0.2dur"),
    "duration": ("max_duration", "3ep"),
    "optimizer": ("optimizer.betas", [0.9, 0.99]),
    "weight decay": ("optimizer.weight_decay", 0.1),
    "evaluation loader": ("eval_loader.0.dataset.split", "validation"),
    "evaluation data": ("callbacks.forgetting.sets.target.loader.dataset.hf_name", "e/f"),
    "evaluation file": ("callbacks.forgetting.sets.arc.path", "data/other.jsonl"),
    "evaluation items": ("callbacks.forgetting.sets.arc.max_items", 100),
    "evaluation dropped": ("callbacks.forgetting.sets.arc.type", None),
    "model": ("model.name", "hf_causal_lm"),
    "another key": ("precision", "fp32"),
    "starting point": ("load_path", "outputs/lora/checkpoints/latest-rank0.pt"),
    "dropout of an adapter": ("model.peft_config.lora_dropout", 0.1),
    "modules of an adapter": ("model.peft_config.target_modules", ["q_proj"]),
    "bias of an adapter": ("model.peft_config.bias", "all"),
    "rank of one method": ("model.peft_config.r", 64),
    "seed of one method": ("seed", 18),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_difference_is_named(family, case: str):
    key, value = PLANTED[case]
    plant(family["lora.yaml"], key, value)
    if case == "seed of one method":
        family["lora.yaml"]["train_loader"]["dataset"]["shuffle_seed"] = 18
        family["lora.yaml"]["eval_loader"][0]["dataset"]["shuffle_seed"] = 18
        loader = family["lora.yaml"]["callbacks"]["forgetting"]["sets"]["target"]["loader"]
        loader["dataset"]["shuffle_seed"] = 18
    (found,) = differences(family)
    assert found.key == key.replace(".0.", "[0].")
    assert found.values["lora.yaml"] == ("(absent)" if value is None else value)
    assert found.values["dora.yaml"] != found.values["lora.yaml"]
    assert "lora.yaml" in str(found) and found.key in str(found)
    assert differences(family, allow=[found.key]) == []
    assert differences(family, allow=[found.key.rpartition(".")[0] or found.key]) == []
    assert differences(family, allow=[found.key[:-1]]) == [found]


def test_a_planted_difference_in_a_shipped_file_is_named():
    files = FAMILIES["quickstart/"]
    configs = {path.name: resolved(path) for path in files}
    configs["lora.yaml"] = resolved(files[0].with_name("lora.yaml"), "variables.max_seq_len=128")
    keys = {found.key for found in differences(configs)}
    assert "train_loader.dataset.max_seq_len" in keys
    assert not any(key.startswith("variables") for key in keys)


def test_a_key_of_adapters_is_not_missed_in_full_finetuning(family):
    for name in ("lora.yaml", "dora.yaml", "rslora.yaml"):
        family[name]["model"]["peft_config"]["lora_dropout"] = 0.05
    assert differences(family) == []


def test_the_order_of_modules_is_none(family):
    family["lora.yaml"]["model"]["peft_config"]["target_modules"].reverse()
    assert differences(family) == []


def test_an_empty_section_is_absent_but_a_component_is_not(family):
    next(iter(family.values()))["algorithms"] = {}
    assert differences(family) == []
    next(iter(family.values()))["algorithms"] = {"gradient_clipping_x": {}}
    assert [one.key for one in differences(family)] == ["algorithms.gradient_clipping_x"]


def test_null_is_absent_and_1_is_1_0_but_true_is_not_1(family):
    family["full.yaml"]["load_path"] = None
    family["full.yaml"]["global_train_batch_size"] = 8.0
    assert differences(family) == []
    for config in family.values():
        config["max_split"] = 1
    family["full.yaml"]["max_split"] = True
    assert [found.key for found in differences(family)] == ["max_split"]


def with_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["seed"] = seed
    loaders = (
        config["train_loader"],
        config["eval_loader"][0],
        config["callbacks"]["forgetting"]["sets"]["target"]["loader"],
    )
    for loader in loaders:
        loader["dataset"]["shuffle_seed"] = seed
    return config


def test_every_method_needs_the_same_seeds(family):
    runs = {
        f"{name} {seed}": with_seed(config, seed)
        for name, config in family.items()
        for seed in (17, 18, 19)
    }
    assert differences(runs) == []
    runs.pop("dora.yaml 19")
    (found,) = differences(runs)
    assert found.key == "seed"
    assert found.values["lora.yaml 19"] == 19


def test_every_method_needs_the_same_ranks(family):
    adapters = {name: config for name, config in family.items() if name != "full.yaml"}
    runs = {"full.yaml": family["full.yaml"]}
    for name, config in adapters.items():
        for rank in (16, 64):
            runs[f"{name} {rank}"] = copy.deepcopy(config)
            runs[f"{name} {rank}"]["model"]["peft_config"]["r"] = rank
    assert differences(runs) == []
    runs.pop("rslora.yaml 64")
    assert [found.key for found in differences(runs)] == ["model.peft_config.r"]


def test_every_method_needs_a_grid_of_as_many_rates(family):
    family["lora.yaml"]["variables"]["learning_rates"]["middle"] = 1e-4
    (found,) = differences(family)
    assert found.key == "variables.learning_rates (names)"
    assert differences(family, allow=["variables.learning_rates"]) == []


def test_lora_plus_is_a_method(family):
    plus = copy.deepcopy(family["lora.yaml"])
    plus["optimizer"]["param_groups"] = [{"param_str_match": "lora_B", "lr": 1e-3}]
    family["plus.yaml"] = plus
    assert differences(family) == []
    assert method(plus) == "lora lora+"
    plus["optimizer"]["param_groups"][0]["weight_decay"] = 0.1
    keys = [found.key for found in differences(family)]
    assert "optimizer.param_groups[0].weight_decay" in keys


def test_methods_and_scales(family):
    assert [method(config) for config in family.values()] == ["full", "lora", "dora", "rslora"]
    line = by_design(family)
    assert "full (lr 1e-05)" in line
    assert "rslora (lr 0.0003, r 16, scale 2)" in line
    pissa = {"model": {"peft_config": {**PEFT, "init_lora_weights": "pissa"}}}
    assert method(pissa) == "lora pissa"


def test_one_configuration_is_none(family):
    with pytest.raises(ValueError, match="give two or more"):
        differences({"full.yaml": family["full.yaml"]})
