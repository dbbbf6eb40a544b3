"""The trainer's time: the same work on both sides, its parts, its waits, the YAMLs offline."""

import argparse
import json
import time
import warnings
from pathlib import Path

import llmfoundry.registry
import pytest
import torch
from composer.core import Callback

from benchmarks import trainer_time
from benchmarks.offline import draw_lengths, make_tokenizer, offline_config, write_rows
from benchmarks.trainer_parts import HostWaits, Parts

ROOT = Path(__file__).parents[2]
TINY = [
    *("variables.pack_tokens=128", "variables.max_seq_len=64", "global_train_batch_size=2"),
    *(f"model.config_overrides.{key}=1" for key in ("num_hidden_layers", "num_key_value_heads")),
    *("model.config_overrides.num_attention_heads=1", "model.config_overrides.vocab_size=500"),
    *(f"model.config_overrides.{key}=32" for key in ("hidden_size", "intermediate_size")),
]
# So that the core, which has no schedule and does not clip, takes the very same steps.
PLAIN = [
    *("scheduler.t_warmup=0ba", "scheduler.alpha_f=1.0"),
    "algorithms.gradient_clipping.clipping_threshold=1e9",
]


class Snapshots(Callback):
    weights: dict[int, dict[str, torch.Tensor]]
    packs: list

    def batch_checkpoint(self, state, logger):
        Snapshots.packs = state.batch
        kept = {name: value.clone() for name, value in state.model.state_dict().items()}
        Snapshots.weights[state.timestamp.batch.value] = kept


llmfoundry.registry.callbacks.register("snapshots", func=Snapshots)


