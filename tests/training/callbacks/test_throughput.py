"""Throughput in real tokens, the metrics file, and exports at the end of training."""

import itertools
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import foundry_ext.training.meter
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.training.callbacks.throughput import PackedThroughput, as_text
from foundry_ext.training.loggers.metrics_file import read_metrics
from foundry_ext.training.meter import StepCounts, over_ranks
from tests.tiers import one_of
from tests.training import kit

# --- packed_throughput ---------------------------------------------------------------------------


class Clock:
    """Clock that is half a second later each time it is read."""

    def __init__(self):
        self.ticks = itertools.count()

    def perf_counter(self):
        return 0.5 * next(self.ticks)


def test_throughput_counts_real_tokens(world, tmp_path, monkeypatch):
    monkeypatch.setattr(foundry_ext.training.meter, "time", Clock())
    callbacks = {"spy": {}, "packed_throughput": {"window_size": 2}}
    run = kit.run(kit.run_config(world, tmp_path, callbacks=callbacks, save_folder=None))
    counts = []
    for batch in run.spy.batches[1:]:  # the first one is left out
        documents = kit.documents_of(batch)
        labels = sum(int((labels != -100).sum()) for _, labels in documents)
        counts.append((sum(len(ids) for ids, _ in documents), labels, len(documents), len(batch)))
    windows = [counts[max(0, end - 2) : end] for end in range(1, len(counts) + 1)]
    sums = [[sum(column) for column in zip(*window, strict=True)] for window in windows]
    # The clock is read before the batch is there, after it, and at the step's end.
    seconds = [1.0 * len(window) for window in windows]
    for name, expected in {
        "throughput/real_tokens_per_sec": [s[0] / t for s, t in zip(sums, seconds, strict=True)],
        "throughput/device/real_tokens_per_sec": [
            s[0] / t for s, t in zip(sums, seconds, strict=True)
        ],
        "throughput/loss_tokens_per_sec": [s[1] / t for s, t in zip(sums, seconds, strict=True)],
        "throughput/documents_per_sec": [s[2] / t for s, t in zip(sums, seconds, strict=True)],
        "throughput/waiting_for_data": [0.5] * len(sums),
        "packing/fill": [s[0] / (64 * s[3]) for s in sums],
        "packing/documents_per_pack": [s[2] / s[3] for s in sums],
        "data/kept": [40],
        "data/dropped_overlong": [0],
    }.items():
        assert run.logged(name) == pytest.approx(expected), name


def test_counts_over_ranks(monkeypatch):
    """Counts are summed and stay integers; times are the slowest rank's."""
    here = StepCounts(2.0, 0.5, 100, 60, 7, 2, 128, 10**15 + 1)
    there = StepCounts(1.5, 0.75, 90, 50, 5, 2, 128, 10**15 + 2)

    def all_gather(mine):
        assert mine.tolist() == [float(value) for value in vars(here).values()]
        return [mine, torch.tensor(list(vars(there).values()), dtype=torch.float64)]

    dist = foundry_ext.training.meter.dist
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    together = over_ranks(here)
    assert together == StepCounts(2.0, 0.75, 190, 110, 12, 4, 256, 2 * 10**15 + 3)
    assert type(together.real_tokens) is int


def test_one_rank_talks_to_nobody(world, tmp_path, monkeypatch):
    """A collective of one rank would copy to the GPU and wait for it in every batch."""

    def fail(*_):
        raise AssertionError("a collective")

    dist = foundry_ext.training.meter.dist
    monkeypatch.setattr(dist, "all_gather", fail)
    monkeypatch.setattr(dist, "all_gather_object", fail)
    callbacks = {"spy": {}, "packed_throughput": {}}
    kit.run(kit.run_config(world, tmp_path, callbacks=callbacks, save_folder=None))


def test_throughput_leaves_out_a_resumed_run_s_first_batch_too(world, finished, tmp_path):
    reference = finished("full")
    settings = {**reference.settings, "callbacks": {"spy": {}, "packed_throughput": {}}}
    path = str(kit.checkpoint(reference.folder, 5))
    run = kit.run(kit.run_config(world, tmp_path, load_path=path, **settings))
    assert len(run.losses) == 3
    assert len(run.logged("throughput/real_tokens_per_sec")) == 2


