"""Memory does not grow over steps: a step's objects are gone when the next one is over."""

import gc
from collections import deque
from typing import Any

import llmfoundry.registry
import pytest
import torch
from composer.core import Callback

from tests.tiers import one_of
from tests.training import kit

STEPS = 150
LOOKED_AT = (75, 150)
BETWEEN = LOOKED_AT[1] - LOOKED_AT[0]


class Holdings(Callback):
    """Callback `holdings` in a YAML: counts what is alive after some steps and a collection.

    It counts tensors, bytes of floating-point tensors (batches differ in length), objects, and
    elements of all containers, because the collector does not know the numbers in a growing list.
    """

    def __init__(self, leak: bool = False):
        self.found: dict[int, tuple[int, int, int, int]] = {}
        self.leaked: list[Any] | None = [] if leak else None

    def batch_end(self, state, logger):
        step = state.timestamp.batch.value
        if self.leaked is not None:
            # More numbers than containers of earlier tests in this process may lose meanwhile.
            self.leaked += [torch.zeros(3), *(step / divisor for divisor in range(1, 20))]
        if step in LOOKED_AT:
            gc.collect()
            objects = gc.get_objects()
            tensors = [x for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter)]
            containers = [x for x in objects if type(x) in (list, dict, set, deque)]
            containers = [x for x in containers if x is not objects]
            self.found[step] = (
                len(tensors),
                sum(x.nbytes for x in tensors if x.is_floating_point()),
                len(objects),
                sum(map(len, containers)) - len(tensors),
            )


llmfoundry.registry.callbacks.register("holdings", func=Holdings)


def holdings(world, folder, method: str, *, leak: bool = False) -> Holdings:
    path = str(folder / "record.json")
    config = kit.run_config(
        world,
        folder,
        method,
        callbacks={
            # Without the spy, which keeps every batch.
            "packed_throughput": {},
            "run_record": {"path": path, "experiment": "growth"},
            "holdings": {"leak": leak},
        },
        loggers={},
        log_config=True,
        max_duration=f"{STEPS}ba",
        save_folder=None,
        save_interval=None,
        model__config_overrides={"num_hidden_layers": 1} if method == "full" else {},
        model__pretrained=False,
    )
    trainer = kit.train(config)
    trainer.close()
    return next(x for x in trainer.state.callbacks if isinstance(x, Holdings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", one_of(["full", "dora"], "dora"))
def test_nothing_is_kept_from_step_to_step(world, tmp_path, method: str):
    """The data has about 5 batches, so the run has dozens of epochs."""
    spy = holdings(world, tmp_path, method)
    (tensors, size, objects, elements), later = (spy.found[step] for step in LOOKED_AT)
    assert later[:2] == (tensors, size)
    assert later[2] - objects < BETWEEN / 5
    assert later[3] - elements < BETWEEN / 5


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_from_step_to_step_is_seen(world, tmp_path):
    spy = holdings(world, tmp_path, "full", leak=True)
    (tensors, size, _, elements), later = (spy.found[step] for step in LOOKED_AT)
    assert later[:2] == (tensors + BETWEEN, size + 12 * BETWEEN)
    assert later[3] - elements > BETWEEN / 2
