"""Learning and forgetting in a run: the figures are right, and the run is not disturbed."""

import pytest
import torch
import torch.nn.functional as F

from tests.system.test_ranks import launch
from tests.tiers import one_of
from tests.training import kit
from tests.training.callbacks.forgetting_kit import callback, config, make_sets, read


@pytest.fixture(scope="module")
def sets(world, tmp_path_factory):
    return make_sets(world, tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def measured(world, sets, tmp_path_factory):
    """Return measured(method) -> (run, folder), like `finished` but with the callback."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(f"measured-{method}")
            made[method] = kit.run(config(world, folder, method, sets)), folder
        return made[method]

    return get


@pytest.mark.parametrize("method", one_of(["full", "lora", "dora"], "lora"))
def test_figures(world, measured, method):
    """Loss equals Composer's own evaluation, KL the one from logits, at step 0 and later."""
    run, folder = measured(method)
    evaluations = callback(run).evaluations
    steps = [evaluation["step"] for evaluation in evaluations]
    assert steps[:2] == [0, 3] and steps[-1] == len(run.losses) and len(set(steps)) == len(steps)
    first, last = evaluations[0], evaluations[-1]
    assert first["real_tokens"] == 0 < evaluations[1]["real_tokens"] < last["real_tokens"]
    composers = run.logged("metrics/eval/LanguageCrossEntropy")
    ours = [evaluation["metrics"]["target/loss"] for evaluation in evaluations]
    assert ours == pytest.approx(composers, rel=1e-6) and ours[-1] < ours[0]

    assert first["metrics"]["source/kl"] == 0, "the base model against itself"
    assert set(first["learning"].values()) | set(first["forgetting"].values()) == {0}
    assert last["learning"]["target_loss"] == ours[0] - ours[-1]
    loss = [evaluation["metrics"]["source/loss"] for evaluation in (first, last)]
    assert last["forgetting"]["source_loss"] == loss[1] - loss[0]
    assert last["forgetting"]["source_kl"] == last["metrics"]["source/kl"] > 0
    lost = first["metrics"]["choice/acc"] - last["metrics"]["choice/acc"]
    assert last["forgetting"]["choice_acc"] == last["forgetting"]["mean_accuracy"] == lost
    for name in ("evaluation/source/kl", "learning/target_loss", "forgetting/source_loss"):
        assert len(run.logged(name)) == len(steps), name

    items = [item for item in read(folder / f"{method}.jsonl") if item["step"] == last["step"]]
    documents = [item for item in items if item["set"] == "source"]
    assert len(documents) == 7
    mean = sum(item["kl"] for item in documents) / sum(item["tokens"] for item in documents)
    assert mean == pytest.approx(last["metrics"]["source/kl"])
    _check_kl(world, run, documents)


@torch.no_grad()
def _check_kl(world, run, documents):
    """Return KL from the logits of stock models: the trained one and the base."""
    theirs = kit.stock_model(world, run.trainer.state.model).eval()
    base = kit.LlamaForCausalLM.from_pretrained(world.base).eval()
    dataset = run.trainer.state.evaluators[0].dataloader.dataloader.dataset
    for item in documents:
        document = dataset.documents[int(item["item"])]
        ids = torch.tensor(document.input_ids, dtype=torch.long)
        scored = torch.tensor(document.loss_mask)[1:]
        now, before = (
            model(ids[None]).logits[0, :-1][scored].log_softmax(-1) for model in (theirs, base)
        )
        loss = F.nll_loss(now, ids[1:][scored], reduction="sum").item()
        kl = F.kl_div(now, before, reduction="sum", log_target=True).item()
        assert item["tokens"] == scored.sum()
        assert item["loss"] == pytest.approx(loss, rel=1e-5)
        assert item["kl"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("method", one_of(["full", "lora"], "lora"))
def test_training_does_not_notice(world, measured, tmp_path, method):
    """Losses, weights and dropout's random numbers are the same, bit for bit."""
    run, _ = measured(method)
    settings = {"callbacks": {"spy": {}}, "eval_first": False}
    plain = kit.run(config(world, tmp_path, method, {}, **settings))
    assert run.losses == plain.losses
    weights = plain.weights
    assert all(torch.equal(value, weights[name]) for name, value in run.weights.items())
    assert run.trainer.state.model.training


def test_pissa_is_measured_against_the_true_base(world, sets, tmp_path):
    """PiSSA's base layers hold a residual: without its adapter the model would be incomplete."""
    pissa = {**kit.LORA, "init_lora_weights": "pissa"}
    run = kit.run(
        config(
            world,
            tmp_path,
            "lora",
            {"source": sets["source"]},
            model__peft_config=pissa,
            max_duration="3ba",
        )
    )
    first, last = callback(run).evaluations
    assert first["metrics"]["source/kl"] == 0 < last["metrics"]["source/kl"]


def test_step_0_is_measured_without_eval_first(world, sets, measured, tmp_path):
    run = kit.run(
        config(
            world,
            tmp_path,
            "lora",
            {"target": sets["target"]},
            eval_first=False,
            max_duration="1ba",
            eval_interval="1ba",
        )
    )
    # Evaluators of other intervals may end at the same step: it is measured once.
    callback(run).eval_after_all(run.trainer.state, None)
    first, last = callback(run).evaluations
    assert (first["step"], last["step"]) == (0, 1)
    expected = callback(measured("lora")[0]).evaluations[0]["metrics"]["target/loss"]
    assert first["metrics"]["target/loss"] == expected


@pytest.mark.parametrize("method", one_of(["full", "dora"], "dora"))
def test_resumed_run_goes_on_measuring(world, sets, measured, tmp_path, method):
    """A resumed run ends like an uninterrupted one.

    The base is the model before training, not the checkpoint, and an unfinished line is dropped.
    """
    whole, folder = measured(method)
    crashing = config(world, tmp_path, method, sets, autoresume=True)
    crashing.callbacks.spy = {"crash_after": 4}
    with pytest.raises(kit.Crash):
        kit.run(crashing)
    path = tmp_path / f"{method}.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "set"')
    run = kit.run(config(world, tmp_path, method, sets, autoresume=True))
    assert run.spy.batches and len(run.spy.batches) < len(whole.spy.batches)
    assert callback(run).evaluations == callback(whole).evaluations
    assert read(path) == read(folder / f"{method}.jsonl")

    # The same run on another base model would measure KL to the wrong one.
    theirs = kit.make_llama(seed=3)
    theirs.save_pretrained(tmp_path / "other")
    first = kit.checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="another base model"):
        kit.run(
            config(
                world,
                tmp_path / "again",
                method,
                sets,
                load_path=str(first),
                model__pretrained_model_name_or_path=str(tmp_path / "other"),
            )
        )


def test_weights_only_start_from_the_checkpoint(world, sets, measured, tmp_path):
    """In full fine-tuning from a Composer checkpoint, that checkpoint is the base model."""
    _, folder = measured("full")
    run = kit.run(
        config(
            world,
            tmp_path,
            "full",
            {"source": sets["source"]},
            load_path=str(kit.checkpoint(folder, 3)),
            load_weights_only=True,
            max_duration="1ba",
        )
    )
    assert callback(run).evaluations[0]["metrics"]["source/kl"] == 0


@pytest.mark.more
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_measure_what_one_does(world, sets, measured, tmp_path, num_ranks):
    """Ranks share the packs, and the losses under DDP are as without the callback."""
    settings = {
        "global_train_batch_size": 3 * (num_ranks == 3) or 2,
        "max_duration": "2ba",
        "eval_interval": "2ba",
        "eval_first": True,
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
        "save_folder": None,
        "method": "lora",
        "model__peft_config__lora_dropout": 0.0,
    }
    here = {
        "spy": {"keep_gradients": True},
        "forgetting": {"items": str(tmp_path / "one.jsonl"), "sets": sets},
    }
    there = {**here, "forgetting": {"items": str(tmp_path / "ranks.jsonl"), "sets": sets}}
    one = kit.run(kit.run_config(world, tmp_path / "one", callbacks=here, **settings))
    result = launch(world, tmp_path, num_ranks, {"ranks": {**settings, "callbacks": there}})[
        "ranks"
    ]
    ours, theirs = read(tmp_path / "ranks.jsonl"), read(tmp_path / "one.jsonl")
    assert len(ours) == len(theirs) > 0
    for item, expected in zip(ours, theirs, strict=True):
        assert item.keys() == expected.keys()
        for key, value in expected.items():
            if item["step"] and isinstance(value, float | list):  # trained on other ranks
                assert item[key] == pytest.approx(value, rel=1e-4, abs=1e-7)
            else:
                assert item[key] == value
    assert result["losses"] == pytest.approx(one.losses, rel=1e-6)
    for ours, theirs in zip(result["gradients"], one.spy.gradients, strict=True):
        kit.assert_same_gradients(ours, theirs)
