"""A plan predicts training: every count is compared with that of a run."""

import json
import re
from typing import Any

import pytest

from foundry_ext.preflight.plan.text import format_plan
from foundry_ext.records.record import read_record
from foundry_ext.utils.errors import UserError
from tests.preflight.plan.kit import EvalSpy, config_of, plan_of, recorded
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("duration", "interval", "fixed"),
    [
        ("2ep", "0.25dur", False),
        ("3ep", "1ep", True),
        ("7ba", "0.3dur", False),
        ("900tok", "200tok", False),
        ("900tok", "0.3dur", False),
        ("23sp", "9sp", True),
    ],
)
def test_the_course_is_the_runs(world, tmp_path, duration: str, interval: str, fixed: bool):
    overrides = {
        "max_duration": duration,
        "eval_interval": interval,
        "save_interval": interval,
        "train_loader__dataset__fixed_shape": fixed,
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0.2dur"},
    }
    config = config_of(world, tmp_path, **overrides)
    schedule = plan_of(config).schedule
    run = kit.run(config)
    clock = run.trainer.state.timestamp
    assert schedule.steps == clock.batch.value
    assert schedule.totals.real_tokens == clock.token.value
    assert schedule.totals.documents == clock.sample.value
    packs = [pack for batch in run.spy.batches for pack in batch]
    assert schedule.totals.loss_tokens == sum(pack["num_loss_tokens"] for pack in packs)
    assert schedule.totals.slots == sum(pack["input_ids"].shape[1] for pack in packs)
    assert schedule.totals.packs == sum(pack["num_tokens"] > 0 for pack in packs)
    squares = sum(pack["sum_squared_lengths"] for pack in packs)
    assert schedule.totals.sum_squared_lengths == squares
    (spy,) = [one for one in run.trainer.state.callbacks if isinstance(one, EvalSpy)]
    assert schedule.evaluated_at == spy.steps
    assert schedule.saves == len(list((tmp_path / "checkpoints").glob("ep*-ba*.pt")))
    # Composer sets a rate by the clock before the step, so the full one comes a step later.
    assert schedule.warmup_steps is not None
    if schedule.steps > schedule.warmup_steps + 1:
        full = run.spy.rates.index(max(run.spy.rates))
        assert full == schedule.warmup_steps + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", kit.METHODS)
def test_parameters_and_method_are_the_models(world, tmp_path, method: str):
    plan = plan_of(config_of(world, tmp_path, method))
    ours = kit.build(world, method=method)
    model: Any = ours.model
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert plan.parameters.trainable == sum(number for number, needed in numbers if needed)
    assert plan.parameters.frozen == sum(number for number, needed in numbers if not needed)
    assert plan.method.name == method
    assert plan.training_flops > 0


