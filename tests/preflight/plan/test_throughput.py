"""A plan's time: of finished runs of the same kind, measured now, or predicted for a card."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from foundry_ext.models.flops import PEAK_FLOPS, peak_flops
from foundry_ext.models.memory import CARDS
from foundry_ext.preflight.plan.plan import card_seconds
from foundry_ext.preflight.plan.roofline import card
from foundry_ext.preflight.plan.text import format_plan
from foundry_ext.utils.environment import device_name
from tests.preflight.plan.kit import config_of, plan_of, recorded
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


def finished_run(config: Any, folder: Path, **changes: Any) -> None:
    """Write the record of a finished run of this configuration beside the run to plan."""
    from foundry_ext.records.record import new_record, write_record

    record = new_record(
        run_name="before",
        experiment="e",
        method="full",
        seed=1,
        learning_rate=0.01,
        config=OmegaConf.to_container(config, resolve=True),  # pyright: ignore[reportArgumentType]
        environment={
            "python": "3",
            "packages": {},
            "commit": None,
            "dirty": None,
            "device": device_name("cpu"),
            "device_kind": "cpu",
            "world_size": 1,
        },
        data={
            "train": {
                **dict.fromkeys(("name", "revision", "fingerprint", "documents", "tokens")),
                "counts": {},
            },
            "eval": {},
        },
        model={
            "name": "m",
            "parameters": 1,
            "trainable_parameters": 1,
            **dict.fromkeys(("rank", "alpha", "effective_scale", "target_modules", "init")),
        },
    )
    point = {"step": 0, "real_tokens": 0, "metrics": {}, "learning": {}, "forgetting": {}}
    record |= {
        "status": "finished",
        "tokens": {"slots": 1000, "real": 1000, "loss": 9},
        "time": {"wall_seconds": 26.0, "train_seconds": 20.0},
        "evaluations": [point, {**point, "step": 5}],
        **changes,
    }
    write_record(folder / "before" / "record.json", record)


def test_time_is_that_of_finished_runs(world, tmp_path):
    config = recorded(world, tmp_path)
    finished_run(config, tmp_path)
    plan = plan_of(config)
    assert plan.throughput.measured is None and plan.throughput.num_records == 1
    assert plan.throughput.training_seconds(plan.schedule) == plan.schedule.totals.real_tokens / 50
    assert plan.throughput.evaluation_seconds == 3.0
    assert "by 1 finished run like this one" in format_plan(plan)


@pytest.mark.parametrize(
    "changed", [{"precision": "amp_bf16"}, {"train_loader.dataset.pack_tokens": 128}]
)
def test_runs_of_another_kind_say_nothing_of_its_time(world, tmp_path, changed):
    config = recorded(world, tmp_path)
    other = config.copy()
    for key, value in changed.items():
        OmegaConf.update(other, key, value)
    finished_run(other, tmp_path)
    throughput = plan_of(config).throughput
    assert throughput.num_records == 0 and throughput.measured is not None
    assert throughput.measured.seconds_per_token > 0


def test_a_card_s_time_is_that_of_its_steps(world, tmp_path):
    plan = plan_of(config_of(world, tmp_path, precision="amp_bf16"))
    assert plan.throughput.training_seconds(plan.schedule) is None, "Composer refuses it on a CPU"
    cards = ["RTX 3090 24 GB", "A100 80 GB", "H200 141 GB"]
    seconds = [card_seconds(plan, name) for name in cards]
    assert all(seconds) and seconds[0] >= seconds[-1]
    assert card_seconds(plan, "my own card") is None
    longer = plan_of(config_of(world, tmp_path, precision="amp_bf16", max_duration="20ba"))
    share = longer.schedule.steps / plan.schedule.steps
    assert card_seconds(longer, cards[0]) == pytest.approx(share * seconds[0], rel=0.1)
    text = format_plan(plan)
    assert "predicted from counts; no such card has been measured" in text


def test_named_cards_have_a_peak():
    assert PEAK_FLOPS and all(peak_flops(name) and card(name) for name in CARDS)