def test_the_packing_of_a_resumed_run_is_that_of_one_that_never_stopped(world, tmp_path):
    """The window is in the checkpoint; a checkpoint of an earlier version has none."""
    callbacks = {"spy": {}, "packed_throughput": {"window_size": 4}}
    settings = {"callbacks": callbacks, "save_interval": "1ba"}
    whole = kit.run(kit.run_config(world, tmp_path / "a", **settings))
    given = {**settings, "save_folder": None}
    for batch in (1, 3, 6):
        path = kit.checkpoint(tmp_path / "a", batch)
        run = kit.run(kit.run_config(world, tmp_path / "b", load_path=str(path), **given))
        for name in ("packing/fill", "packing/documents_per_pack"):
            assert run.logged(name) == whole.logged(name)[batch - 1 :], name
    state = torch.load(path, weights_only=False)
    names = [name for name in state["state"]["callbacks"] if "PackedThroughput" in name]
    state["state"]["callbacks"].update({name: {} for name in names})
    torch.save(state, tmp_path / "old.pt")
    load_path = str(tmp_path / "old.pt")
    run = kit.run(kit.run_config(world, tmp_path / "c", load_path=load_path, **given))
    assert names and len(run.logged("packing/fill")) == len(run.losses) == 2


@pytest.mark.parametrize(("interval", "batches"), [("3ba", [3, 6, 8]), ("1ep", [4, 8])])
def test_throughput_in_a_line_of_the_console(world, tmp_path, capfd, interval, batches):
    """Lines come at Composer's interval and at the end, with the numbers that are logged."""
    callbacks = {"spy": {}, "packed_throughput": {}}
    given = {"log_to_console": True, "console_log_interval": interval, "save_folder": None}
    run = kit.run(kit.run_config(world, tmp_path, callbacks=callbacks, **given))
    lines = [line for line in capfd.readouterr().err.splitlines() if "real tokens/s" in line]
    assert [int(line.split("]")[0].split("=")[1]) for line in lines] == batches
    rates = run.logged("throughput/real_tokens_per_sec")  # of every batch but the first
    fills = run.logged("packing/fill")
    for line, batch in zip(lines, batches, strict=True):
        assert f" {rates[batch - 2]:,.0f} real tokens/s (" in line
        assert f"packs {100 * fills[batch - 2]:.1f} % full, data wait " in line
        assert "MFU" not in line, "no peak is known of a CPU"


def test_throughput_prints_nothing_without_a_console(world, tmp_path, capfd):
    callbacks = {"spy": {}, "packed_throughput": {}}
    kit.run(kit.run_config(world, tmp_path, callbacks=callbacks, save_folder=None))
    assert "real tokens/s" not in capfd.readouterr().err


def test_the_line_says_mfu_where_it_is_known():
    logged = {
        "throughput/real_tokens_per_sec": 81234.4,
        "throughput/loss_tokens_per_sec": 40617.2,
        "throughput/device/mfu": 0.352,
        "packing/fill": 0.991,
        "throughput/waiting_for_data": 0.002,
    }
    assert as_text(logged) == (
        "81,234 real tokens/s (40,617 with loss), MFU 35.2 %, packs 99.1 % full, data wait 0.2 %"
    )


def test_throughput_needs_a_packed_loader(world, tmp_path):
    loader = {
        "name": "finetuning",
        "dataset": {
            "hf_name": "json",
            "hf_kwargs": {"data_files": {"train": str(world.rows)}},
            "split": "train",
            "max_seq_len": 32,
            "decoder_only_format": True,
            "shuffle": False,
        },
        "drop_last": False,
        "num_workers": 0,
        "prefetch_factor": None,
        "persistent_workers": False,
    }
    callbacks = {"spy": {}, "packed_throughput": {}}
    config = kit.run_config(world, tmp_path, train_loader=loader, callbacks=callbacks)
    with pytest.raises(ValueError, match="packed_throughput counts packs"):
        kit.run(config)


def test_throughput_refuses_an_empty_window():
    with pytest.raises(ValueError, match=r"window_size: 0"):
        PackedThroughput(window_size=0)


# --- metrics_file --------------------------------------------------------------------------------


