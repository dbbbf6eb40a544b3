"""The YAML for eight GPUs, on two CPU ranks, as users run it except for shape and sources."""

import copy
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from foundry_ext.records.record import read_record
from foundry_ext.training.loggers.metrics_file import read_metrics
from foundry_ext.utils.nested import get
from tests.system.ranks import ROOT, run_launchers
from tests.yamls.combinations import Combination, resolved, settled
from tests.yamls.test_yamls import TINY, metamathqa_row

PATH = ROOT / "yamls/fsdp/smollm2-1.7b_metamathqa_full_8gpu.yaml"
OF_ONE_DEVICE = Combination("finetune", "metamathqa", "1.7b", "full")


def test_it_is_the_run_of_one_device():
    """It is the same except for packs, sharding, and what FSDP does not allow."""
    sharded = settled(PATH, [])
    one = copy.deepcopy(resolved(OF_ONE_DEVICE))
    assert isinstance(sharded, dict)
    packs = [get(c, "train_loader.dataset.pack_tokens") for c in (sharded, one)]
    batches = [config["global_train_batch_size"] for config in (sharded, one)]
    assert packs[0] * batches[0] == packs[1] * batches[1] and batches[0] % 8 == 0
    variables = sharded["variables"]
    assert variables["learning_rates"] == one["variables"]["learning_rates"]
    assert set(one["callbacks"]) - set(sharded["callbacks"]) == {"forgetting", "text_samples"}
    for config in (sharded, one):
        for loader in ("train_loader", "eval_loader"):
            del config[loader]["dataset"]["pack_tokens"]
        # Callbacks, but for those two, and the rest of these differ by the run's name.
        for key in ("run_name", "callbacks", "global_train_batch_size", "variables"):
            del config[key]
        for key in ("loggers", "save_folder"):
            config[key] = str(config[key]).replace("_8gpu", "")
    assert sharded.pop("fsdp_config") and sharded["model"].pop("init_device") == "mixed"
    assert sharded == one


@pytest.mark.more
def test_a_step_on_two_ranks(tokenizer_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(metamathqa_row(i)) + "\n" for i in range(160)))
    overrides = {
        "model.pretrained_model_name_or_path": "smollm2-135m",
        "model.pretrained": "false",
        **{f"model.config_overrides.{key}": value for key, value in TINY.items()},
        "tokenizer.name": tokenizer_folder,
        "variables.max_seq_len": 128,
        "variables.pack_tokens": 256,
        "variables.folder": tmp_path / "run",
        "train_loader.dataset.hf_name": rows,
        "eval_loader.dataset.hf_name": rows,
        "train_loader.dataset.holdout.fraction": 0.2,
        "eval_loader.dataset.holdout.fraction": 0.2,
        "max_duration": "2ba",
        "eval_interval": "1ba",
        "global_train_batch_size": 2,
        "precision": "fp32",
    }
    script = [str(ROOT / "train.py"), str(PATH), *(f"{k}={v}" for k, v in overrides.items())]
    run_launchers(script, tmp_path, 2, FSDP_VERSION="2", WANDB_MODE="disabled")
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert metrics["metrics/eval/LanguageCrossEntropy"].keys() == {0, 1, 2}
    assert len(metrics["loss/train/total"]) == 2
    record = read_record(tmp_path / "run/record.json")
    assert record["status"] == "finished" and record["environment"]["world_size"] == 2
    weights = load_file(Path(tmp_path, "run/hf/model.safetensors"))
    assert "model.embed_tokens.weight" in weights and "lm_head.weight" not in weights, "tied"
    assert weights["model.embed_tokens.weight"].shape == (TINY["vocab_size"], TINY["hidden_size"])
