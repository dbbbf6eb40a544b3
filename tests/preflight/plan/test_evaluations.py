"""Planned FLOPs of evaluations against torch's count of a run's own."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmfoundry
import numpy as np
import pytest
from composer.core import Callback
from omegaconf import OmegaConf

from foundry_ext.models.scores import BaseStates
from foundry_ext.preflight.plan.evaluations import _forest_work
from foundry_ext.preflight.plan.model import PlannedModel
from foundry_ext.preflight.plan.plan import plan_config
from foundry_ext.training.callbacks.forgetting import Forgetting
from tests.flops import counter
from tests.tiers import one_of
from tests.training import kit


class EvalFlops(Callback):
    """Callback `eval_flops` in a YAML that counts the products of Composer's evaluations."""

    def __init__(self):
        self.counts: list[int] = []

    def eval_start(self, state, logger):
        self.stack = ExitStack()
        self.counted = self.stack.enter_context(counter())

    def eval_end(self, state, logger):
        self.stack.close()
        self.counts.append(products(self.counted))


llmfoundry.registry.callbacks.register("eval_flops", func=EvalFlops)


def products(counted) -> int:
    """Return the FLOPs without attention, of which torch counts full squares on a CPU."""
    counts = counted.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if "attention" not in str(name))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


def config_of(world: kit.World, folder: Path, method: str) -> Any:
    shared = "One and two are three, and two of the birds are"
    rows = [
        {"query": shared, "choices": ["slowly", "a stone of light"], "gold": 0},
        {"context_options": ["a", "the"], "continuation": "seven", "gold": 1},
    ]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows * 4), "utf-8")
    held_out = {"type": "documents", "loader": kit.loader_config(world.eval_rows)}
    choice = {"role": "forgetting", "type": "multiple_choice", "path": str(questions)}
    sets = {
        "kept": {**held_out, "role": "forgetting", "kl": True},
        "target": {**held_out, "role": "learning"},
        "choice": choice,
    }
    return kit.run_config(
        world,
        folder,
        method,
        callbacks={"spy": {}, "forgetting": {"sets": sets}, "eval_flops": {}},
        eval_loader=kit.loader_config(world.eval_rows, pack_tokens=64, eval_packs=1),
        eval_subset_num_batches=2,
        eval_interval="1ba",
        eval_first=True,
        max_duration="2ba",
        save_folder=None,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", one_of(["full", "lora"], "lora"))
def test_planned_flops_are_those_that_a_run_computes(world, tmp_path, monkeypatch, method: str):
    """Each of three evaluations, and the base model once."""
    counts: list[int] = []
    measure = Forgetting._measure

    def counted_measure(self, state, logger):
        with counter() as found:
            measure(self, state, logger)
        counts.append(products(found))

    monkeypatch.setattr(Forgetting, "_measure", counted_measure)
    monkeypatch.setattr(PlannedModel, "evaluation_flops", without_attention)
    config = config_of(world, tmp_path, method)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    planned = plan_config(resolved, name="my.yaml").evaluations
    run = kit.run(config)
    by_composer = next(
        one for one in run.trainer.state.callbacks if isinstance(one, EvalFlops)
    ).counts
    counts = [count for count in counts if count]  # two events may end one step
    assert planned.steps == [0, 1, 2] and len(counts) == len(by_composer) == 3
    assert by_composer[0] == by_composer[1] > 0
    assert planned.flops == by_composer[1] + counts[1]
    assert planned.base_flops == counts[0] - counts[1] > 0
    assert planned.total_flops == sum(by_composer) + sum(counts)


evaluation_flops = PlannedModel.evaluation_flops


def without_attention(self, num_tokens, num_head_rows, _, **settings):
    return evaluation_flops(self, num_tokens, num_head_rows, 0, **settings)


def test_what_is_not_kept_of_the_base_model_is_computed_each_time(world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path, "full")
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    kept = plan_config(resolved, name="my.yaml").evaluations
    monkeypatch.setattr(BaseStates, "limit", 0)
    again = plan_config(resolved, name="my.yaml").evaluations
    assert again.base_flops == 0 and again.flops == kept.flops + kept.base_flops


def test_all_batches_count_without_a_subset(world, tmp_path):
    config = config_of(world, tmp_path, "full")
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    some = plan_config(resolved, name="my.yaml").evaluations
    tokens = [
        plan_config({**resolved, "eval_subset_num_batches": n}, name="my.yaml").evaluations.tokens
        for n in (-1, None, 1000)
    ]
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0]["eval"] == some.tokens["target"] > some.tokens["eval"] > 0


def planned_with(config: Any, **changes: Any) -> Any:
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    num_ranks = changes.pop("num_ranks", 1)
    return plan_config({**resolved, **changes}, name="my.yaml", num_ranks=num_ranks).evaluations


def test_step_0_is_without_composer_s_evaluation_unless_it_is_asked_for(world, tmp_path):
    config = config_of(world, tmp_path, "full")
    first, later = planned_with(config), planned_with(config, eval_first=False)
    without_loader = planned_with(config, eval_subset_num_batches=0)
    assert later.steps == first.steps == [0, 1, 2] and later.flops == first.flops
    by_composer = first.flops - without_loader.flops
    assert first.total_flops - later.total_flops == pytest.approx(by_composer) and by_composer > 0


def test_a_set_may_have_a_loader_s_name(world, tmp_path):
    config = config_of(world, tmp_path, "full")
    loader: Any = OmegaConf.to_container(config.eval_loader, resolve=True)
    named = [
        planned_with(config, eval_loader=[{**loader, "label": x}]) for x in ("other", "target")
    ]
    assert named[0].flops == named[1].flops
    assert sum(named[0].tokens.values()) == sum(named[1].tokens.values())


def test_each_rank_evaluates_a_subset_of_batches(world, tmp_path):
    config = config_of(world, tmp_path, "full")
    one, two = (planned_with(config, num_ranks=n, eval_subset_num_batches=1) for n in (1, 2))
    assert two.tokens["eval"] > one.tokens["eval"] > 0
    assert two.tokens["target"] == one.tokens["target"]


def test_choices_see_their_question_and_not_one_another(monkeypatch):
    """Twice the pairs of a token and one that it sees, counted one by one."""
    question, answers = list(range(400)), [list(range(500, 700)), list(range(800, 900))]
    documents = [
        SimpleNamespace(
            input_ids=np.array([*question, *answer, 0]),
            loss_mask=np.array([False] * len(question) + [True] * (len(answer) + 1)),
        )
        for answer in answers
    ]
    forest = SimpleNamespace(trees=[[0, 1]])
    work: Any = _forest_work(SimpleNamespace(forest=forest, documents=documents))  # pyright: ignore
    pairs = sum(range(1, 401)) + sum(sum(range(401, 401 + len(each))) for each in answers)
    assert work.tokens == 400 + 200 + 100
    assert work.sum_squared_lengths == pytest.approx(2 * pairs, rel=0.01)
