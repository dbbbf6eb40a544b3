"""Configurations of small runs, and their plans."""

from pathlib import Path
from typing import Any

import llmfoundry.registry
from composer.core import Callback
from omegaconf import OmegaConf

from foundry_ext.preflight.plan.plan import Plan, plan_config
from tests.training import kit


class EvalSpy(Callback):
    """Callback `eval_spy` in a YAML that records at which steps Composer evaluated."""

    def __init__(self):
        self.steps: list[int] = []

    def eval_start(self, state, logger):
        self.steps.append(state.timestamp.batch.value)


llmfoundry.registry.callbacks.register("eval_spy", func=EvalSpy)


def config_of(world: kit.World, folder: Path, method: str = "full", **overrides: Any):
    return kit.run_config(
        world,
        folder,
        method,
        **{
            "callbacks": {"spy": {}, "eval_spy": {}},
            "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
            "save_interval": "1ep",
            **overrides,
        },
    )


def plan_of(config: Any, **settings: Any) -> Plan:
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return plan_config(resolved, name="my.yaml", **settings)


def recorded(world: kit.World, tmp_path: Path) -> Any:
    path = str(tmp_path / "{run_name}" / "record.json")
    callbacks = {"run_record": {"path": path, "experiment": "e"}}
    return config_of(world, tmp_path, callbacks=callbacks)
