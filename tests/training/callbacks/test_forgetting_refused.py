"""Sets and runs that the `forgetting` callback refuses, before the first step."""

from types import SimpleNamespace

import pytest
import torch

from foundry_ext.training.callbacks.forgetting import Forgetting
from tests.training import kit
from tests.training.callbacks.forgetting_kit import config, make_sets


@pytest.fixture(scope="module")
def sets(world, tmp_path_factory):
    return make_sets(world, tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": {"roll": "learning"}}, r"target\.roll: unknown key, did you mean 'role'\?"),
        ({"target": {"role": "both"}}, "'both' must be 'learning' or 'forgetting'"),
        ({"target": {"type": "perplexity"}}, "'perplexity'; choose one of documents"),
        ({"target": {"loader": {"name": "finetuning", "dataset": {"split": "x"}}}}, "'finetuning'"),
        ({"choice": {"path": "nowhere.jsonl"}}, "nowhere.jsonl' does not exist"),
        ({"choice": {"num_fewshot": 5}}, "num_fewshot: 5 .* file's 5 rows"),
        ({"choice": {"metric": "f1"}}, "metric: 'f1' must be 'acc' or 'acc_norm'"),
        ({"problems": {"max_new_tokens": 128}}, "leaves no room"),
    ],
)
def test_bad_sets_are_refused_before_the_first_step(world, sets, tmp_path, change, message):
    ((name, keys),) = change.items()
    with pytest.raises(ValueError, match=message):
        kit.run(config(world, tmp_path, "full", {**sets, name: {**sets[name], **keys}}))


def test_training_data_are_refused(world, sets, tmp_path):
    """Documents are compared by content, so another file of the same rows is refused too."""
    copy = tmp_path / "held_out.jsonl"
    copy.write_text(world.rows.read_text())
    bad = {**sets["target"], "loader": kit.loader_config(copy)}
    with pytest.raises(ValueError, match=r"sets\.target\.loader: .* are those of train_loader"):
        kit.run(config(world, tmp_path, "full", {"target": bad}))


def test_no_evaluation_is_refused(world, sets, tmp_path):
    with pytest.raises(ValueError, match="give an eval_loader"):
        kit.run(config(world, tmp_path, "full", sets, eval_loader=None, eval_first=False))


def test_sharded_or_foreign_models_are_refused(sets):
    """FSDP needs several ranks or a GPU, so this test uses a stand-in for the trainer's state."""
    callback = Forgetting({"choice": sets["choice"]})
    with pytest.raises(ValueError, match=r"FSDP shards.*DDP.*foundry-ext eval"):
        callback.init(SimpleNamespace(fsdp_config=object()), None)
    state = SimpleNamespace(fsdp_config=None, is_model_ddp=False, model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"not Linear; set model.name: smollm2_packed"):
        callback.init(state, None)


def test_resuming_a_run_that_measured_nothing_is_refused(world, sets, finished, tmp_path):
    """Its step 0, which later steps are compared with, is gone."""
    first = kit.checkpoint(finished("full").folder, 3)
    with pytest.raises(ValueError, match="no measurement of step 0"):
        kit.run(config(world, tmp_path, "full", sets, load_path=str(first)))
