"""Every setting has a decision, and a run that resumes with other settings keeps its promise."""

import inspect
import json
import shutil
from dataclasses import asdict, fields

import llmfoundry.registry as registry
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from llmfoundry.utils.config_utils import TrainConfig

from foundry_ext.checkpoints.setting_defaults import DATASETS, SETS, setting_defaults
from foundry_ext.data import config as data_config
from foundry_ext.data.tokenize import TokenizeSettings
from foundry_ext.evaluation import config as evaluation_config
from foundry_ext.records.result_settings import EFFECTS, Effect, effect_of
from foundry_ext.training.model import ComposerSmolLM2
from tests.properties import examples
from tests.training import kit
from tests.training.callbacks.forgetting_kit import CHOICES, PROBLEMS, make_sets

# Callbacks that may change a result, and keys of a dataset that decide the documents or the packs.
DECIDING_CALLBACKS = {
    *("async_eval", "curriculum_learning", "dataset_swap", "early_stopper", "eval_output_logging"),
    *("forgetting", "generate_callback", "global_lr_scaling", "kill_loss_spike", "layer_freezing"),
    *("load_checkpoint", "loss_perp_v_len"),
}
CONTENT_KEYS = {
    *("hf_name", "split", "hf_kwargs", "safe_load", "holdout", "overlong", "datasets"),
    *("preprocessing_fn", "target_prompts", "target_responses", "text_key", "max_seq_len"),
    *("streams", "remote", "local", "token_encoding_type"),
    *("pack_tokens", "shuffle", "shuffle_seed", "prepared", "window"),  # compared by the loader
}
DECIDING_MODEL_KEYS = {
    *("additional_eval_metrics", "additional_train_metrics", "allow_embedding_resizing"),
    *("config_overrides", "frozen_dtype", "load_in_8bit", "peft_config", "pretrained"),
    *("pretrained_lora_id_or_path", "pretrained_model_name_or_path", "trust_remote_code"),
    "use_train_metrics",
}
MOVED = {"eval_loaders", "icl_tasks_str", "eval_gauntlet_str"}  # llm-foundry sets them itself


def parameters(component) -> set[str]:
    return set(inspect.signature(component).parameters) - {"self", "tokenizer", "device_batch_size"}


def test_every_key_of_a_yaml_has_a_decision():
    """A key that llm-foundry adds must be put into the table, or deliberately nowhere."""
    assert {field.name for field in fields(TrainConfig)} - MOVED - EFFECTS.keys() == set()


SHIPPED = ("composer.", "foundry_ext.", "llmfoundry.")


@pytest.mark.parametrize("name", ["packed_finetuning", "packed_text"])
def test_every_key_of_our_loaders_has_a_decision(name):
    keys = parameters(registry.dataloaders.get(name)) | {"name"}
    for loader in ("train_loader", "eval_loader"):
        assert {key for key in keys if f"{loader}.{key}" not in EFFECTS} == set()
        dataset = f"{loader}.dataset"
        undecided = {x for x in data_config._KEYS[name] if f"{dataset}.{x}" not in EFFECTS}
        assert undecided <= CONTENT_KEYS
        assert effect_of(f"{dataset}.hf_name") is Effect.CONTENT


def test_every_component_has_a_decision():
    groups = [("callbacks", registry.callbacks), ("callbacks", registry.callbacks_with_config)]
    for section, group in [*groups, ("loggers", registry.loggers)]:
        # Tests register some of their own, and `foundry-ext verify` registers its watch.
        shipped = {x for x in group.get_all() if group.get(x).__module__.startswith(SHIPPED)}
        shipped -= {"verify_watch"}
        undecided = {name for name in shipped if f"{section}.{name}" not in EFFECTS}
        assert undecided <= (DECIDING_CALLBACKS if section == "callbacks" else set())
    undecided = {key for key in parameters(ComposerSmolLM2) if f"model.{key}" not in EFFECTS}
    assert undecided == DECIDING_MODEL_KEYS
    for section in ("optimizer.x", "scheduler.x", "algorithms.x", "callbacks.x", "loggers.x"):
        assert effect_of(section) is Effect.DECIDES


