"""The kind of fine-tuning YAML that is public for SmolLM2: MDS streams, evaluated on themselves.

Names and two keys have been changed as README.md says; every other key is one of llm-foundry's.
"""

import copy
from typing import Any

import pytest
from streaming import MDSWriter

from tests.system.bad_input.bench import Bench, environment
from tests.tiers import one_of
from tests.training import kit

ADAPTER = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
ADAPTER |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "peft": {**ADAPTER, "use_rslora": True},
    "lora": {**ADAPTER, "use_rslora": False, "use_dora": False},
    "dora": {**ADAPTER, "use_rslora": False, "use_dora": True},
    "rslora": {**ADAPTER, "use_rslora": True, "use_dora": False},
}
STREAM = {"local": "${variables.data_local}", "remote": "${variables.data_remote}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    world = kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)
    columns = {"prompt": "str", "response": "str"}
    for split, seed in (("train", 1), ("validation", 2)):
        with MDSWriter(out=str(world.rows.parent / "mds" / split), columns=columns) as writer:
            for row in make_rows(30, seed=seed, longest=12):
                writer.write(row)
    return world


@pytest.fixture
def bench(world, tmp_path, monkeypatch):
    environment(monkeypatch)
    return Bench(tmp_path, world, monkeypatch)


def loader(*, shuffle: bool, drop_last: bool) -> dict[str, Any]:
    dataset = {
        "streams": {"my_data": {**STREAM, "split": "train"}},
        "shuffle": shuffle,
        "max_seq_len": "${variables.max_seq_len}",
        "shuffle_seed": "${variables.global_seed}",
        "decoder_only_format": True,
    }
    return {
        "name": "packed_finetuning",
        "dataset": dataset,
        "drop_last": drop_last,
        "num_workers": 0,
    }


def write(bench: Bench, method: str, **changes: Any) -> None:
    """Give the bench a YAML of this kind; `changes` are keys, with `a__b` for `a.b`."""
    world = bench.world
    model: dict[str, Any] = {
        "name": "smollm2_packed",
        "pretrained_model_name_or_path": str(world.base),
        "config_overrides": {"max_position_embeddings": "${variables.max_seq_len}"},
        "pretrained": True,
    }
    if METHODS[method]:
        model["peft_config"] = copy.deepcopy(METHODS[method])
    kwargs = {"model_max_length": "${variables.max_seq_len}"}
    bench.config = {
        "variables": {
            "data_local": str(world.rows.parent / "mds"),
            "data_remote": None,
            "tokenizer_name": str(world.tokenizer),
            "global_seed": 17,
            "max_seq_len": 64,
            "run_name": None,
        },
        "max_seq_len": "${variables.max_seq_len}",
        "run_name": "${variables.run_name}",
        "model": model,
        "tokenizer": {"name": "${variables.tokenizer_name}", "kwargs": kwargs},
        "train_loader": loader(shuffle=True, drop_last=True),
        "eval_loader": loader(shuffle=False, drop_last=False),
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "1ba", "alpha_f": 0.1},
        "optimizer": {"name": "decoupled_adamw", "lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": "2ba",
        "eval_interval": 0,
        "eval_first": False,
        "eval_subset_num_batches": -1,
        "global_train_batch_size": 4,
        "seed": "${variables.global_seed}",
        "device_eval_batch_size": 4,
        "device_train_microbatch_size": 4,
        "precision": "fp32",
        "fsdp_config": {"sharding_strategy": "FULL_SHARD", "mixed_precision": "PURE"},
        "progress_bar": False,
        "log_to_console": True,
        "console_log_interval": "1ba",
        "callbacks": {
            "speed_monitor": {"window_size": 10},
            "lr_monitor": {},
            "memory_monitor": {},
            "runtime_estimator": {},
        },
    }
    bench.change(**changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", one_of(METHODS, "dora"))
def test_it_trains(bench, method):
    write(bench, method)
    ended = bench.train()
    assert ended.code == 0 and not ended.errors, ended.err
    assert "[batch=2/2]" in ended.out + ended.err


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_on_the_training_split_is_told_what_to_change(bench):
    """Both ways out that the message names are tried."""
    write(bench, "full", eval_interval="2ba")
    (error,) = bench.train().errors
    assert "eval_loader.dataset, streams my_data, is what train_loader trains on" in error
    assert "another split" in error and "eval_interval: 0" in error and "holdout" not in error
    other = {"eval_loader__dataset__streams__my_data__split": "validation"}
    write(bench, "full", eval_interval="2ba", **other)
    assert bench.train().code == 0


@pytest.mark.filterwarnings("ignore")
def test_the_same_rows_in_another_stream_are_refused_too(bench):
    write(bench, "full", eval_interval="2ba")
    renamed = {"other": bench.config["eval_loader"]["dataset"]["streams"]["my_data"]}
    bench.change(eval_loader__dataset__streams=renamed)
    (error,) = bench.train().errors
    assert "eval_loader eval: its documents are those of train_loader" in error
    assert "eval_interval: 0" in error and "holdout" not in error


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__use_flash_attention_2": True}, "use_flash_attention_2; remove it"),
        ({"model__attn_implementation": "sdpa"}, "remove it, attention_backend replaces it"),
        ({"loggers": {"aim": {"repo": ".aim"}}}, "loggers.aim: unknown name, 'aim'"),
    ],
)
def test_a_key_or_name_to_remove_is_named(bench, changes, says):
    write(bench, "full", **changes)
    (error,) = bench.train().errors
    assert says in error
