"""What train.py checks whatever callbacks the YAML has: data, positions, weights."""

import json
import shutil

import pytest

from foundry_ext.utils.errors import UserError
from tests.system.bad_input.bench import Bench, environment
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture
def bench(world, tmp_path, monkeypatch):
    environment(monkeypatch)
    bench = Bench(tmp_path, world, monkeypatch)
    bench.change(callbacks=None, save_folder=None, save_interval=None, max_duration="1ba")
    return bench


def evaluate(bench: Bench, rows, **dataset) -> None:
    bench.change(eval_loader=kit.loader_config(rows, eval_packs=1, **dataset), eval_interval="1ba")


def overlapping(bench: Bench, *rows: int):
    """Write a file of the evaluation's rows and these rows of the training data."""
    lines = bench.world.rows.read_text().splitlines()
    path = bench.folder / "overlapping.jsonl"
    own = bench.world.eval_rows.read_text()
    path.write_text(own + "".join(f"{lines[row]}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("train", "evaluation", "says"),
    [
        ("train", "validation", "its documents are those of train_loader"),
        ("train", "train[:50%]", "20 of its 20 documents, 100.0 % of its tokens, are in train_lo"),
        ("train[:75%]", "train[50%:]", "10 of its 20 documents"),
        ("train[50%:]", "train[:75%]", "10 of its 30 documents"),
        ("train[:95%]", "test[-10%:]", "2 of its 4 documents"),
    ],
)
def test_an_evaluation_on_rows_that_are_trained_on_is_refused(bench, train, evaluation, says):
    bench.data(split=train)
    evaluate(bench, bench.world.rows, split=evaluation)
    ended = bench.train()
    assert ended.code == 2 and len(ended.errors) == 1
    assert f"eval_loader eval: {says}" in ended.errors[0]
    assert "holdout" in ended.errors[0]


def test_a_few_rows_in_both_are_counted_in_a_warning(bench, caplog):
    """Honest data repeat short rows; a tenth of an evaluation's tokens is refused."""
    lines = bench.world.rows.read_text().splitlines()
    shortest = min(range(len(lines)), key=lambda row: len(lines[row]))
    path = overlapping(bench, shortest)
    evaluate(bench, path)
    ended = bench.train()
    assert ended.code == 0, ended.err
    (warning,) = [line for line in caplog.messages if "are in train_loader too" in line]
    assert "eval_loader eval: 1 of its 12 documents" in warning
    assert f"document 11 of {path} is document {shortest} of {bench.world.rows}" in warning


def test_a_run_that_never_evaluates_may_name_its_training_rows(bench):
    for interval in (0, "0ba"):
        evaluate(bench, bench.world.rows)
        bench.change(eval_interval=interval)
        ended = bench.train()
        assert ended.code == 0, ended.err
    bench.change(eval_first=True)
    assert "is what train_loader trains on" in bench.train().errors[0]


def test_rows_of_one_of_several_evaluations_and_of_a_mixture(bench):
    mixture = [
        {"hf_name": str(bench.world.eval_rows), "split": "train"},
        {"hf_name": str(bench.world.rows), "split": "train", "share": 0.9},
    ]
    bench.change(train_loader__dataset={"datasets": mixture, "max_seq_len": 32})
    other = bench.folder / "other.jsonl"
    other.write_text(json.dumps({"prompt": "other", "response": "row"}) + "\n")
    loaders = {"apart": other, "replayed": bench.world.rows}
    loaders = [{"label": x, **kit.loader_config(y, eval_packs=1)} for x, y in loaders.items()]
    bench.change(eval_loader=loaders, eval_interval="1ba")
    (error,) = bench.train().errors
    assert "eval_loader replayed: " in error and "of its 40 documents" in error


@pytest.mark.parametrize("loader", ["train_loader", "eval_loader"])
def test_documents_that_may_be_longer_than_the_model_s_positions(bench, loader):
    evaluate(bench, bench.world.eval_rows)
    bench.change(**{f"{loader}__dataset__{key}": 64 for key in ("max_seq_len", "pack_tokens")})
    bench.change(model__config_overrides={"max_position_embeddings": 32})
    (error,) = bench.train().errors
    assert loader in error and "max_seq_len: 64 is more than the model's 32 positions" in error


def test_llm_foundry_s_own_command_refuses_such_documents_at_the_first_step(world, tmp_path):
    positions = {"model__config_overrides": {"max_position_embeddings": 31}}
    with pytest.raises(UserError, match="max_seq_len: 32 is more than the model's 31 positions"):
        kit.run(kit.run_config(world, tmp_path, **positions))
    assert not list(tmp_path.rglob("*.pt"))


# In its only step, weights times 1e38 by the decay, plus or minus fp32's largest number.
TOO_FAST = {"name": "decoupled_lionw", "lr": 3.4e38, "weight_decay": 1e38, "betas": [0.9, 0.95]}


@pytest.mark.parametrize("callback", ["none", "guard", "hf_export", "run_record"])
def test_weights_that_the_last_step_made_infinite_fail_the_run(bench, callback):
    callbacks = {
        "none": {},
        "guard": {"guard": {}},
        "hf_export": {"hf_export": {"folder": str(bench.folder / "export")}},
        "run_record": {
            "run_record": {"path": str(bench.folder / "record.json"), "experiment": "e"}
        },
    }
    bench.change(optimizer=TOO_FAST, callbacks=callbacks[callback])
    ended = bench.train()
    assert ended.code == 1 and len(ended.errors) == 1, ended.err
    assert "after the last step, batch 1, " in ended.errors[0]
    assert "lower optimizer.lr" in ended.errors[0]
    assert not (bench.folder / "export").exists()
    if callback == "run_record":
        record = bench.record()
        assert record["status"] == "failed" and "after the last step" in record["error"]


def _spoil(path, name="model.layers.1.mlp.up_proj.weight", value=float("nan")):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    (key,) = [key for key in weights if name in key]
    weights[key].flatten()[7] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_model_that_is_not_finite_is_named(bench, value):
    folder = bench.folder / "base"
    shutil.copytree(bench.world.base, folder)
    _spoil(folder / "model.safetensors", value=value)
    bench.change(model__pretrained_model_name_or_path=str(folder), callbacks={"guard": {}})
    ended = bench.train()
    assert ended.code == 2 and len(ended.errors) == 1
    assert f"{folder} has weights that are not finite, 1 of" in ended.errors[0]
    assert "layers.1.mlp.up_proj.weight" in ended.errors[0]


def test_a_checkpoint_whose_weights_are_not_finite_is_named(bench):
    saves = {"save_folder": str(bench.folder / "checkpoints"), "save_interval": "1ba"}
    bench.change(optimizer=TOO_FAST, **saves)
    assert bench.train().code == 1
    path = str(kit.checkpoint(bench.folder, 1))
    bench.change(load_path=path, load_weights_only=True, save_folder=None, save_interval=None)
    bench.change(optimizer={**TOO_FAST, "lr": 1e-3, "weight_decay": 0.0})
    ended = bench.train()
    assert ended.code == 2 and f"load_path, {path!r}: " in ended.errors[0]
    assert "of the weights to train are not finite" in ended.errors[0]