def test_defaults_are_those_of_the_code(world):
    for name, known in DATASETS.items():
        settings = asdict(data_config.tokenize_settings({}, 8, known.get("text_key")))
        for key in TokenizeSettings.__dataclass_fields__.keys() & known.keys():
            assert known[key] == settings[key], (name, key)
    spec = registry.dataloaders.get("packed_finetuning")(
        tokenizer=kit.load_tokenizer(world),
        device_batch_size=1,
        dataset={"hf_name": str(world.rows), "split": "train", "max_seq_len": 32},
    )
    sampler, known = spec.dataloader.dataset.sampler, DATASETS["packed_finetuning"]
    assert (sampler.capacity, sampler.seed) == (32, known["shuffle_seed"])
    assert (sampler.shuffle, sampler.batch_packs) == (known["shuffle"], 1)
    assert spec.dataloader.dataset.collator.fixed_shape == known["fixed_shape"]
    for kind, model in evaluation_config._TYPES.items():
        optional = {k: x.default for k, x in model.model_fields.items() if not x.is_required()}
        assert optional == SETS[kind]
    config = {"optimizer": {"name": "fused_adamw"}, "callbacks": {"guard": {}, "unknown": {}}}
    defaults = setting_defaults(config)
    assert (defaults["optimizer.betas"], defaults["callbacks.guard.action"]) == (
        [0.9, 0.95],
        "stop",
    )
    assert defaults["accumulate_train_batch_on_tokens"] is True and "max_duration" not in defaults
    assert json.loads(json.dumps(defaults)) == defaults


# --- resumed runs --------------------------------------------------------------------------------