@pytest.fixture(scope="module", params=["full", "lora"])
def measured(request, tmp_path_factory):
    """Return (result, the core after its last step)."""
    Snapshots.weights, cores = {}, []

    class Kept(trainer_time.Core):
        def __init__(self, config):
            super().__init__(config)
            cores.append(self)

    options = argparse.Namespace(
        yaml=ROOT / f"yamls/smollm2_{request.param}.yaml",
        model=None,
        lengths="c",
        steps=4,
        wandb=False,
        overrides=["variables.data=gsm8k", *TINY, *PLAIN, "callbacks.snapshots={}"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_time, "Core", Kept)
        # The process's own time, so that a busy machine changes no figure much.
        patch.setattr("time.perf_counter", time.process_time)
        result = trainer_time.measure(options, tmp_path_factory.mktemp("measured"))
    return result, cores[0]


@pytest.mark.skipif(trainer_time.DEVICE == "cuda", reason="kernels there add in any order")
def test_both_sides_do_the_same_work(measured):
    """Both have the same weights after the same number of steps on the same packs."""
    result, core = measured
    theirs = Snapshots.weights[1 + result["steps"]]
    ours = core.built.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    moved = [name for name in theirs if not torch.equal(theirs[name], Snapshots.weights[1][name])]
    assert moved, "nothing was trained"


def test_the_callback_agrees_with_the_benchmark(measured):
    """Units and window agree; agreement within 5 % is shown by the benchmark on full-size steps."""
    result, _ = measured
    assert result["throughput"]["ratio"] == pytest.approx(1.0, abs=0.2)


def test_parts_add_up_to_the_step(measured):
    result, _ = measured
    parts = result["parts"]
    assert all(took >= 0 for took in parts.values())
    assert {"forward", "backward", "optimizer", "PackedThroughput", "RunRecord"} <= parts.keys()
    assert {"GradientClipping", "MetricsFile", "LRMonitor", "ConsoleLogger"} <= parts.keys()
    core = sum(parts[name] for name in trainer_time.CORE)
    assert result["outside_the_core"] == pytest.approx(1 - core / sum(parts.values()))


def test_our_callbacks_read_nothing_back(measured):
    """No wait of the trainer comes from our callbacks or from what they call."""
    result, _ = measured
    places = result["host_waits"]
    assert any("composer/trainer/trainer.py" in place for place in places)
    assert not [one for one in places if "foundry_ext/training/callbacks" in one or "gather" in one]


def test_the_table_is_printed(measured):
    result, _ = measured
    table = trainer_time.as_markdown(json.loads(json.dumps(result)))
    assert "| GradientClipping |" in table and "overhead" in table


# --- parts and waits -----------------------------------------------------------------------------


def test_a_part_s_time_is_without_the_parts_it_calls():
    now = [0.0]
    parts = Parts(lambda: now[0])

    def passing(seconds):
        now[0] += seconds

    inner = parts.timed("inner", lambda: passing(2.0))

    def outer():
        passing(1.0)
        inner()
        inner()

    timed = parts.timed("outer", outer)
    timed()
    assert dict(parts.seconds) == {"outer": 1.0, "inner": 4.0}
    parts.on = False
    timed()
    assert dict(parts.seconds) == {"outer": 1.0, "inner": 4.0}


def test_what_was_watched_is_put_back():
    class Owner:
        def method(self):
            return "method"

    owner, parts = Owner(), Parts(lambda: 0.0)
    module = torch.nn.Module()
    module.own = original = lambda: "own"
    parts._replace(owner, "method", "a")
    parts._replace(module, "own", "b")
    assert owner.method() == "method" and module.own() == "own" and len(parts.seconds) == 2
    parts.restore()
    assert "method" not in vars(owner) and module.own is original


def test_reads_of_values_are_counted_by_place():
    waits = HostWaits("cpu")
    with waits:
        x = torch.ones(3) + 1
        x.sum().item()
        x.tolist()
    x.sum().item()
    assert sum(waits.places.values()) == 1
    (place,) = waits.places
    assert place.endswith("in test_reads_of_values_are_counted_by_place")


def test_waits_on_a_gpu_are_torch_s_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = HostWaits("cuda")
    with warnings.catch_warnings(record=True) as others:
        with waits:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation (...)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (...)", stacklevel=1)
    assert modes == ["warn", "default"]
    assert list(waits.places.values()) == [2]
    assert len(others) == 2


@pytest.mark.gpu
def test_on_a_gpu_only_composer_waits(measured):
    """The core never waits. In the trainer Composer does, and the guard once, on purpose."""
    result, core = measured
    assert result["host_waits"]
    ours = [place for place in result["host_waits"] if place.startswith("foundry_ext")]
    assert all("callbacks/guard.py" in place for place in ours) and len(ours) <= 1
    packs = Snapshots.packs
    with HostWaits("cuda") as waits:
        core(packs)
    assert not waits.places


@pytest.mark.gpu
def test_a_read_on_a_gpu_is_a_wait():
    x = torch.ones(3, device="cuda")
    waits = HostWaits("cuda")
    with waits:
        y = x + 1
        y.sum().item()
    assert sum(waits.places.values()) == 1


# --- offline -------------------------------------------------------------------------------------

RUNS = [  # file, size, data set
    *(("smollm2_full", "135m", data) for data in ("gsm8k", "magicoder", "metamathqa")),
    ("smollm2_lora", "135m", "metamathqa-replay"),
    ("pretrain/smollm2_dora", "360m", "python-edu"),
    ("pretrain/smollm2_rslora", "135m", "openwebmath"),
    ("pretrain/smollm2_full", "1.7b", "finemath"),
]


@pytest.mark.parametrize(("name", "size", "data"), RUNS)
def test_a_shipped_yaml_offline(name, size, data, tmp_path):
    """No reference to the hub remains, and the loader reads the generated rows."""
    from llmfoundry.data.dataloader import build_dataloader
    from transformers import AutoTokenizer

    overrides = ["variables.pack_tokens=64", "variables.max_seq_len=32"]
    overrides += ["global_train_batch_size=2", "model.config_overrides.vocab_size=500"]
    overrides += [f"variables.size={size}", f"variables.data={data}"]
    path = ROOT / "yamls" / f"{name}.yaml"
    config = offline_config(path, tmp_path, steps=2, overrides=overrides)
    del config["variables"]  # only named from elsewhere
    assert "HuggingFaceTB" not in str(config) and "wandb" not in str(config)
    assert config["model"]["pretrained_model_name_or_path"] == f"smollm2-{size}"
    tokenizer = AutoTokenizer.from_pretrained(config["tokenizer"]["name"])
    config["train_loader"]["num_workers"] = 0
    dataset = build_dataloader(config["train_loader"], tokenizer, 2).dataloader.dataset
    assert len(dataset.sampler) >= 2


def test_a_word_is_a_token(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer", 50))
    assert tokenizer("w3 w49 else w4")["input_ids"] == [3, 49, 0, 4]
    (row,) = map(json.loads, write_rows(tmp_path / "rows", [20], 50).read_text().splitlines())
    ids = tokenizer(row["query"])["input_ids"] + tokenizer(row["response"])["input_ids"]
    assert len(ids) == 20 and 0 not in ids
    assert ids == tokenizer(row["text"])["input_ids"]


def test_lengths_are_enough_and_fit():
    lengths = draw_lengths("a", 10_000, 64)
    assert 10_000 <= sum(lengths) < 10_064 and max(lengths) <= 64


def test_a_model_of_no_shipped_shape_is_named(tmp_path):
    path = ROOT / "yamls/smollm2_full.yaml"
    with pytest.raises(
        ValueError, match="--model gpt2: no shipped shape; choose from smollm2-135m"
    ):
        offline_config(path, tmp_path, model="gpt2", steps=1)