def test_a_resumed_run_continues_the_same_file(world, finished, tmp_path):
    reference = finished("full")
    path = tmp_path / "{run_name}.jsonl"
    settings = {
        **reference.settings,
        "loggers": {"inmemory": {}, "metrics_file": {"path": str(path)}},
        "autoresume": True,
        "save_interval": "2ba",
    }
    with pytest.raises(kit.Crash):
        crash = {**settings, "callbacks": {"spy": {"crash_after": 5}}}
        kit.run(kit.run_config(world, tmp_path, **crash))
    with (tmp_path / "full.jsonl").open("a") as file:
        file.write('{"batch": 5, "loss/tr')  # the rest of a line after a kill
    assert read_metrics(tmp_path / "full.jsonl")["loss/train/total"]
    kit.run(kit.run_config(world, tmp_path, **{**settings, "callbacks": {"spy": {}}}))
    metrics = read_metrics(tmp_path / "full.jsonl")
    assert metrics["loss/train/total"] == dict(enumerate(reference.run.losses))
    evaluated = dict(zip((3, 6), reference.run.logged("metrics/eval/TokenAccuracy"), strict=False))
    assert metrics["metrics/eval/TokenAccuracy"].items() >= evaluated.items()
    # A new run of that name starts a new file.
    new = {**settings, "callbacks": {"spy": {}}, "autoresume": False, "max_duration": "1ba"}
    kit.run(kit.run_config(world, tmp_path, save_overwrite=True, **new))
    assert list(read_metrics(tmp_path / "full.jsonl")["loss/train/total"]) == [0]


# --- exports -------------------------------------------------------------------------------------


def load_stock(world, folder, method):
    """Load a folder as a user of transformers or peft does."""
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is LlamaForCausalLM
        return model
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder)


def assert_same_model(ours, theirs):
    pack = kit.make_pack(kit.make_documents([20]))
    with torch.no_grad():
        logits = ours.eval()({key: value for key, value in pack.items() if key != "labels"}).logits
        expected = theirs.eval()(input_ids=pack["input_ids"]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
def test_the_exported_folder_loads_in_stock_libraries(world, finished, method):
    reference = finished(method)
    trained = reference.run.trainer.state.model
    assert_same_model(trained, load_stock(world, reference.folder / "hf", method))
    tokenizer = AutoTokenizer.from_pretrained(reference.folder / "hf")
    text = "7 the bird 3.5 slowly<|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"] == kit.load_tokenizer(world)(text)["input_ids"]


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
def test_callback_and_command_write_the_same_folder(world, finished, tmp_path, method):
    reference = finished(method)
    ours = reference.folder / "hf"
    out = export_checkpoint(kit.checkpoint(reference.folder, 8), tmp_path / "out")
    apart = {".hf_export", "README.md"}  # a card names its folder
    files, others = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in apart}
        for folder in (ours, out)
    )
    assert files == others
    if method == "full":  # same architecture and cache setting, so other tools can load it
        assert (ours / "config.json").read_text() == (world.base / "config.json").read_text()
        settings = json.loads((ours / "generation_config.json").read_text())
        assert settings["max_new_tokens"] == 77


def test_an_export_is_replaced_and_nothing_else(world, tmp_path):
    settings = {"max_duration": "1ba", "save_overwrite": True}
    folder = tmp_path / "{run_name}-hf"
    settings["callbacks"] = {"spy": {}, "hf_export": {"folder": str(folder)}}
    kit.run(kit.run_config(world, tmp_path, **settings))
    kit.run(kit.run_config(world, tmp_path, "lora", **settings, run_name="full"))
    written = {path.name for path in (tmp_path / "full-hf").iterdir()}
    assert "adapter_config.json" in written and "config.json" not in written
    with pytest.raises(ValueError, match=r"full-hf is there already, and would be replaced"):
        kit.run(kit.run_config(world, tmp_path, **{**settings, "save_folder": None}))
    (tmp_path / "mine-hf").mkdir()
    (tmp_path / "mine-hf" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="mine-hf exists and is not an earlier export"):
        kit.run(kit.run_config(world, tmp_path, **settings, run_name="mine"))
    assert (tmp_path / "mine-hf" / "thesis.tex").exists()


@pytest.mark.parametrize("method", ["full", "dora"])
def test_llm_foundry_s_own_checkpointer_works(world, finished, tmp_path, method):
    """It builds the model's class again, whose name must not reach `architectures`. (Trap 27.)"""
    callbacks = {
        "spy": {},
        "hf_checkpointer": {"save_folder": str(tmp_path / "stock"), "save_interval": "1dur"},
    }
    settings = {**finished(method).settings, "callbacks": callbacks, "save_folder": None}
    run = kit.run(kit.run_config(world, tmp_path, method, **settings))
    folder = tmp_path / "stock" / "huggingface" / "ba8"
    assert_same_model(run.trainer.state.model, load_stock(world, folder, method))
    if method == "full":
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
