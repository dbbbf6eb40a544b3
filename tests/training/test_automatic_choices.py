"""A run that resumes keeps what was automatic when it started, in all that it writes."""

import json

import pytest
import torch

from foundry_ext.config.automatic import COMPILE, EARLIER, FIXED_SHAPE, LOSS
from foundry_ext.launch.trainer_checks import trainer_is_checked
from foundry_ext.models.compiled import graphs_compiled
from foundry_ext.utils.nested import get
from tests.training import kit

# What train.py would put into the YAML of this run on a GPU.
ON_A_GPU = {"model__compile": "layers", "train_loader__dataset__fixed_shape": True}


def train(world, folder, *, batches, automatic, **overrides):
    record = {"path": str(folder / "record.json"), "experiment": "x"}
    callbacks = {"spy": {}, "exact_resume": {}, "run_record": record}
    settings = {"autoresume": True, "max_duration": batches, "callbacks": callbacks}
    config = kit.run_config(world, folder, **settings, log_config=True, **overrides)
    with trainer_is_checked(config, automatic):
        run = kit.run(config)
    written = json.loads((folder / "record.json").read_text(encoding="utf-8"))["config"]
    return run, [get(written, key) for key in (COMPILE, FIXED_SHAPE)]


def losses(run, folder):
    """Return the loss that the model computes and the one that the record names."""
    written = json.loads((folder / "record.json").read_text(encoding="utf-8"))["config"]
    return run.trainer.state.model.inner_model.loss_implementation, get(written, LOSS)


@pytest.mark.filterwarnings("ignore")
def test_a_run_keeps_what_it_began_with(world, tmp_path):
    keys = list(EARLIER)
    whole, _ = train(world, tmp_path / "whole", batches="4ba", automatic=keys)
    train(world, tmp_path / "run", batches="2ba", automatic=keys)
    before = graphs_compiled()
    resumed, recorded = train(world, tmp_path / "run", batches="4ba", automatic=keys, **ON_A_GPU)
    assert graphs_compiled() == before, "nothing is compiled"
    assert recorded == ["none", False]
    assert losses(resumed, tmp_path / "run") == ("chunked", "chunked")
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name


@pytest.mark.filterwarnings("ignore")
def test_it_is_kept_again(world, tmp_path):
    """A second resume reads what the first one has written."""
    keys, fixed = list(EARLIER), {"train_loader__dataset__fixed_shape": True}
    train(world, tmp_path, batches="1ba", automatic=keys, **fixed)
    for batches in ("2ba", "3ba"):
        _, recorded = train(world, tmp_path, batches=batches, automatic=keys)
        assert recorded == ["none", True]


@pytest.mark.filterwarnings("ignore")
def test_a_given_value_is_obeyed(world, tmp_path):
    """It decides the others, so none of them is kept."""
    train(world, tmp_path, batches="2ba", automatic=list(EARLIER))
    fixed = {"train_loader__dataset__fixed_shape": True}
    _, recorded = train(world, tmp_path, batches="3ba", automatic=[COMPILE], **fixed)
    assert recorded[1] is True


@pytest.mark.filterwarnings("ignore")
def test_a_given_loss_is_obeyed(world, tmp_path):
    for batches in ("1ba", "2ba"):
        run, _ = train(
            world,
            tmp_path,
            batches=batches,
            automatic=[COMPILE, FIXED_SHAPE],
            model__loss="compiled",
        )
        assert losses(run, tmp_path) == ("compiled", "compiled")


@pytest.mark.filterwarnings("ignore")
def test_auto_that_nobody_decided_is_what_the_run_did(world, tmp_path):
    """llm-foundry's own command trains what train.py would have settled."""
    auto = {key.replace(".", "__"): "auto" for key in EARLIER}
    train(world, tmp_path, batches="1ba", automatic=[], **auto)
    run, recorded = train(world, tmp_path, batches="2ba", automatic=list(EARLIER), **ON_A_GPU)
    assert recorded == ["none", False]
    assert losses(run, tmp_path) == ("chunked", "chunked")