def test_what_is_evaluated_is_counted(world, tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {"query": "One and two are", "choices": ["three", "a stone"], "gold": 0}
    questions.write_text((json.dumps(row) + "\n") * 5)
    held_out = {"type": "documents", "loader": kit.loader_config(world.eval_rows)}
    sets = {
        "kept": {**held_out, "role": "forgetting", "kl": True},
        "target": {**held_out, "role": "learning"},
        "choice": {"role": "forgetting", "type": "multiple_choice", "path": str(questions)},
        "unset": None,
    }
    callbacks = {
        "forgetting": {"sets": sets},
        "text_samples": {"prompts": ["a", "b"], "max_new_tokens": 7},
    }
    config = config_of(
        world, tmp_path, callbacks=callbacks, max_duration="4ba", eval_interval="2ba"
    )
    plan = plan_of(config)
    found = plan.evaluations
    assert found.steps == [0, 2, 4]
    assert found.generated == 14
    assert found.tokens["kept"] == found.tokens["target"] == found.tokens["eval"] > 0
    assert found.tokens["choice"] > 0 and "unset" not in found.tokens
    copies = plan.memory(64, checkpointing=False).frozen_copy
    assert copies == 4 * plan.parameters.total, "KL is measured against a copy"


def test_what_is_lost_is_said(world, tmp_path, write_jsonl, make_rows):
    rows = make_rows(30, longest=6)
    rows[3]["response"] = "~" * 300
    rows[4]["prompt"] = ""
    path = write_jsonl(rows)
    config = config_of(world, tmp_path, train_loader__dataset__hf_name=str(path))
    text = format_plan(plan_of(config))
    assert f"{path}: 1 truncated, 1 dropped empty," in text


def test_an_80_gb_card_gets_larger_packs_of_the_same_batch(world, tmp_path):
    overrides = {
        "model__pretrained_model_name_or_path": "smollm2-1.7b",
        "model__pretrained": False,
        "precision": "amp_bf16",
        "train_loader__dataset__pack_tokens": 1024,
        "global_train_batch_size": 96,
    }
    text = format_plan(plan_of(config_of(world, tmp_path, **overrides)), memory={"mine": 2**40})
    (line,) = [line for line in text.splitlines() if "H100 80 GB: pack_tokens" in line]
    words = line.replace(",", "").split()
    pack, packs = (
        int(words[words.index(key) + 1]) for key in ("pack_tokens", "global_train_batch_size")
    )
    assert pack * packs == 96 * 1024 and pack > 1024
    assert "RTX 3090 24 GB: pack" not in text, "full fine-tuning of 1.7B does not fit it"
    assert "  mine " in text


def test_the_heap_s_gaps_are_counted_on_a_cpu(world, tmp_path):
    shape = {"pretrained_model_name_or_path": "smollm2-135m", "pretrained": False}
    overrides = {f"model__{key}": value for key, value in shape.items()}
    text = format_plan(plan_of(config_of(world, tmp_path, **overrides)))
    (line,) = [line for line in text.splitlines() if "of memory here" in line]
    low, high, own = (float(number) for number in re.findall(r"([\d.]+) [GM]iB", line))
    assert own < low < high


def test_what_cannot_be_planned_is_named(world, tmp_path):
    for key, value, message in [
        ("max_duration", "9sec", "max_duration: '9sec' cannot be planned"),
        ("precision", "amp_fp8", "precision: 'amp_fp8' cannot be planned"),
        ("model__name", "hf_causal_lm", "model.name: 'hf_causal_lm' cannot be planned"),
        ("model__peft_config", {**kit.LORA, "target_modules": ["q_porj"]}, "matches no module"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_of(config_of(world, tmp_path, **{key: value}))


@pytest.mark.filterwarnings("ignore")
def test_the_plan_of_a_run_is_its_record(world, tmp_path):
    config = recorded(world, tmp_path)
    config.callbacks.spy = {}
    config.log_config = True
    plan = plan_of(config)
    kit.run(config)
    record = read_record(tmp_path / "full" / "record.json")
    totals = plan.schedule.totals
    assert record["steps"] == plan.schedule.steps
    assert record["documents"] == totals.documents
    assert record["tokens"] == {
        "slots": totals.slots,
        "real": totals.real_tokens,
        "loss": totals.loss_tokens,
    }
    fill = totals.packing_efficiency(plan.pack_tokens)
    assert record["throughput"]["fill"] == pytest.approx(fill, rel=0.2)
    after = plan_of(config)
    assert after.throughput.num_records == 1, "the next plan goes by this run"


def test_an_interval_of_the_clock_is_shown_as_one(world, tmp_path):
    """No step is known for it; the end of training is."""
    config = config_of(world, tmp_path, eval_interval="1h", save_interval="30m", max_duration="3ba")
    text = format_plan(plan_of(config))
    assert "evaluation: 1 times, after steps 3, and every 1h of training; tokens" in text
    assert "checkpoints: 1, and every 30m of training" in text


def test_an_evaluation_on_training_documents_is_refused_as_in_training(world, tmp_path):
    rows = {"eval_loader": kit.loader_config(world.rows, eval_packs=1, split="train[:50%]")}
    with pytest.raises(UserError, match="20 of its 20 documents"):
        plan_of(config_of(world, tmp_path, eval_interval="1ep", **rows))
    assert plan_of(config_of(world, tmp_path, eval_interval=0, **rows)).schedule.steps
