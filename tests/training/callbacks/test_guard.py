"""Wrong losses and gradients are found before an update, and the documents are named."""

import copy
import functools
import itertools
import logging
import re
from collections.abc import Callable

import pytest
import torch

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.packing.collator import PackCollator
from foundry_ext.training.callbacks import guard as guards
from foundry_ext.training.callbacks.guard import Guard
from tests.tiers import one_of
from tests.training import kit

AT = 2  # the batch, counted from 0, that has a wrong document


def run(world, folder, method="full", *, guard=None, **settings):
    callbacks = {"spy": {}, "guard": guard or {}}
    return kit.run(kit.run_config(world, folder, method, **{"callbacks": callbacks, **settings}))


def of(run: kit.Run) -> Guard:
    return next(x for x in run.trainer.state.callbacks if isinstance(x, Guard))


@pytest.fixture
def spoil(monkeypatch):
    """Return spoil(ids, change): packed batches with these documents get change(loss) as loss."""
    forward = SmolLM2ForCausalLM.forward

    def set_up(documents: list[list[int]], change: Callable) -> None:
        @functools.wraps(forward)
        def spoilt(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            ids, ends = kwargs["input_ids"][0].tolist(), kwargs["cu_seqlens"].tolist()
            if any(ids[start:end] in documents for start, end in itertools.pairwise(ends)):
                output.loss = change(output.loss)
            return output

        monkeypatch.setattr(SmolLM2ForCausalLM, "forward", spoilt)

    return set_up


def not_a_number(loss):
    return loss * float("nan")


def infinite_and_flat(loss):
    """Return an infinite loss with a finite gradient, as for a label of probability 0."""
    return loss + float("inf")


def only_the_gradient(loss):
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


def culprits(run, number=AT, count=1):
    """Return token ids and numbers of documents in that batch, from its packs in turn."""
    dataset = run.trainer.state.train_dataloader.dataset
    sampler = copy.copy(dataset.sampler)  # the run is shared
    sampler.set_epoch(0)
    documents = [int(pack[-1]) for pack in sampler.batch(number)][:count]
    return [dataset.documents[index].input_ids.tolist() for index in documents], documents


def moments(run):
    state = run.trainer.state.optimizers[0].state_dict()["state"]
    return {(p, key): torch.as_tensor(x) for p, kept in state.items() for key, x in kept.items()}


def test_a_run_without_trouble_is_what_it_was(world, finished, tmp_path):
    reference = finished("lora")
    settings = {key: x for key, x in reference.settings.items() if key != "callbacks"}
    run_ = run(world, tmp_path, "lora", **settings)
    assert run_.losses == reference.run.losses
    norms = run_.logged("guard/gradient_norm")
    assert norms == pytest.approx(list(of(run_).norms), rel=1e-6) and len(norms) == 8
    assert max(norms) > 1.0, "measured before clipping, whose threshold that is"


@pytest.mark.parametrize("method", one_of(["full", "lora"], "lora"))
@pytest.mark.parametrize("change", [not_a_number, infinite_and_flat, only_the_gradient])
def test_it_stops_before_the_step_and_names_the_document(
    world, finished, tmp_path, spoil, method, change
):
    documents, (number,) = culprits(finished(method).run)
    spoil(documents, change)
    what = "gradient" if change is only_the_gradient else "loss"
    with pytest.raises(
        FloatingPointError,
        match=rf"batch {AT} \(epoch 0\): the {what} is not finite; caused by document {number} of "
        rf"{re.escape(str(world.rows))} \(loss [^)]*\)\. This batch changed no weight",
    ) as error:
        run(world, tmp_path, method)
    # The weights are those of the last checkpoint.
    frame = error.traceback[-1].frame
    state = frame.f_locals["state"]
    saved = torch.load(kit.checkpoint(tmp_path, AT), weights_only=False)["state"]
    for name, weight in saved["model"].items():
        assert torch.equal(weight, state.model.state_dict()[name]), name
    assert not (tmp_path / "checkpoints" / f"ep0-ba{AT + 1}-rank0.pt").exists()


@pytest.mark.parametrize(
    "optimizer", ["decoupled_adamw", "decoupled_lionw", "foreach_lionw", "fused_adamw"]
)
def test_a_skipped_step_changes_nothing(world, finished, tmp_path, spoil, caplog, optimizer):
    documents, numbers = culprits(finished("full").run, count=2)
    spoil(documents, not_a_number)
    common = {"optimizer__name": optimizer, "optimizer__weight_decay": 0.1}
    common["guard"] = {"action": "skip"}
    before = run(world, tmp_path / "before", **common, max_duration=f"{AT}ba")
    with caplog.at_level(logging.WARNING, logger="foundry_ext"):
        after = run(world, tmp_path / "after", **common, max_duration=f"{AT + 1}ba")
    assert not any("skipped" in line for line in caplog.messages[:-1])
    assert all(f"document {number} of " in caplog.messages[-1] for number in numbers)
    assert all(torch.equal(x, before.weights[name]) for name, x in after.weights.items())
    expected = moments(before)
    assert expected and expected.keys() == moments(after).keys()
    assert all(torch.equal(x, expected[key]) for key, x in moments(after).items())
    clock = after.trainer.state.timestamp
    assert clock.batch == AT + 1 and clock.token > before.trainer.state.timestamp.token
    assert after.logged("guard/skipped") == [1] and of(after).skipped == 1


def test_it_continues_after_a_skipped_step_and_resumes_with_its_state(
    world, finished, tmp_path, spoil
):
    documents, _ = culprits(finished("lora").run)
    spoil(documents, not_a_number)
    whole = run(world, tmp_path / "whole", "lora", guard={"action": "skip"})
    assert whole.logged("guard/skipped") == [1, 2], "once an epoch"
    assert len(of(whole).norms) == 6
    path = str(kit.checkpoint(tmp_path / "whole", 5))
    resumed = run(world, tmp_path / "rest", "lora", guard={"action": "skip"}, load_path=path)
    assert resumed.losses[-1] == whole.losses[-1]
    assert of(resumed).state_dict() == of(whole).state_dict()
    assert all(torch.equal(x, whole.weights[name]) for name, x in resumed.weights.items())


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_spike_of_the_gradient(world, finished, tmp_path, spoil, monkeypatch, caplog, action):
    """The spike's document stands out among all documents of the batch."""
    monkeypatch.setattr(guards, "ENOUGH", AT)
    documents, (number,) = culprits(finished("full").run)
    spoil(documents, lambda loss: loss * 1e3)
    settings = {"guard": {"action": action}, "max_duration": f"{AT + 1}ba"}
    if action == "stop":
        with pytest.raises(FloatingPointError, match="times the median") as error:
            run(world, tmp_path, **settings)
        text = str(error.value)
    else:
        assert of(run(world, tmp_path, **settings)).skipped == 1
        text = caplog.messages[-1]
    norm, times, usual = map(
        float, re.search(r"norm, (\S+), is (\d+) times the .* 2 steps, (\S+);", text).groups()
    )
    assert norm == pytest.approx(times * usual, rel=0.02) and times > 20
    alone = re.search(r"measured alone: document (\d+) of .*? gradient norm (\S+)\)", text)
    assert int(alone[1]) == number
    assert float(alone[2]) <= norm


def test_what_is_no_spike(world, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "ENOUGH", 1)
    run_ = run(world, tmp_path, guard={"spike_factor": 1e6})
    norms = run_.logged("guard/gradient_norm")
    assert of(run_).skipped == 0 and max(norms) > 1.5 * min(norms)
    with pytest.raises(FloatingPointError, match="times the median"):
        run(world, tmp_path / "strict", guard={"spike_factor": 1.01})


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_weights_that_are_not_finite_end_a_run(world, tmp_path, action, monkeypatch):
    """Skipping steps would never end."""
    judge = Guard.judge

    def spoilt(self, state, logger):
        if state.timestamp.batch == 2:
            state.model.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        judge(self, state, logger)

    monkeypatch.setattr(Guard, "judge", spoilt)
    with pytest.raises(FloatingPointError, match=r"batch 3 .*, and 1 \(\S*1.mlp.up_proj.weight\)"):
        run(world, tmp_path, guard={"action": action})


def test_it_does_not_skip_forever(world, tmp_path, monkeypatch):
    forward = SmolLM2ForCausalLM.forward

    @functools.wraps(forward)
    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = not_a_number(output.loss)
        return output

    monkeypatch.setattr(SmolLM2ForCausalLM, "forward", spoilt)
    with pytest.raises(FloatingPointError, match=r"batch 5 .* nor did the 5 before it"):
        run(world, tmp_path, guard={"action": "skip"})


def test_the_host_waits_once_a_step(world, tmp_path, monkeypatch):
    from tests.benchmarks.test_no_sync import NoWaiting

    reads, judge, read = [], Guard.judge, guards._read

    def watched(self, state, logger):
        with NoWaiting():
            judge(self, state, logger)

    monkeypatch.setattr(Guard, "judge", watched)
    monkeypatch.setattr(guards, "_read", lambda found: reads.append(1) or read(found))
    run_ = run(world, tmp_path)
    assert len(reads) == len(run_.losses)


@pytest.mark.parametrize(("key", "value"), [("input_ids", kit.VOCABULARY), ("labels", -1)])
def test_ids_outside_the_vocabulary(world, finished, tmp_path, monkeypatch, key, value):
    """The document is named; on a GPU the model's own check could not name it."""
    (ids,), (number,) = culprits(finished("full").run)
    collate = PackCollator.__call__

    def collated(self, documents):
        pack = collate(self, documents)
        for place, document in enumerate(documents):
            if document.input_ids.tolist() == ids:
                pack[key][0, pack["cu_seqlens"][place]] = value
        return pack

    monkeypatch.setattr(PackCollator, "__call__", collated)
    text = rf"guard: document {number} of \S+: {key}: {value} at position \d+ is outside"
    with pytest.raises(ValueError, match=text):
        run(world, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "warn"}, "guard.action: 'warn'; choose one of stop, skip"),
        ({"spike_factor": 1}, "guard.spike_factor: 1; must be a number above 1"),
        ({"spike_factor": float("nan")}, "guard.spike_factor: nan; must be a number above 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Guard(**settings)
