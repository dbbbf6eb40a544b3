"""A run that was interrupted ends bit for bit like one that was not. (Traps 12, 14, 16, 31.)

The reference of each method is `finished`: 8 batches in two epochs, a checkpoint after each. Its
settings are not changed, so every check here is of a YAML without extra keys.
"""

import pytest
import torch

from foundry_ext.data.documents import Documents
from tests.tiers import one_of
from tests.training import kit

LAST = 8


def assert_ends_like(run, reference, *, after):
    assert run.losses == reference.losses[after:]
    expected = reference.weights
    assert run.weights.keys() == expected.keys()
    for name, weight in run.weights.items():
        assert torch.equal(weight, expected[name]), name
    clock, reference_clock = (r.trainer.state.timestamp for r in (run, reference))
    for unit in ("epoch", "batch", "sample", "token", "batch_in_epoch"):
        assert getattr(clock, unit) == getattr(reference_clock, unit), unit


def resumed(world, folder, method, settings, path, **overrides):
    return kit.run(
        kit.run_config(world, folder, method, **settings, load_path=str(path), **overrides)
    )


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
@pytest.mark.parametrize("batch", [2, 4, 5])
def test_from_the_middle_and_from_the_end_of_an_epoch(world, finished, tmp_path, method, batch):
    """LoRA has dropout here, whose random numbers continue as if nothing had happened."""
    reference = finished(method)
    path = kit.checkpoint(reference.folder, batch)
    settings = {**reference.settings, "callbacks": {"spy": {}}}
    run = resumed(world, tmp_path, method, settings, path)
    assert_ends_like(run, reference.run, after=batch)
    late = (kit.checkpoint(folder, LAST) for folder in (reference.folder, tmp_path))
    left, right = (torch.load(p, weights_only=False)["state"]["optimizers"] for p in late)
    for name, state in left["DecoupledAdamW"]["state"].items():
        for key, value in state.items():
            assert torch.equal(right["DecoupledAdamW"]["state"][name][key], value), (name, key)


@pytest.mark.parametrize("method", one_of(["full", "lora"], "lora"))
def test_from_a_checkpoint_taken_between_epochs(world, finished, tmp_path, method):
    """`save_interval: 1ep` saves when the clock is already in the next epoch."""
    reference = finished(method)
    settings = {**reference.settings, "callbacks": {"spy": {}}, "save_interval": "1ep"}
    kit.run(kit.run_config(world, tmp_path / "first", method, **settings))
    path = kit.checkpoint(tmp_path / "first", 4, epoch=1)
    run = resumed(world, tmp_path / "second", method, settings, path)
    assert_ends_like(run, reference.run, after=4)


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
def test_autoresume_after_a_crash(world, finished, tmp_path, method):
    """Started again with the same YAML, a run repeats the batches after the newest checkpoint."""
    reference = finished(method)
    settings = {**reference.settings, "autoresume": True, "save_interval": "2ba"}
    with pytest.raises(kit.Crash):
        crash = {**settings, "callbacks": {"spy": {"crash_after": 5}}}
        kit.run(kit.run_config(world, tmp_path, method, **crash))
    again = {**settings, "callbacks": {"spy": {}}}
    run = kit.run(kit.run_config(world, tmp_path, method, **again))
    assert_ends_like(run, reference.run, after=4)


def test_no_earlier_document_is_read(world, finished, tmp_path, monkeypatch):
    reference = finished("full")
    settings = {**reference.settings, "callbacks": {"spy": {}}, "eval_loader": None}
    read = []
    take = Documents.read
    monkeypatch.setattr(Documents, "read", lambda self, i: read.extend(i) or take(self, i))
    path = kit.checkpoint(reference.folder, 5)
    run = resumed(world, tmp_path, "full", settings, path)
    trained = [len(kit.documents_of(batch)) for batch in reference.run.spy.batches]
    assert len(read) == sum(trained[5:])
    assert_ends_like(run, reference.run, after=5)


# --- weights are loaded strictly, which Composer does not ask for (trap 16) ----------------------


@pytest.mark.parametrize(
    ("saved", "method", "problem"),
    [
        ("lora", "dora", "missing .*lora_magnitude_vector"),
        ("dora", "lora", "left over .*lora_magnitude_vector"),
        ("full", "lora", "missing .*lora_A"),
        ("lora", "full", "missing .*embed_tokens"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(
    world, finished, tmp_path, saved, method, problem
):
    reference = finished(saved)
    settings = {**reference.settings, "callbacks": {"spy": {}}}
    with pytest.raises(ValueError, match=f"of another model or peft_config.*{problem}"):
        resumed(world, tmp_path, method, settings, kit.checkpoint(reference.folder, 2))


def test_a_checkpoint_that_lost_one_matrix_is_refused(world, finished, tmp_path):
    reference = finished("dora")
    state = torch.load(kit.checkpoint(reference.folder, 2), weights_only=False)
    name = next(name for name in state["state"]["model"] if "layers.1.mlp" in name)
    del state["state"]["model"][name]
    torch.save(state, tmp_path / "part.pt")
    settings = {**reference.settings, "callbacks": {"spy": {}}}
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.mlp"):
        resumed(world, tmp_path, "dora", settings, tmp_path / "part.pt")


@pytest.mark.parametrize("method", one_of(kit.METHODS, "lora"))
def test_weights_alone_start_a_new_run(world, finished, tmp_path, method):
    """`load_weights_only: true` loads strictly, also from an adapter's checkpoint."""
    reference = finished(method)
    settings = {**reference.settings, "callbacks": {"spy": {}}, "load_weights_only": True}
    path = kit.checkpoint(reference.folder, LAST)
    run = resumed(world, tmp_path, method, settings, path, optimizer__lr=0.0, max_duration="1ba")
    assert run.trainer.state.timestamp.batch == 1
    assert all(
        torch.equal(weight, reference.run.weights[name]) for name, weight in run.weights.items()
    )
