"""The attention that "auto" chose by a clock stays with a run: in checkpoint, record and resume."""

import json

import pytest
import torch

from foundry_ext.config.automatic import EARLIER
from foundry_ext.launch.trainer_checks import trainer_is_checked
from foundry_ext.models import attention
from foundry_ext.models.decoder import PLAIN
from foundry_ext.training.callbacks.forgetting import Forgetting
from foundry_ext.utils.constants import CPU_ATTENTION
from tests.training import kit


@pytest.fixture
def choose(monkeypatch):
    """Return choose(name): make `name` the choice of "auto" from here on."""

    def change(name: str) -> None:
        monkeypatch.setenv(CPU_ATTENTION, name)
        attention._best_backend.cache_clear()

    yield change
    attention._best_backend.cache_clear()


def train(world, folder, *, batches="4ba", **overrides):
    record = {"path": str(folder / "record.json"), "experiment": "x"}
    callbacks = {"spy": {}, "exact_resume": {}, "run_record": record}
    settings = {"autoresume": True, "max_duration": batches, "callbacks": callbacks}
    run = kit.run(kit.run_config(world, folder, **settings, log_config=True, **overrides))
    used = run.trainer.state.model.inner_model.attention_backend
    written = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert written["environment"]["attention_backend"] == used
    return run, used


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumes_with_the_attention_it_had(world, tmp_path, choose):
    choose("torch_cpu")
    whole, used = train(world, tmp_path / "whole")
    assert used == "torch_cpu"
    train(world, tmp_path / "run", batches="2ba")
    choose("blockwise")
    resumed, used = train(world, tmp_path / "run")
    assert used == "torch_cpu"
    assert resumed.losses == whole.losses[2:]
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, whole.weights[name]), name
    # A YAML that names one means it.
    _, used = train(world, tmp_path / "run", batches="5ba", model__attention_backend="sdpa")
    assert used == "sdpa"


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_yesterday_goes_on_with_blockwise(world, tmp_path, choose):
    choose("blockwise")
    train(world, tmp_path, batches="2ba")
    path = kit.checkpoint(tmp_path, 2)
    content = torch.load(path, weights_only=False)
    content["state"]["callbacks"]["ExactResume"].pop("attention_backend")
    torch.save(content, path)
    choose("torch_cpu")
    _, used = train(world, tmp_path)
    assert used == "blockwise"


@pytest.mark.filterwarnings("ignore")
def test_the_base_model_of_kl_computes_as_the_run_does(world, tmp_path, choose):
    """The copy for full fine-tuning is made before the checkpoint's choices are kept."""
    loader = kit.loader_config(world.eval_rows)
    source = {"type": "documents", "role": "forgetting", "kl": True, "loader": loader}
    callbacks = {"spy": {}, "exact_resume": {}, "forgetting": {"sets": {"source": source}}}
    evaluated = {"eval_loader": kit.loader_config(world.eval_rows, eval_packs=1)}
    settings = {"autoresume": True, "callbacks": callbacks, "eval_interval": "1ba", **evaluated}

    def run(batches, **more):
        config = kit.run_config(world, tmp_path, max_duration=batches, **settings, **more)
        with trainer_is_checked(config, list(EARLIER)):
            return kit.run(config)

    choose("torch_cpu")
    run("2ba")
    choose("blockwise")
    # On a GPU, auto would compile from here on, and fuse evaluations.
    compiled = {"model__compile": "layers", "train_loader__dataset__fixed_shape": True}
    state = run("3ba", **compiled).trainer.state
    (forgetting,) = [x for x in state.callbacks if isinstance(x, Forgetting)]
    assert forgetting.base.base.model.attention_backend == "torch_cpu"
    assert forgetting.base.base.model.model.evaluation_pieces is PLAIN
