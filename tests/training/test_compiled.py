"""Runs with `compile` set, through llm-foundry's train command."""

import functools

import pytest
import torch

from foundry_ext.models import compiled as compiled_code
from foundry_ext.models.compiled import graphs_compiled
from tests.tiers import one_of
from tests.training import kit


@pytest.fixture
def without_code_generation(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, *, mode=None, **options: traced(f, **options))
    # What evaluation compiles is kept for the process: made anew here, and again by the next test.
    compiled_code._fused_pieces.cache_clear()
    yield
    compiled_code._fused_pieces.cache_clear()


# DoRA computes norms of weights that change in place, LoRA has dropout: both are traced too.
@pytest.mark.parametrize(
    ("method", "graphs"), one_of([("full", 1), ("lora", 2), ("dora", 2)], ("lora", 2))
)
def test_two_epochs_with_evaluations(world, tmp_path, method, graphs, without_code_generation):
    """Losses equal the uncompiled run's, and nothing is compiled again.

    Neither an evaluation, the second epoch, nor the empty packs that complete a batch cause it. A
    frozen embedding makes a second graph because the first layer's input then needs no gradient.
    """
    settings = {
        "train_loader__dataset__fixed_shape": True,
        "save_folder": None,
        "eval_interval": "1ep",
        "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
    }
    if method == "lora":  # a compiler draws other random numbers
        settings["model__peft_config__lora_dropout"] = 0.0
    eager = kit.run(kit.run_config(world, tmp_path, method, **settings))
    assert graphs_compiled() == 0
    compiled = kit.run(kit.run_config(world, tmp_path, method, model__compile="layers", **settings))
    assert graphs_compiled() == graphs
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    key = "metrics/eval/LanguageCrossEntropy"
    assert compiled.logged(key) == pytest.approx(eager.logged(key), rel=1e-5)


def test_unknown_scope(world):
    with pytest.raises(
        ValueError, match="compile: 'all' is unknown; choose one of auto, none, layers"
    ):
        kit.build(world, compile="all")