def config(world, folder, **overrides):
    settings = {
        "eval_loader": kit.loader_config(world.eval_rows),
        "autoresume": True,
        "max_duration": "4ba",
        "callbacks": {"spy": {}, "exact_resume": {}},
        **overrides,
    }
    return kit.run_config(world, folder, **settings)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Train 4 batches; return the weights, and a folder with the checkpoint of batch 2 alone."""
    folder = tmp_path_factory.mktemp("whole")
    run = kit.run(config(world, folder))
    for batch in (1, 3, 4):
        kit.checkpoint(folder, batch).unlink()
    (folder / "checkpoints/latest-rank0.pt").unlink()
    return run.weights, folder / "checkpoints"


CHANGES = [
    ("device_train_microbatch_size", 3),
    ("train_loader__drop_last", True),
    ("train_loader__dataset__fixed_shape", True),
    ("train_loader__dataset__eval_packs", 1),
    ("train_loader__dataset__overlong", "truncate"),
    ("train_loader__pin_memory", False),
    ("model__activation_checkpointing", True),
    ("model__attention_backend", "sdpa"),
    ("model__config_overrides", {"attention_dropout": 0.5}),
    ("eval_interval", "1ba"),
    ("eval_first", True),
    ("eval_loader", None),
    ("optimizer__weight_decay", 0),
    ("optimizer__weight_decay", 0.1),
    ("optimizer__betas", [0.9, 0.95]),
    ("optimizer__eps", 1e-8),
    ("optimizer__eps", 1e-2),
    ("optimizer__amsgrad", True),
    ("scheduler__alpha", 1),
    ("scheduler__alpha", 0.5),
    ("algorithms__gradient_clipping__clipping_threshold", 1),
    ("algorithms__gradient_clipping__clipping_threshold", 0.01),
    ("algorithms", None),
    ("callbacks__guard", {}),
    ("callbacks__lr_monitor", {}),
    ("accumulate_train_batch_on_tokens", True),
    ("accumulate_train_batch_on_tokens", False),
    ("train_subset_num_batches", 1),
    ("python_log_level", "warning"),
    ("save_interval", "3ba"),
    ("variables", {"x": 1}),
]


def each_alone(test):
    """Let hypothesis begin with every change by itself."""
    for change in CHANGES:
        test = example([change])(test)
    return test


@each_alone
@examples(4)
@given(st.lists(st.sampled_from(CHANGES), min_size=2, max_size=3, unique_by=lambda one: one[0]))
def test_what_is_accepted_gives_the_weights_of_its_class(world, whole, tmp_path_factory, changes):
    weights, checkpoints = whole
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(checkpoints, folder / "checkpoints", symlinks=True)
    try:
        run = kit.run(config(world, folder, **dict(changes)))
    except ValueError as error:
        assert "is of a run with another" in str(error)
        keys = [key.replace("__", ".") for key, _ in changes]
        assert any(effect_of(key) is Effect.DECIDES for key in keys), changes
        return
    assert [len(run.spy.batches), run.trainer.state.timestamp.batch] == [2, 4]
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)
    effects = {effect_of(key.replace("__", ".")) for key, _ in changes}
    if Effect.ROUNDING not in effects:
        assert all(torch.equal(weight, weights[name]) for name, weight in run.weights.items())


def resume(world, whole, folder, **overrides):
    if not (folder / "checkpoints").exists():
        shutil.copytree(whole[1], folder / "checkpoints", symlinks=True)
    return kit.run(config(world, folder, **overrides))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train_loader__drop_last": True}, "train_loader.drop_last: None, now True"),
        ({"accumulate_train_batch_on_tokens": False}, "accumulate_train_batch_on_tokens"),
        ({"train_loader__dataset__eval_packs": 2}, "train_loader.dataset.eval_packs: None, now 2"),
        ({"eval_loader__drop_last": True}, "eval_loader.drop_last: None, now True"),
        ({"callbacks__early_stopper": {"monitor": "x", "dataloader_label": "eval"}}, "early_stop"),
        ({"train_subset_num_batches": 3}, "train_subset_num_batches: None, now 3"),
        ({"optimizer__amsgrad": True}, "optimizer.amsgrad: None, now True"),
        ({"algorithms__low_precision_layernorm": {}}, "algorithms.low_precision_layernorm: None"),
        ({"algorithms": None}, "clipping_threshold: 1.0, now None"),
    ],
)
def test_a_setting_of_one_side_is_refused(world, whole, tmp_path, change, key):
    with pytest.raises(ValueError, match=key):
        resume(world, whole, tmp_path, **change)


def test_equal_settings_in_other_words_resume_silently(world, whole, tmp_path, caplog):
    change = {
        "optimizer": {"weight_decay": 0, "betas": [0.9, 0.95], "eps": 1e-8, "lr": 1e-2}
        | {"name": "decoupled_adamw", "amsgrad": False},
        "scheduler": {"t_warmup": "0 ba", "alpha": 1, "name": "constant_with_warmup"},
        "algorithms__gradient_clipping__clipping_threshold": 1,
        "train_loader__drop_last": False,
        "max_duration": "4 ba",
    }
    run = resume(world, whole, tmp_path, **change)
    assert all(torch.equal(weight, whole[0][name]) for name, weight in run.weights.items())
    assert "changed since" not in caplog.text


def test_allowed_changes_are_said(world, whole, tmp_path, caplog):
    change = {"device_train_microbatch_size": 3, "eval_interval": "1ba", "callbacks__guard": {}}
    resume(world, whole, tmp_path, **change)
    lines = [r.getMessage() for r in caplog.records if "changed since" in r.getMessage()]
    rounding, announced = lines
    assert "device_train_microbatch_size: 1, now 3" in rounding and "rounding" in rounding
    assert "eval_interval: 0, now 1ba" in announced and "callbacks.guard" in announced


# --- evaluation data -----------------------------------------------------------------------------


def edited(path, folder):
    """Return a copy of a JSONL file in which one word of its first row is another."""
    text = path.read_text()
    copy = folder / path.name
    copy.write_text(text.replace("one", "two", 1) if "one" in text else text.replace("a", "b", 1))
    assert copy.read_text() != text
    return copy


def test_an_edited_eval_loader_is_refused_and_a_moved_one_goes_on(world, whole, tmp_path):
    other = edited(world.eval_rows, tmp_path)
    message = rf"content of eval_loader {other}: documents \w+, now \w+ \(eval\).*Restore"
    with pytest.raises(ValueError, match=message):
        resume(world, whole, tmp_path, eval_loader=kit.loader_config(other))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(world.eval_rows, moved)
    resume(world, whole, tmp_path, eval_loader=kit.loader_config(moved))


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    """Train two batches with sets of every type; return the sets and the checkpoints."""
    folder = tmp_path_factory.mktemp("measured")
    sets = make_sets(world, folder)
    # One measured question, before which all others are examples.
    sets["shots"] = {**sets["choice"], "num_fewshot": 4, "max_items": 1}
    kit.run(config(world, folder, max_duration="2ba", callbacks=with_sets(sets)))
    return sets, folder / "checkpoints"


def with_sets(sets):
    return {"spy": {}, "forgetting": {"sets": sets}, "exact_resume": {}}


def resume_measured(world, measured, folder, sets, **callbacks):
    if not (folder / "checkpoints").exists():
        shutil.copytree(measured[1], folder / "checkpoints", symlinks=True)
    given = with_sets(sets) | callbacks
    return kit.run(config(world, folder, max_duration="3ba", callbacks=given))


def write(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["source", "choice", "shots", "problems", "gold"])
def test_an_edited_set_is_refused(world, measured, tmp_path, name):
    sets = measured[0]
    key = {"gold": "problems"}.get(name, name)
    if name == "source":
        change = {"loader": kit.loader_config(edited(world.eval_rows, tmp_path))}
    elif name in ("choice", "shots"):
        rows = [*CHOICES[:-1], {**CHOICES[-1], "query": "one eight two"}]
        change = {"path": write(tmp_path, "other", rows)}
    else:
        row = {**PROBLEMS[0], "answer": "a bird\n#### 7"}
        row = row if name == "gold" else {**row, "question": "count nothing"}
        change = {"path": write(tmp_path, "other", [row, *PROBLEMS[1:]])}
    other = {**sets, key: {**sets[key], **change}}
    with pytest.raises(ValueError, match=rf"forgetting\.sets\.{key}: .* holds other items"):
        resume_measured(world, measured, tmp_path, other)


def test_moved_sets_go_on(world, measured, tmp_path):
    sets = dict(measured[0])
    for name in ("choice", "shots", "problems"):
        path = tmp_path / f"moved-{name}.jsonl"
        shutil.copy(sets[name]["path"], path)
        sets[name] = {**sets[name], "path": str(path)}
    moved = tmp_path / "moved.jsonl"
    shutil.copy(world.eval_rows, moved)
    loader = {**kit.loader_config(moved), "drop_last": False}
    sets |= {name: {**sets[name], "loader": loader} for name in ("target", "source")}
    run = resume_measured(world, measured, tmp_path, sets)
    assert run.trainer.state.timestamp.batch == 3


def test_sets_come_and_go_not_in_the_middle(world, measured, tmp_path):
    sets = measured[0]
    fewer = {name: value for name, value in sets.items() if name != "choice"}
    with pytest.raises(ValueError, match=r"sets\.choice: the run that the checkpoint is of measur"):
        resume_measured(world, measured, tmp_path, fewer)
    more = {**sets, "again": sets["choice"]}
    with pytest.raises(ValueError, match=r"sets\.again: not in the run .* step 0"):
        resume_measured(world, measured, tmp_path, more)
    with pytest.raises(ValueError, match=r"sets\.choice\.num_fewshot: 1, now 2|sets\.choice: "):
        changed = {**sets, "choice": {**sets["choice"], "num_fewshot": 2}}
        resume_measured(world, measured, tmp_path, changed)
