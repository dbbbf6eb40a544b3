"""The run's record: its counts, through crash, stop and resumption, and on several ranks."""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from composer.core import Callback

import foundry_ext.training.meter
from foundry_ext.models.flops import training_flops
from foundry_ext.records.record import mark_failed, read_record
from foundry_ext.training.callbacks.run_record import RunRecord
from tests.system.test_ranks import launch
from tests.training import kit

REVISION = "foundry_ext.data.loading.find_revision"  # files have no revision


def settings(world, folder: Path, **overrides):
    """Return settings with the record's callback first, before the callbacks that it waits for."""
    loader = kit.loader_config(world.eval_rows, eval_packs=1)
    return {
        "callbacks": {
            "run_record": {"path": f"{folder}/record.json", "experiment": "trial"},
            "forgetting": {
                "items": f"{folder}/items.jsonl",
                "sets": {
                    "target": {
                        "role": "learning",
                        "type": "documents",
                        "loader": kit.loader_config(world.eval_rows),
                    }
                },
            },
            "spy": {},
        },
        "eval_loader": loader,
        "eval_interval": "3ba",
        "log_config": True,
        **overrides,
    }


def counted(batches) -> dict[str, int]:
    """Count the documents of the batches themselves, without padding documents."""
    documents = [
        document
        for batch in batches
        for pack in batch
        for document in kit.documents_of([pack])[: pack["num_documents"]]
    ]
    return {
        "documents": len(documents),
        "real": sum(len(ids) for ids, _ in documents),
        "loss": sum(int((labels != -100).sum()) for _, labels in documents),
        "slots": sum(pack["input_ids"].shape[1] for batch in batches for pack in batch),
        "packs": sum(map(len, batches)),
        "squares": sum(len(ids) ** 2 for ids, _ in documents),
    }


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Return a finished run with rsLoRA, fixed shapes and a secret in its YAML."""
    folder = tmp_path_factory.mktemp("whole")
    given = settings(world, folder, seed=23, precision="fp32")
    given["train_loader"] = kit.loader_config(world.rows, shuffle=True, fixed_shape=True)
    given["train_loader"]["dataset"]["hf_kwargs"] = {"token": "hf_planted"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "planted-in-the-environment")
        given["variables"] = {"note": "planted-in-the-environment", "hub_token": "planted too"}
        patch.setattr(REVISION, lambda *_: "c0ffee")
        run = kit.run(kit.run_config(world, folder, "rslora", **given))
    return run, read_record(folder / "record.json"), folder


def test_a_finished_run(whole):
    run, record, _ = whole
    counts = counted(run.spy.batches)
    assert (record["status"], record["error"]) == ("finished", None)
    assert record["started"] < record["ended"] <= record["updated"]
    assert record["steps"] == len(run.losses) == 8
    assert record["documents"] == counts["documents"] == 80
    assert record["tokens"] == {name: counts[name] for name in ("slots", "real", "loss")}
    assert counts["slots"] > counts["real"] == int(run.trainer.state.timestamp.token)
    assert 0 < record["time"]["train_seconds"] < record["time"]["wall_seconds"]
    assert record["peak_memory_bytes"] > 50e6
    warm = counted(run.spy.batches[1:])
    throughput = record["throughput"]
    assert throughput["fill"] == pytest.approx(warm["real"] / (64 * warm["packs"]))
    ratio = throughput["real_tokens_per_second"] / throughput["loss_tokens_per_second"]
    assert ratio == pytest.approx(warm["real"] / warm["loss"])
    assert throughput["real_tokens_per_second"] > warm["real"] / record["time"]["train_seconds"]
    assert 0 < throughput["waiting_for_data"] < 1
    assert throughput["mfu"] is None, "no peak is known of a CPU"


def test_what_the_run_was(world, whole):
    run, record, _ = whole
    assert (record["run_name"], record["experiment"], record["seed"]) == ("rslora", "trial", 23)
    assert (record["method"], record["learning_rate"]) == ("rslora", 0.01)
    model = record["model"]
    assert (model["rank"], model["alpha"]) == (4, 8)
    assert model["effective_scale"] == 8 / math.sqrt(4)
    assert model["target_modules"] == kit.LORA["target_modules"] and model["init"] == "default"
    parameters = list(run.trainer.state.model.parameters())
    assert model["parameters"] == sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert model["trainable_parameters"] == trainable < model["parameters"]
    config = record["config"]
    assert config["optimizer"]["lr"] == 0.01 and config["model"]["peft_config"]["r"] == 4
    assert config["callbacks"]["run_record"]["experiment"] == "trial" and "n_params" not in config
    environment = record["environment"]
    assert environment["packages"]["torch"] == version("torch") and environment["device"]
    assert (environment["device_kind"], environment["world_size"]) == ("cpu", 1)
    train = record["data"]["train"]
    assert train["name"] == str(world.rows) and train["counts"]["kept"] == 40
    dataset = run.trainer.state.train_dataloader.dataset
    assert train["tokens"] == int(dataset.documents.lengths.sum())
    assert set(record["data"]["eval"]) == {"eval/eval", "target"}
    assert record["data"]["eval"]["target"]["documents"] == 11
    loaders = [train, *record["data"]["eval"].values()]
    assert [loader["revision"] for loader in loaders] == ["c0ffee"] * 3


def test_evaluations_are_those_of_the_forgetting_callback_and_composer(whole):
    run, record, folder = whole
    evaluations = record["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 3, 6, 8]
    composers = [entry["metrics"].get("eval/eval/LanguageCrossEntropy") for entry in evaluations]
    assert composers == [None, *run.logged("metrics/eval/LanguageCrossEntropy")]
    losses = [entry["metrics"]["target/loss"] for entry in evaluations]
    assert composers[1:] == pytest.approx(losses[1:], rel=1e-6)
    assert evaluations[-1]["learning"]["target_loss"] == losses[0] - losses[-1]
    assert record["items"] == "items.jsonl" and (folder / "items.jsonl").exists()


def test_no_secret_enters(whole):
    _, record, folder = whole
    text = (folder / "record.json").read_text()
    assert "planted" not in text
    assert record["config"]["variables"]["hub_token"] == "[redacted]"
    assert record["config"]["tokenizer"]["name"]


def test_a_crash_leaves_a_failed_record_and_is_resumed(world, whole, tmp_path, monkeypatch):
    """Counters continue from the checkpoint and end like those of an uninterrupted run."""
    monkeypatch.setattr(REVISION, lambda *_: "c0ffee")
    reference = whole[1]
    given = settings(world, tmp_path, seed=23, save_interval="2ba", autoresume=True)
    given["train_loader"] = kit.loader_config(world.rows, shuffle=True, fixed_shape=True)
    given["callbacks"]["spy"] = {"crash_after": 5}
    with pytest.raises(kit.Crash) as crash:
        kit.run(kit.run_config(world, tmp_path, "rslora", **given))
    running = read_record(tmp_path / "record.json")
    assert (running["status"], running["steps"]) == ("running", 4)  # at the last checkpoint
    assert [entry["step"] for entry in running["evaluations"]] == [0, 3]
    crash.value.__traceback__ = None
    mark_failed(tmp_path / "record.json", crash.value)  # as launch.py does
    failed = read_record(tmp_path / "record.json")
    assert (failed["status"], failed["error"]) == ("failed", "Crash: ")

    given["callbacks"]["spy"] = {}
    kit.run(kit.run_config(world, tmp_path, "rslora", **given))
    record = read_record(tmp_path / "record.json")
    assert record["status"] == "finished" and record["error"] is None
    assert record["started"] == failed["started"]
    for name in ("steps", "documents", "tokens", "data", "model"):
        assert record[name] == reference[name], name
    assert [entry["step"] for entry in record["evaluations"]] == [0, 3, 6, 8]
    for ours, theirs in zip(record["evaluations"], reference["evaluations"], strict=True):
        assert ours == theirs
    assert record["time"]["train_seconds"] > running["time"]["train_seconds"]

    kit.run(kit.run_config(world, tmp_path, "rslora", **given))  # with nothing left to do
    again = read_record(tmp_path / "record.json")
    assert again["status"] == "finished"
    for name in ("steps", "documents", "tokens", "throughput", "evaluations"):
        assert again[name] == record[name], name


class Stop(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch == 2:
            state.stop_training()


kit.llmfoundry.registry.callbacks.register("stop", func=Stop)


def test_a_run_that_is_stopped_says_so(world, tmp_path):
    given = settings(world, tmp_path, save_folder=None)
    given["callbacks"]["stop"] = {}
    kit.run(kit.run_config(world, tmp_path, **given))
    record = read_record(tmp_path / "record.json")
    assert (record["status"], record["steps"], record["method"]) == ("stopped", 2, "full")
    assert record["model"]["rank"] is None
    assert record["evaluations"][-1]["step"] == 2  # measured after the end of the fit


def test_a_run_has_ended_with_its_last_evaluation(world, tmp_path, monkeypatch):
    def crash(_forgetting, state, _logger):
        if state.timestamp.batch == 8:
            raise kit.Crash

    monkeypatch.setattr(
        "foundry_ext.training.callbacks.forgetting.Forgetting.eval_after_all", crash
    )
    with pytest.raises(kit.Crash) as error:
        kit.run(kit.run_config(world, tmp_path, **settings(world, tmp_path, save_folder=None)))
    mark_failed(tmp_path / "record.json", error.value)
    record = read_record(tmp_path / "record.json")
    assert (record["status"], record["steps"]) == ("failed", 8)


def test_closing_early_is_a_failure(world, tmp_path):
    given = settings(world, tmp_path, save_folder=None)
    given["callbacks"]["spy"] = {"crash_after": 1}
    given["callbacks"]["keep"] = {}
    with pytest.raises(kit.Crash):
        kit.run(kit.run_config(world, tmp_path, **given))
    Keep.kept.close(Keep.kept.state, None)
    record = read_record(tmp_path / "record.json")
    assert (record["status"], record["error"]) == (
        "failed",
        "closed before the end of the training",
    )


class Keep(Callback):
    kept: RunRecord

    def fit_start(self, state, logger):
        Keep.kept = next(x for x in state.callbacks if isinstance(x, RunRecord))


kit.llmfoundry.registry.callbacks.register("keep", func=Keep)


def test_mfu(world, tmp_path, monkeypatch):
    """On a device with a known peak, MFU is the FLOPs of the real documents over the time.

    The base is frozen, and the adapter's own products count.
    """
    monkeypatch.setattr(foundry_ext.training.meter, "device_peak", lambda state: 1e9)
    given = settings(world, tmp_path, save_folder=None, max_duration="4ba")
    given["callbacks"]["packed_throughput"] = {}
    run = kit.run(kit.run_config(world, tmp_path, "lora", **given))
    record = read_record(tmp_path / "record.json")
    warm, model = counted(run.spy.batches[1:]), run.trainer.state.model
    flops = training_flops(
        model.inner_model.config,
        num_tokens=warm["real"],
        num_loss_tokens=warm["loss"],
        sum_squared_lengths=warm["squares"],
        frozen_base=True,
        adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    seconds = warm["real"] / record["throughput"]["real_tokens_per_second"]
    assert record["throughput"]["mfu"] == pytest.approx(flops / seconds / 1e9)
    (logged,) = run.logged("throughput/device/mfu")[-1:]
    speed = run.logged("throughput/real_tokens_per_sec")[-1]
    assert logged == pytest.approx(flops / (warm["real"] / speed) / 1e9)


def test_items_elsewhere_are_refused(world, tmp_path):
    given = settings(world, tmp_path, save_folder=None)
    given["callbacks"]["forgetting"]["items"] = str(tmp_path.parent / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"elsewhere.jsonl does not lie beside"):
        kit.run(kit.run_config(world, tmp_path, **given))


def test_without_its_configuration_a_run_is_refused(world, tmp_path):
    given = settings(world, tmp_path, save_folder=None, log_config=False)
    with pytest.raises(ValueError, match="log_config: false"):
        kit.run(kit.run_config(world, tmp_path, **given))


@pytest.mark.more
def test_two_ranks_write_one_record(world, tmp_path):
    """The counts equal those of one rank with the same global batch."""
    records = {}
    for name, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        given = settings(world, folder, global_train_batch_size=4, save_interval="2ba")
        given["callbacks"]["text_samples"] = {"prompts": ["one bird", "a"], "max_new_tokens": 3}
        if ranks == 1:
            kit.run(kit.run_config(world, folder, "rslora", **given))
        else:
            launch(world, folder, 2, {"run": {"method": "rslora", **given}})
        records[name] = read_record(folder / "record.json")
    one, two = records["one"], records["two"]
    assert two["status"] == "finished" and two["environment"]["world_size"] == 2
    for name in ("steps", "documents", "tokens", "data", "model"):
        assert two[name] == one[name], name
    assert two["pid"] != os.getpid() == one["pid"]
    for ours, theirs in zip(two["evaluations"], one["evaluations"], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
    lines = (tmp_path / "two" / "items.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)) for line in lines}) == len(lines)
